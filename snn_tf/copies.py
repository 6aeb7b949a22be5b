"""A network's graph once more, with other layers in some places: spiking neurons, another T, float32."""

from collections.abc import Mapping
from typing import Any

import tf_keras as keras

from snn_tf.config import Config
from snn_tf.errors import UsageError
from snn_tf.graph import Graph, Layer, inner, is_image, is_neuron, is_source, is_synapse
from snn_tf.layers import LIF, Dropout, ReadOut


def spiking(ann: keras.Model, config: Config, timesteps: int | None = None) -> keras.Model:
    """The SNN with an ANN's graph, names and weights: LIF in place of ReLU, leak 1, v_th 1.

    Neurons that the image reaches without passing another neuron get a constant current, so what
    lies before them is computed once and not at every step. Synapses give up their biases: their neurons
    get bias currents, 0 here, which `snn_tf.conversion` makes of the biases.

    Args:
      ann: a model of `models.build` after `fold`, or any functional one of the same layer types whose
        synapses have biases only where neurons follow.
      config: lif, surrogate, surrogate_scale, initial_membrane, bias_current, timesteps.
      timesteps: T if not `config.timesteps`.
    """
    graph = Graph.of(ann)
    steps = config.timesteps if timesteps is None else timesteps
    first = {name for name in graph.select(is_neuron) if _driven_by_image(graph, name)}
    driving = {name: driving_synapses(graph, name) for name in graph.select(is_neuron)}
    unbiased = {layer.name for layers in driving.values() for layer in layers}

    def spiking_layer(layer):
        if is_neuron(layer):
            return LIF(
                steps,
                implementation="plain" if config.lif == "auto" else config.lif,
                constant_input=layer.name in first,
                use_bias=config.bias_current or any(s.use_bias for s in driving[layer.name]),
                surrogate=config.surrogate,
                surrogate_scale=config.surrogate_scale,
                initial_membrane=config.initial_membrane,
                name=layer.name,
            )
        if isinstance(layer, Dropout | ReadOut):
            return type(layer).from_config({**layer.get_config(), "timesteps": steps})
        if layer.name in unbiased:
            return type(layer).from_config({**layer.get_config(), "use_bias": False})
        return type(layer).from_config(layer.get_config())

    snn = keras.models.clone_model(ann, clone_function=spiking_layer)
    layers = Graph.of(snn).layers
    for name, layer in graph.select(is_synapse).items():
        layers[name].set_weights(layer.get_weights()[: len(layers[name].weights)])
    return snn


def respiking(snn: keras.Model, config: Config) -> keras.Model:
    """A plain SNN with the weights, v_th and leaks of another, over `config.timesteps` steps.

    Args:
      snn: a model of `spiking`.
      config: timesteps, surrogate, surrogate_scale, initial_membrane.
    """
    changes = {
        "timesteps": config.timesteps,
        "surrogate": config.surrogate,
        "surrogate_scale": config.surrogate_scale,
        "initial_membrane": config.initial_membrane,
    }
    return _changed(snn, changes)


def in_float32(model: keras.Model) -> keras.Model:
    """A plain model with the same weights, whose every layer computes in float32."""
    return _changed(model, {"dtype": "float32"})


def _changed(model: keras.Model, changes: Mapping[str, Any]) -> keras.Model:
    """A copy with the same weights and other settings of those layers that have them."""

    def changed(layer):
        settings = layer.get_config()
        return type(layer).from_config(
            {name: changes.get(name, value) for name, value in settings.items()}
        )

    copy = keras.models.clone_model(model, clone_function=changed)
    copy.set_weights(model.get_weights())
    return copy


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Copies the weights of every layer that has any in `source`, by name; masks do not count."""
    layers = Graph.of(target).layers
    for name, layer in Graph.of(source).layers.items():
        if weights := inner(layer).get_weights():
            inner(layers[name]).set_weights(weights)


def driving_synapses(graph: Graph, neuron: str) -> list[Layer]:
    """The synapse layers whose outputs add up to the current of a layer of neurons."""
    return [layer for layer in drivers(graph, neuron) if is_synapse(layer)]


def drivers(graph: Graph, neuron: str) -> list[Layer]:
    """What adds up to the current of a layer of neurons: synapse layers, sources through identities."""
    met = graph.nearest(neuron, lambda layer: is_synapse(layer) or is_source(layer))
    return [inner(graph.layers[name]) for name in met]


def _driven_by_image(graph: Graph, name: str) -> bool:
    sources = graph.nearest(name, is_source)
    kinds = {is_image(graph.layers[source]) for source in sources}
    if len(kinds) > 1:
        raise UsageError(
            f"layer {name}: the image and spikes are added before it, which is not supported"
        )
    return kinds == {True}
