"""A model on a data split: accuracy, confusion, and the activity that costs are counted from."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tf_keras as keras

from snn_tf import data, operations, pruning
from snn_tf.graph import Graph, inner, is_image, is_neuron, is_source, is_synapse
from snn_tf.layers import LIF


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model does on every example of a split, each counted once.

    Attributes:
      num_examples: examples seen.
      accuracy: share whose largest logit is the label's.
      confusion: [classes, classes] counts, true class by row.
      correct: [num_examples] booleans in the split's order.
      timesteps: T; 1 for an ANN.
      activities: input of each synapse layer that does not read the image, by layer name; empty unless
        measured.
      spikes: spikes per image summed over neurons and T, by neuron layer; empty for an ANN.
      neurons: neurons by neuron layer.
    """

    num_examples: int
    accuracy: float
    confusion: np.ndarray
    correct: np.ndarray
    timesteps: int
    activities: dict[str, operations.Activity]
    spikes: dict[str, float]
    neurons: dict[str, int]

    def spike_rates(self) -> dict[str, float]:
        """Spikes per neuron and time step, by neuron layer."""
        return {name: total / self.neurons[name] / self.timesteps for name, total in self.spikes.items()}

    def spikes_per_neuron(self) -> float:
        """Spikes per neuron of the whole network, per image and summed over T."""
        return sum(self.spikes.values()) / sum(self.neurons.values())


def timesteps_of(model: keras.Model) -> int:
    """T of an SNN; 1 for an ANN."""
    return max((layer.timesteps for layer in model.layers if isinstance(layer, LIF)), default=1)


def is_spiking(model: keras.Model) -> bool:
    """Whether a model is an SNN."""
    return any(isinstance(layer, LIF) for layer in model.layers)


def predictor(model: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """The compiled function from the images [B, H, W, C] that `model` takes to logits [B, classes].

    It is traced once, whatever B, and keeps nothing for gradients. Logits are float32.
    """
    signature = [tf.TensorSpec(model.input_shape, model.input.dtype)]
    return tf.function(lambda images: model(images, training=False), input_signature=signature)


class Evaluator:
    """Runs one model over data; compiled once for all its calls.

    Args:
      model: an ANN or an SNN, plain or wrapped.
      batch_size: images at a time.
      activities: whether to measure what synapses receive as well, which no validation needs.
    """

    def __init__(self, model: keras.Model, batch_size: int, activities: bool = False):
        self.model = model
        self.batch_size = batch_size
        graph = Graph.of(model)
        self._neurons = graph.select(is_neuron)
        self._driven = {
            name: layer
            for name, layer in graph.select(is_synapse).items()
            if activities and _carries(graph, name) != "image"
        }
        inputs = {name: layer.input for name, layer in self._driven.items()}
        spikes = {name: layer.output for name, layer in self._neurons.items() if is_spiking(model)}
        self._activity = keras.Model(model.input, (model.output, inputs, spikes))
        signature = [tf.TensorSpec(model.input_shape, tf.uint8)]
        self._inspect = tf.function(self._inspected, input_signature=signature)

    def _inspected(self, images):
        logits, inputs, spikes = self._activity(images, training=False)
        totals = {name: _sum_over_time_and_images(x) for name, x in inputs.items()}
        nonzero = {name: _sum_over_time_and_images(tf.not_equal(x, 0)) for name, x in inputs.items()}
        counts = {name: _sum(_sum_over_time_and_images(x)) for name, x in spikes.items()}
        return logits, totals, nonzero, counts

    def evaluate(self, split: data.Split) -> Evaluation:
        """Accuracy and, if it is measured, activity on a split."""
        classes = self.model.output_shape[-1]
        confusion = np.zeros((classes, classes), np.int64)
        correct: list[np.ndarray] = []
        sums: list = []
        for images, labels in data.evaluation_batches(split, self.batch_size):
            logits, *activity = self._inspect(images)
            guesses = np.argmax(logits.numpy(), axis=1)
            np.add.at(confusion, (labels.numpy(), guesses), 1)
            correct.append(guesses == labels.numpy())
            batch = tf.nest.map_structure(lambda x: x.numpy().astype(np.float64), activity)
            sums = tf.nest.map_structure(np.add, sums, batch) if sums else batch
        totals, nonzero, counts = tf.nest.map_structure(lambda x: x / len(split), sums)
        return Evaluation(
            num_examples=int(confusion.sum()),
            accuracy=float(np.trace(confusion) / confusion.sum()),
            confusion=confusion,
            correct=np.concatenate(correct),
            timesteps=timesteps_of(self.model),
            activities={name: operations.Activity(totals[name], nonzero[name]) for name in totals},
            spikes={name: float(count) for name, count in counts.items()},
            neurons={name: math.prod(layer.output_shape[1:]) for name, layer in self._neurons.items()},
        )


def _sum_over_time_and_images(x: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(x, tf.float32), axis=0)


def _sum(x: tf.Tensor) -> tf.Tensor:
    """The sum in float64: spikes of a large layer in a batch are more than float32 can count."""
    return tf.reduce_sum(tf.cast(x, tf.float64))


def _carries(graph: Graph, name: str) -> operations.Source:
    """What the input of a synapse layer is: "image", "spikes", or "pooled" spikes."""
    stops = graph.nearest(name, lambda layer: is_source(layer) or _is_pool(layer))
    if any(is_image(graph.layers[stop]) for stop in stops):
        return "image"
    return "pooled" if any(_is_pool(graph.layers[stop]) for stop in stops) else "spikes"


def _is_pool(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.AveragePooling2D)


def synapses(model: keras.Model) -> list[operations.Synapses]:
    """The synapse layers of a model, plain or wrapped, as the cost functions want them."""
    graph = Graph.of(model)
    masks = pruning.masks(model)
    return [
        operations.Synapses(
            name=name,
            mask=masks[name],
            input_shape=tuple(layer.input_shape[1:]),
            output_shape=tuple(layer.output_shape[1:]),
            strides=getattr(inner(layer), "strides", (1, 1)),
            padding=getattr(inner(layer), "padding", "same"),
            source=_carries(graph, name),
        )
        for name, layer in graph.select(is_synapse).items()
    ]
