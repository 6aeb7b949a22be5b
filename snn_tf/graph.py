"""A functional Keras model as a plain graph: layers by name, what feeds what, what role each plays.

Prune wrappers are transparent: a layer goes by the name of the layer inside. Whoever walks a network
(conversion, channel removal, costs) walks it here, so that no network is known by name.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras as keras

from snn_tf.layers import LIF, QuantisedReLU

Layer = Any  # keras.layers.Layer, which carries no types


def inner(layer: Layer) -> Layer:
    """The layer itself, or the one inside its wrapper."""
    return layer.layer if isinstance(layer, keras.layers.Wrapper) else layer


def is_synapse(layer: Layer) -> bool:
    """Whether the layer multiplies its input by weights: a convolution or a dense product."""
    return isinstance(inner(layer), keras.layers.Conv2D | keras.layers.Dense)


def is_norm(layer: Layer) -> bool:
    """Whether the layer is a batch normalisation."""
    return isinstance(layer, keras.layers.BatchNormalization)


def is_neuron(layer: Layer) -> bool:
    """Whether the layer is a nonlinearity: ReLU, quantised or not, in an ANN, LIF in an SNN."""
    return isinstance(layer, keras.layers.ReLU | QuantisedReLU | LIF)


def is_image(layer: Layer) -> bool:
    """Whether the layer is the network's input."""
    return isinstance(layer, keras.layers.InputLayer)


def is_source(layer: Layer) -> bool:
    """Whether the layer gives the values that synapses read: a neuron, or the image."""
    return is_neuron(layer) or is_image(layer)


@dataclasses.dataclass(frozen=True)
class Graph:
    """Layers in topological order, and the names of the layers that feed each of them."""

    layers: dict[str, Layer]
    inputs: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, model: keras.Model) -> "Graph":
        """Reads a functional model in which every layer is called once.

        Models made later from its tensors may call its layers again; the first call counts.
        """
        layers = {inner(layer).name: layer for layer in model.layers}
        inputs = {name: _feeding(layer) for name, layer in layers.items()}
        return cls(layers, inputs)

    def select(self, role: Callable[[Layer], bool]) -> dict[str, Layer]:
        """The layers that have a role, such as `is_neuron`, in topological order."""
        return {name: layer for name, layer in self.layers.items() if role(layer)}

    def nearest(self, name: str, role: Callable[[Layer], bool]) -> list[str]:
        """The layers with a role that are met first on the ways back from `name`, itself excluded."""
        found: list[str] = []
        for source in self.inputs[name]:
            ahead = [source] if role(self.layers[source]) else self.nearest(source, role)
            found += [layer for layer in ahead if layer not in found]
        return found


def neuron_parameters(model: keras.Model) -> dict[str, dict[str, float]]:
    """What neurons train, by kind and layer name: v_th and leak of an SNN, clip of a quantised ANN."""
    neurons = Graph.of(model).select(is_neuron).items()
    cells = {name: layer.cell for name, layer in neurons if isinstance(layer, LIF)}
    clipped = {name: layer for name, layer in neurons if isinstance(layer, QuantisedReLU)}
    owners = {"v_th": cells, "leak": cells, "clip": clipped}
    return {
        kind: {name: float(getattr(owner, kind)) for name, owner in found.items()}
        for kind, found in owners.items()
    }


def _feeding(layer: Layer) -> tuple[str, ...]:
    if is_image(layer):
        return ()
    sources = tf.nest.flatten(layer.inbound_nodes[0].inbound_layers)
    return tuple(inner(source).name for source in sources)
