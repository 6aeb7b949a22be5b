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


def _calm(graph: Graph, logits: str, active: float) -> None:
    """Starts the normalisations before the logits at γ = min(1, `LOGITS_GAIN` / √active inputs).

    The loss curves with the sum of the logits' squared inputs. With γ = 1 that grows with their number,
    and a learning rate that suits the other layers is then far too high for this one. Trained clips
    between them and the logits shrink likewise: at `FIRST_CLIP` they would round all of it to zero.
    """
    neurons = graph.nearest(logits, is_neuron)
    before = {
        name
        for neuron in neurons
        for name in graph.nearest(neuron, lambda layer: is_norm(layer) or is_source(layer))
    }
    if not all(is_norm(graph.layers[name]) for name in before):
        return
    scale = min(1.0, LOGITS_GAIN / math.sqrt(active))
    for name in before:
        gamma = graph.layers[name].gamma
        gamma.assign(tf.ones_like(gamma) * scale)
    for layer in map(graph.layers.__getitem__, neurons):
        if isinstance(layer, QuantisedReLU):
            layer.clip.assign(FIRST_CLIP * scale)
