"""Batch normalisation folded into the synapses before it.

In evaluation a normalisation is one multiplication and one addition per output channel:

    γ · (W x + b − μ) / √(σ² + ε) + β  =  (g · W) x + β + g · (b − μ),      g = γ / √(σ² + ε)

with the moving mean μ and variance σ². Whole output channels are scaled, so zeros of W stay zeros.
"""

import numpy as np
import tf_keras as keras

from snn_tf.errors import UserError
from snn_tf.graph import Graph, Layer, is_image, is_norm, is_synapse


def fold(model: keras.Model) -> keras.Model:
    """The same function as `model` has in evaluation, without batch normalisation.

    Args:
      model: plain functional model, without prune wrappers.

    Returns:
      A model with the same names less those of the normalisations, whose synapse layers before one have
      a bias; `model` itself if it has none.

    Raises:
      UserError: a normalisation does not follow a synapse layer of its own.
    """
    graph = Graph.of(model)
    if not graph.select(is_norm):
        return model
    norm_of = _norms(graph)
    tensors: dict[str, keras.KerasTensor] = {}
    for name, layer in graph.layers.items():
        sources = [tensors[source] for source in graph.inputs[name]]
        tensors[name] = sources[0] if is_norm(layer) else _called(layer, sources, name in norm_of)
    folded = keras.Model(
        [tensors[name] for name in graph.select(is_image)],
        tensors[model.output_names[0]],
        name=model.name,
    )
    for name, layer in Graph.of(folded).layers.items():
        layer.set_weights(_folded(graph.layers[name], norm_of.get(name)))
    return folded


def _norms(graph: Graph) -> dict[str, Layer]:
    """The normalisation that follows each synapse layer, where one does."""
    found = {}
    for name, layer in graph.select(is_norm).items():
        (source,) = graph.inputs[name]
        readers = sum(source in inputs for inputs in graph.inputs.values())
        if not is_synapse(graph.layers[source]) or readers > 1:
            raise UserError(
                f"layer {name}: cannot be folded; a batch normalisation must be the only reader of a "
                "convolution or dense layer"
            )
        found[source] = layer
    return found


def _called(layer: Layer, sources: list, biased: bool):
    """The output of a copy of `layer`, with a bias if `biased`."""
    extra = {"use_bias": True} if biased else {}
    copy = type(layer).from_config({**layer.get_config(), **extra})
    if is_image(layer):
        return copy.output
    return copy(sources[0] if len(sources) == 1 else sources)


def _folded(layer: Layer, norm: Layer | None) -> list[np.ndarray]:
    """The weights of `layer` with those of the normalisation behind it, in float64 on the way."""
    if norm is None:
        return layer.get_weights()
    kernel, *bias = (weight.astype(np.float64) for weight in layer.get_weights())
    mean, variance = norm.moving_mean.numpy(), norm.moving_variance.numpy().astype(np.float64)
    gain = 1.0 / np.sqrt(variance + norm.epsilon)
    gain *= norm.gamma.numpy() if norm.scale else 1.0
    shift = (bias[0] if bias else 0.0) - mean
    return [kernel * gain, gain * shift + (norm.beta.numpy() if norm.center else 0.0)]
