"""Networks and images for tests: built from the flags' words, with weights of choice."""

import math

import numpy as np
import tf_keras as keras

from snn_tf import models
from snn_tf.config import Config
from snn_tf.data import DataSpec
from snn_tf.graph import Graph, inner, is_neuron, is_norm, is_synapse
from snn_tf.initialisation import initialise


def spec_of(image_shape=(32, 32, 3), classes=10, mean=120.0, std=60.0) -> DataSpec:
    channels = image_shape[-1]
    return DataSpec("noise", image_shape, classes, "none", (mean,) * channels, (std,) * channels)


def build(network, neuron="relu", image_shape=(32, 32, 3), classes=10, **settings) -> keras.Model:
    """A network with weights of zero."""
    config = Config(network=network, **settings)
    return models.build(config, neuron, spec_of(image_shape, classes))


def initialised(network, seed=1, **settings) -> keras.Model:
    """A network with random weights."""
    model = build(network, **settings)
    initialise(model, seed)
    return model


def scramble(model, seed) -> None:
    """Gives normalisations parameters and statistics far from their first ones."""
    rng = np.random.default_rng(seed)
    for layer in Graph.of(model).select(is_norm).values():
        size = layer.gamma.shape
        layer.gamma.assign(rng.uniform(-1.5, 1.5, size))
        layer.beta.assign(rng.normal(0.2, 0.5, size))
        layer.moving_mean.assign(rng.normal(0.3, 1.0, size))
        layer.moving_variance.assign(rng.uniform(0.2, 3.0, size))


def spread_clips(model) -> dict[str, float]:
    """Gives every layer of quantised activations a clip of its own: 0.5, 1.5 and so on, by name."""
    clips = {}
    for number, (name, layer) in enumerate(Graph.of(model).select(is_neuron).items()):
        clips[name] = 0.5 + number
        layer.clip.assign(clips[name])
    return clips


def clips_of(model) -> dict[str, float]:
    return {name: float(layer.clip) for name, layer in Graph.of(model).select(is_neuron).items()}


def some_images(count, image_shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *image_shape), np.uint8)


def kernels(model) -> dict[str, np.ndarray]:
    return {
        name: inner(layer).kernel.numpy() for name, layer in Graph.of(model).select(is_synapse).items()
    }


def output_shapes(model) -> dict[str, tuple[int, ...]]:
    """Shape of what each layer gives for one image, without the batch."""
    found = {}
    for name, layer in Graph.of(model).layers.items():
        shape = layer.output_shape
        found[name] = tuple((shape[0] if isinstance(shape, list) else shape)[1:])
    return found


def weights_of(model) -> int:
    return sum(math.prod(kernel.shape) for kernel in kernels(model).values())
