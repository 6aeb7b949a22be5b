"""Channels that must live and die together, and their physical removal.

A *tie group* is the set of tensors that must keep the same channels: a layer's output, what neurons,
pools and dropout make of it, and all branches of an addition. Its units are channels. The image's
channels and the classes belong to no group and are never removed. Groups are found by walking the
graph, so that no network is known by name.
"""

import math
from collections.abc import Mapping

import numpy as np
import tf_keras as keras

from snn_tf.channels import ChannelLayer, output_mask
from snn_tf.errors import check_choice
from snn_tf.graph import Graph, inner, is_image, is_neuron, is_norm, is_synapse


def output_positions(layer: keras.layers.Layer) -> int:
    """Number of positions at which a synapse layer applies its weights: H·W, or 1 for a product."""
    return math.prod(layer.output_shape[1:-1])


def tie_groups(model: keras.Model) -> dict[str, str | None]:
    """The tie group of each layer's output, by layer name; None: never removed.

    A group is named after the first synapse layer that produces it.
    """
    graph = Graph.of(model)
    group: dict[str, str | None] = {}
    for name, layer in graph.layers.items():
        if is_image(layer):
            group[name] = None
        elif is_synapse(layer):
            group[name] = name
        else:
            group[name] = _merge(group, [group[source] for source in graph.inputs[name]])
    classes = group[inner(model.layers[-1]).name]
    return {name: None if member == classes else member for name, member in group.items()}


def _merge(group: dict[str, str | None], members: list[str | None]) -> str | None:
    """Makes one group of several, in place, and returns its name: the first met, or None if one is."""
    keep = None if None in members else next(member for member in group.values() if member in members)
    for name, member in group.items():
        if member is not None and member in members:
            group[name] = keep
    return keep


def channel_layers(model: keras.Model, budget: str) -> list[ChannelLayer]:
    """Each synapse layer with the groups it reads and writes.

    Args:
      model: any functional model whose products read what they flatten from the flattening itself.
      budget: "weights" or "macs": what a kernel entry costs.

    Raises:
      ValueError: there is no such budget.
    """
    check_choice("budget", budget, ("weights", "macs"))
    graph = Graph.of(model)
    group = tie_groups(model)
    described = []
    for name, layer in graph.select(is_synapse).items():
        kernel = inner(layer).kernel.shape
        (source,) = graph.inputs[name]
        channels = _channels_behind(graph, source)
        described.append(
            ChannelLayer(
                name=name,
                kernel_positions=math.prod(kernel[:-2]),
                repeat=kernel[-2] // channels,
                in_group=group[source],
                out_group=group[name],
                in_channels=channels,
                out_channels=kernel[-1],
                unit_cost=output_positions(layer) if budget == "macs" else 1,
            )
        )
    return described


def _channels_behind(graph: Graph, name: str) -> int:
    """Channels of the tensor that `name` gives, before any flattening."""
    while isinstance(graph.layers[name], keras.layers.Flatten):
        (name,) = graph.inputs[name]
    shape = graph.layers[name].output_shape
    return (shape[0] if isinstance(shape, list) else shape)[-1]


def remove_channels(model: keras.Model, active: Mapping[str, np.ndarray]) -> keras.Model:
    """Rebuilds an ANN without its dormant channels.

    Args:
      model: plain functional model, without prune wrappers.
      active: [C] booleans by tie group, as `tie_groups` names them.

    Returns:
      A smaller model with the same layer names, whose logits equal those of `model` with the dormant
      channels' input slices at zero.
    """
    layers = {layer.name: layer for layer in channel_layers(model, "weights")}

    def smaller(layer: keras.layers.Layer) -> keras.layers.Layer:
        arguments = layer.get_config()
        if is_synapse(layer) and (group := layers[layer.name].out_group):
            arguments["units" if "units" in arguments else "filters"] = int(active[group].sum())
        return type(layer).from_config(arguments)

    small = keras.models.clone_model(model, clone_function=smaller)
    graph, groups = Graph.of(small), tie_groups(model)
    for name, layer in graph.select(is_neuron).items():
        layer.set_weights(model.get_layer(name).get_weights())
    for name, layer in graph.select(is_norm).items():
        kept = active[group] if (group := groups[name]) else slice(None)
        layer.set_weights([weight[kept] for weight in model.get_layer(name).get_weights()])
    for name, layer in graph.select(is_synapse).items():
        facts = layers[name]
        kernel, *bias = model.get_layer(name).get_weights()
        if facts.in_group:
            rows = np.tile(active[facts.in_group], facts.repeat)
            kernel = kernel[..., rows, :]
        columns = output_mask(facts, active)
        layer.set_weights([kernel[..., columns], *(b[columns] for b in bias)])
    return small
