"""What a stage minimises: cross entropy, the attention-guided sum of three terms, or the SNN's."""

import math
from typing import Protocol

import tensorflow as tf
import tf_keras as keras

from snn_tf.ambient import spike_price
from snn_tf.attention import attention_loss, attention_map, distillation_loss
from snn_tf.config import Config
from snn_tf.errors import UsageError
from snn_tf.graph import Graph, is_neuron
from snn_tf.models import attended
from snn_tf.pruners import Pruner

Terms = dict[str, tf.Tensor]


class Objective(Protocol):
    """Gives a batch's loss terms, already weighted, and the logits [B, classes]."""

    def __call__(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[Terms, tf.Tensor]: ...


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor, smoothing: float) -> tf.Tensor:
    """Batch mean of the cross entropy with smoothed targets; logits [B, classes], labels [B]."""
    classes = logits.shape[-1]
    targets = tf.one_hot(labels, classes) * (1.0 - smoothing) + smoothing / classes
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))


class CrossEntropy:
    """L_CE of one model."""

    def __init__(self, model: keras.Model, config: Config):
        self.model = model
        self.smoothing = config.label_smoothing

    def __call__(self, images, labels):
        logits = self.model(images, training=True)
        return {"cross_entropy": cross_entropy(logits, labels, self.smoothing)}, logits


class AttentionGuided:
    """L = (1 − α) · L_CE + α · L_KD + (β/2) · L_AT, the student against the frozen meta-model.

    Attributes:
      maps: the compiled function from images [B, H, W, C] to the attention maps of student and teacher,
        each [B, H, W], by layer name.

    Raises:
      UsageError: the meta-model's attended maps or classes are not the student's.
    """

    def __init__(self, pruner: Pruner, teacher: keras.Model, config: Config):
        student = pruner.model
        self.config = config
        self.pruner = pruner
        self.names = attended(student)
        self.maps = tf.function(self._maps)
        self._student = _with_activations(student, self.names)
        self._teacher = _with_activations(teacher, attended(teacher))
        ours, theirs = (_shapes(model) for model in (self._student, self._teacher))
        if ours != theirs:
            raise UsageError(
                f"--meta_model={config.meta_model}: its logits and attention maps have shapes "
                f"{theirs}, but --network={config.network} has {ours}"
            )

    def __call__(self, images, labels):
        alpha, beta = self.config.distillation, self.config.attention
        logits, *activations = self._student(images, training=True)
        goal, *teacher_activations = map(tf.stop_gradient, self._teacher(images, training=False))
        hard = cross_entropy(logits, labels, self.config.label_smoothing)
        soft = distillation_loss(logits, goal, self.config.temperature)
        terms = {"cross_entropy": (1.0 - alpha) * hard, "distillation": alpha * soft}
        if beta:
            student_maps = self._student_maps(activations)
            teacher_maps = [attention_map(activation) for activation in teacher_activations]
            terms["attention"] = beta / 2.0 * attention_loss(student_maps, teacher_maps)
        return terms, logits

    def _student_maps(self, activations):
        pairs = zip(self.names, activations, strict=True)
        return [attention_map(a, self.pruner.active_channels(name)) for name, a in pairs]

    def _maps(self, images: tf.Tensor) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
        activations = self._student(images, training=False)[1:]
        ours = self._student_maps(activations)
        theirs = [attention_map(activation) for activation in self._teacher(images, training=False)[1:]]
        shapes = [tf.shape(activation)[:3] for activation in activations]
        return {
            name: (tf.reshape(our, shape), tf.reshape(their, shape))
            for name, our, their, shape in zip(self.names, ours, theirs, shapes, strict=True)
        }


class SpikeTraining:
    """L = (1 − α) · L_CE + α · L_KD + w · spikes per neuron, the SNN against its compressed ANN.

    α is `--snn_distill`, w `--spike_penalty`; spikes per neuron are those of an image over all T steps,
    the mean over batch and neurons. The neurons add their gradient (`ambient.spike_price`), since in
    bfloat16 it would round away beside that of the others.

    Args:
      model: the SNN.
      teacher: the compressed ANN; None if α is 0.
      config: α, w, temperature and label smoothing.
    """

    def __init__(self, model: keras.Model, teacher: keras.Model | None, config: Config):
        self.config = config
        self.teacher = teacher
        neurons = Graph.of(model).select(is_neuron)
        self._model = _with_activations(model, list(neurons))
        self._neurons = sum(math.prod(layer.output_shape[1:]) for layer in neurons.values())

    def __call__(self, images, labels):
        alpha, penalty = self.config.snn_distill, self.config.spike_penalty
        neurons = self._neurons * tf.cast(tf.shape(images)[0], tf.float32)
        with spike_price(penalty / neurons):
            logits, *spikes = self._model(images, training=True)
        hard = cross_entropy(logits, labels, self.config.label_smoothing)
        terms = {"cross_entropy": (1.0 - alpha) * hard}
        if self.teacher:
            goal = tf.stop_gradient(self.teacher(images, training=False))
            terms["distillation"] = alpha * distillation_loss(logits, goal, self.config.temperature)
        if penalty:
            fired = [tf.reduce_sum(tf.cast(train, tf.float32)) for train in spikes]
            terms["spikes"] = tf.stop_gradient(penalty * tf.add_n(fired) / neurons)
        return terms, logits


def _with_activations(model: keras.Model, names: list[str]) -> keras.Model:
    outputs = [model.get_layer(name).output for name in names]
    return keras.Model(model.input, [model.output, *outputs])


def _shapes(model: keras.Model) -> list[tuple[int, ...]]:
    logits, *maps = model.output_shape
    return [logits[1:], *(shape[1:3] for shape in maps)]
