"""The project's own networks and steps, made and run as `train.py` makes and runs them."""

import tempfile

import numpy as np
import tensorflow as tf
import tf_keras as keras

from snn_tf import data, execution, models, pruning
from snn_tf.config import TRAIN_SNN, Config
from snn_tf.graph import Graph, inner, is_neuron, is_synapse
from snn_tf.layers import use_implementation
from snn_tf.objectives import CrossEntropy, Objective
from snn_tf.pruners import Pruner
from snn_tf.update import Recipe, Update
from workloads import CLASSES, LEAK, LEARNING_RATE, SIDE, SURROGATE_SCALE, V_TH, Workload, channels_last

_scratch = tempfile.TemporaryDirectory()
SPEC = data.DataSpec("noise", (SIDE, SIDE, 3), CLASSES, "none", (0.0,) * 3, (1.0,) * 3)
RECIPE = Recipe("adam", LEARNING_RATE, weight_decay=0.0, epochs=1)


def settings(**changes) -> Config:
    """The workloads' settings, `changes` over them, and every `auto` resolved for this machine."""
    common = {
        "run_dir": tempfile.mkdtemp(dir=_scratch.name),
        "schedule": "constant",
        "dropout": 0.0,
        "head_dropout": 0.0,
        "surrogate_scale": SURROGATE_SCALE,
    }
    return execution.resolve(Config(**{**common, **changes}))


def network(workload: Workload, config: Config, neuron: str = "lif") -> keras.Model:
    """A workload's network in its wrappers, with the workload's weights, leaks and thresholds.

    It takes float32 images [B, H, W, C] that are standardised already, as the other libraries' do.
    """
    plan = models.Plan(workload.convolutions, workload.head)
    plain = models.build(config, neuron, SPEC, plan)
    image = keras.Input(SPEC.image_shape, name="image")
    model = pruning.wrap(keras.models.clone_model(plain, image))
    graph = Graph.of(use_implementation(model, config.lif))
    synapses = graph.select(is_synapse).values()
    for layer, kernel in zip(synapses, channels_last(workload.weights()), strict=True):
        inner(layer).kernel.assign(kernel)
    for layer in graph.select(is_neuron).values() if neuron == "lif" else ():
        layer.cell.leak.assign(LEAK)
        layer.cell.v_th.assign(V_TH)
    return model


def examples(workload: Workload) -> tuple[tf.Tensor, tf.Tensor]:
    """The workload's images [B, H, W, C], float32, and labels [B], int32."""
    images, labels = workload.examples()
    return tf.constant(images.transpose(0, 2, 3, 1)), tf.constant(labels, tf.int32)


def noise(count: int) -> data.Split:
    """Random images and labels of the shape of `SPEC`."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *SPEC.image_shape), np.uint8)
    return data.Split(images, rng.integers(0, CLASSES, count).astype(np.int32))


def update(
    config: Config,
    model: keras.Model,
    objective: Objective | None = None,
    pruner: Pruner | None = None,
    recipe: Recipe = RECIPE,
) -> Update:
    """What `train.py` trains a model with; its `step` is the training step."""
    objective = objective or CrossEntropy(model, config)
    return Update(config, recipe, model, objective, 1000, config.stage_seed(TRAIN_SNN), pruner)


def predictor(model: keras.Model, config: Config) -> tf.types.experimental.PolymorphicFunction:
    """Images [B, H, W, C] → logits [B, classes], compiled for any B."""
    signature = [tf.TensorSpec(model.input_shape, model.input.dtype)]

    def predict(images):
        return model(images, training=False)

    return tf.function(
        predict, input_signature=signature, jit_compile=config.jit_compile == "true" or None
    )
