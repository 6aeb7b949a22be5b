"""The first weights of a network."""

import math
import zlib
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
import tf_keras as keras

from snn_tf.graph import Graph, inner, is_neuron, is_norm, is_source, is_synapse
from snn_tf.layers import FIRST_CLIP, QuantisedReLU

# Root of the summed squares of γ, at first, over the inputs of the logits; see `_calm`.
LOGITS_GAIN = 4.0


def initialise(model: keras.Model, seed: int, densities: Mapping[str, float] | None = None) -> None:
    """Gives every kernel normal weights of standard deviation √(2 / (density · fan_in)) (He 2015).

    Where batch normalisations alone drive the neurons that the logits read, these start at the γ of
    `_calm`.

    Args:
      model: its synapse layers are drawn independently, each from `seed` and its name.
      seed: any non-negative integer.
      densities: share of each layer's inputs that is active, by layer name; 1 where absent.
    """
    graph = Graph.of(model)
    for name, layer in graph.select(is_synapse).items():
        shape = inner(layer).kernel.shape
        active = (densities or {}).get(name, 1.0) * math.prod(shape[:-1])
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        kernel = rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(2.0 / active))
        inner(layer).kernel.assign(kernel)
    # The last one gives the logits.
    _calm(graph, name, active)
    fit_clips(model)


def fit_clips(model: keras.Model) -> None:
    """Starts trained clips at `FIRST_CLIP` times the root mean square γ of normalisations before them.

    γ is the standard deviation of what each gives; a clip far above that rounds all of it to zero. γ
    starts small before the logits, and stays so. Clips behind anything else stay as they are.
    """
    graph = Graph.of(model)
    for name, layer in graph.select(is_neuron).items():
        before = _before(graph, name)
        if isinstance(layer, QuantisedReLU) and all(map(is_norm, before)):
            gammas = np.concatenate([norm.gamma.numpy() for norm in before])
            layer.clip.assign(FIRST_CLIP * np.sqrt(np.mean(np.square(gammas))))


def _before(graph: Graph, neuron: str) -> list[keras.layers.Layer]:
    """The normalisations that add up to what a layer of neurons receives, and sources without one."""
    met = graph.nearest(neuron, lambda layer: is_norm(layer) or is_source(layer))
    return [graph.layers[name] for name in met]


def _calm(graph: Graph, logits: str, active: float) -> None:
    """Starts the normalisations before the logits at γ = min(1, `LOGITS_GAIN` / √active inputs).

    The loss curves with the sum of the logits' squared inputs. With γ = 1 that grows with their number,
    and a learning rate that suits the other layers is then far too high for this one.
    """
    before = [layer for neuron in graph.nearest(logits, is_neuron) for layer in _before(graph, neuron)]
    if not all(map(is_norm, before)):
        return
    scale = min(1.0, LOGITS_GAIN / math.sqrt(active))
    for norm in before:
        norm.gamma.assign(tf.ones_like(norm.gamma) * scale)
