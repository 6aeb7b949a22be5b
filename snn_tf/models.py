"""The networks: VGG and ResNet variants as functional models, as an ANN or as an SNN.

Both have the same graph and the same layer names. A model takes uint8 images [B, H, W, C] and gives
logits [B, classes]; standardisation is its first layer. In an SNN, time is folded into the batch from
the first neuron to the read-out (see `snn_tf.layers`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import tf_keras as keras

from snn_tf.config import Config
from snn_tf.data import DataSpec
from snn_tf.errors import UsageError, UserError, check_choice
from snn_tf.folding import fold
from snn_tf.graph import Graph, Layer, inner, is_image, is_neuron, is_source, is_synapse
from snn_tf.layers import LIF, Conv2D, Dropout, QuantisedReLU, ReadOut

STANDARDISE = "standardise"
POOL = "P"
# DIET-SNN's networks: widths of 3×3 convolutions, P a 2×2 average pool.
VGG: dict[str, tuple[int | str, ...]] = {
    "vgg5": (64, POOL, 128, 128, POOL),
    "vgg9": (64, POOL, 128, 256, POOL, 256, 512, POOL, 512, POOL, 512),
    "vgg11": (64, POOL, 128, 256, POOL, 512, 512, POOL, 512, POOL, 512, 512),
    "vgg13": (64, 64, POOL, 128, 128, POOL, 256, 256, POOL, 512, 512, 512, POOL, 512),
    "vgg16": (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512),
    "vgg19": (64, 64, POOL, 128, 128, POOL, *[256] * 4, POOL, *[512] * 4, POOL, *[512] * 4),
}
VGG_HEAD = (4096, 4096)
RESNET_STEM = (64, 64, 64)
RESNET_WIDTHS = (64, 128, 256, 512)
RESNET_BLOCKS = {"resnet12": (1, 1, 1, 1), "resnet20": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
# Moving statistics follow the last ten steps or so: epochs of small data sets are not much longer.
NORM_MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Plan:
    """A VGG: widths of its 3×3 convolutions with `POOL` between them, and of its head's products."""

    convolutions: tuple[int | str, ...]
    head: tuple[int, ...] = VGG_HEAD


def build(config: Config, neuron: str, spec: DataSpec, plan: Plan | None = None) -> keras.Model:
    """Builds `config.network`, weights all zero; see `initialise`.

    Args:
      config: network, width, head, dropout, precision; for "lif" also timesteps and the neuron's; for
        "quantised_relu" also activation_levels.
      neuron: "relu" or "quantised_relu" for the ANN, "lif" for the SNN.
      spec: image shape, number of classes and statistics of the data.
      plan: a VGG of one's own, built instead of the one that `config.network` names.

    Raises:
      UsageError: a pool of the network does not fit the image.
      ValueError: there is no such neuron.
    """
    check_choice("neuron", neuron, ("relu", "quantised_relu", "lif"))
    builder = _Builder(config, spec, config.activation_levels if neuron == "quantised_relu" else 0)
    if plan is None and config.network in VGG:
        plan = Plan(VGG[config.network])
    ann = builder.vgg(plan) if plan else builder.resnet()
    return spiking(fold(ann), config) if neuron == "lif" else ann


def standardisation(model: keras.Model) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that a network's first layer knows, in grey levels.

    Raises:
      UserError: the network has no such layer.
    """
    layer = next((layer for layer in model.layers if layer.name == STANDARDISE), None)
    if not isinstance(layer, keras.layers.Normalization):
        raise UserError(f"the network has no layer {STANDARDISE}: it was not made by this package")
    mean, variance = (np.ravel(layer.get_config()[name]) for name in ("mean", "variance"))
    return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


class _Builder:
    """Adds layers one after the other, naming each; `x` is the tensor at which it stands.

    `levels` are those of the activations; 0: ReLU.
    """

    def __init__(self, config: Config, spec: DataSpec, levels: int):
        self.config = config
        self.spec = spec
        self.levels = levels
        self.policy = keras.mixed_precision.Policy(_chosen(config.precision, "float32"))
        self.image = keras.Input(spec.image_shape, dtype="uint8", name="image")
        variance = [deviation**2 for deviation in spec.std]
        standardise = keras.layers.Normalization(mean=spec.mean, variance=variance, name=STANDARDISE)
        self.x = standardise(self.image)

    def vgg(self, plan: Plan) -> keras.Model:
        entries = self.entries(plan)
        convolutions = pools = 0
        for index, entry in enumerate(entries):
            if entry == POOL:
                pools += 1
                self.pool(f"pool{pools}")
            else:
                convolutions += 1
                self.convolution(f"conv{convolutions}", entry)
                self.neuron(f"conv{convolutions}")
                if entries[index + 1 : index + 2] != (POOL,):
                    self.dropout(f"conv{convolutions}", self.config.dropout)
        if self.config.head == "linear":
            return self.finish()
        self.x = keras.layers.Flatten(name="flatten", dtype=self.policy)(self.x)
        for index, units in enumerate(plan.head, start=convolutions + 1):
            dense = keras.layers.Dense(self.scaled(units), **self.synapse(f"dense{index}"))
            self.x = dense(self.x)
            self.norm(f"dense{index}")
            self.neuron(f"dense{index}")
            self.dropout(f"dense{index}", self.config.head_dropout)
        return self.finish()

    def entries(self, plan: Plan) -> tuple[Any, ...]:
        """A VGG's widths and pools; before the linear head, one more pool where it fits."""
        side = min(self.spec.image_shape[:2]) // 2 ** plan.convolutions.count(POOL)
        pooled = self.config.head == "linear" and side >= 2
        return (*plan.convolutions, POOL) if pooled else plan.convolutions

    def resnet(self) -> keras.Model:
        for index, filters in enumerate(RESNET_STEM, start=1):
            self.convolution(f"stem{index}", filters)
            self.neuron(f"stem{index}")
            if index < len(RESNET_STEM):
                self.dropout(f"stem{index}", self.config.dropout)
        self.pool("stem_pool")
        stages = zip(RESNET_WIDTHS, RESNET_BLOCKS[self.config.network], strict=True)
        for stage, (filters, blocks) in enumerate(stages, start=1):
            for block in range(1, blocks + 1):
                strides = 2 if stage > 1 and block == 1 else 1
                self.block(f"stage{stage}_block{block}", filters, strides)
        return self.finish()

    def block(self, name: str, filters: int, strides: int) -> None:
        """Two convolutions; the shortcut adds to the current of the second one's neuron."""
        shortcut = self.x
        if shortcut.shape[1:3] == (1, 1):
            # The same result; bfloat16 filter gradients of strided 1×1 maps hold garbage on some CPUs.
            strides = 1
        self.convolution(f"{name}_conv1", filters, strides)
        self.neuron(f"{name}_conv1")
        self.dropout(f"{name}_conv1", self.config.dropout)
        self.convolution(f"{name}_conv2", filters)
        branch = self.x
        if shortcut.shape[1:] != branch.shape[1:]:
            self.x = shortcut
            self.convolution(f"{name}_shortcut", filters, strides, size=1)
            shortcut = self.x
        self.x = keras.layers.Add(name=f"{name}_add", dtype=self.policy)([branch, shortcut])
        self.neuron(f"{name}_conv2")

    def scaled(self, width: int) -> int:
        """The width after `--width`: a multiple of 8, at least 8."""
        return max(8, 8 * round(width * self.config.width / 8))

    def synapse(self, name: str) -> dict:
        return {
            "use_bias": False,
            "kernel_initializer": "zeros",
            "dtype": self.policy,
            "name": name,
        }

    def convolution(self, name: str, filters: int, strides: int = 1, size: int = 3) -> None:
        layer = Conv2D(self.scaled(filters), size, strides, padding="same", **self.synapse(name))
        self.x = layer(self.x)
        self.norm(name)

    def norm(self, name: str) -> None:
        """Normalises what a layer of synapses gives, if `--batch_norm` says so."""
        if self.config.batch_norm:
            layer = keras.layers.BatchNormalization(
                momentum=NORM_MOMENTUM, name=f"{name}_norm", dtype=self.policy
            )
            self.x = layer(self.x)

    def neuron(self, name: str) -> None:
        name = f"{name}_neuron"
        if self.levels:
            self.x = QuantisedReLU(self.levels, name=name)(self.x)
        else:
            self.x = keras.layers.ReLU(name=name, dtype=self.policy)(self.x)

    def dropout(self, name: str, rate: float) -> None:
        self.x = Dropout(rate, name=f"{name}_dropout")(self.x)

    def pool(self, name: str) -> None:
        if min(self.x.shape[1:3]) < 2:
            size = "×".join(map(str, self.spec.image_shape[:2]))
            raise UsageError(
                f"--network={self.config.network}: its {name} does not fit images of {size} "
                f"(--dataset={self.config.dataset}); use larger images or a network with fewer pools"
            )
        self.x = keras.layers.AveragePooling2D(2, name=name, dtype=self.policy)(self.x)

    def finish(self) -> keras.Model:
        """Flattens if need be, and adds the product that gives the logits, in float32."""
        if len(self.x.shape) > 2:
            self.x = keras.layers.Flatten(name="flatten", dtype=self.policy)(self.x)
        arguments = {**self.synapse("logits"), "dtype": "float32"}
        logits = keras.layers.Dense(self.spec.num_classes, **arguments)(self.x)
        return keras.Model(self.image, ReadOut(name="read_out")(logits), name=self.config.network)


def _chosen(setting: str, reference: str) -> str:
    """A setting of how to compute, or the reference where `snn_tf.execution` has not resolved `auto`."""
    return reference if setting == "auto" else setting


def spiking(ann: keras.Model, config: Config, timesteps: int | None = None) -> keras.Model:
    """The SNN with an ANN's graph, names and weights: LIF in place of ReLU, leak 1, v_th 1.

    Neurons that the image reaches without passing another neuron get a constant current, so what
    lies before them is computed once and not at every step. Synapses give up their biases: their neurons
    get bias currents, 0 here, which `snn_tf.conversion` makes of the biases.

    Args:
      ann: a model of `build` after `fold`, or any functional one of the same layer types whose
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
                implementation=_chosen(config.lif, "plain"),
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


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Copies the weights of every layer that has any in `source`, by name; masks do not count."""
    layers = Graph.of(target).layers
    for name, layer in Graph.of(source).layers.items():
        if weights := inner(layer).get_weights():
            inner(layers[name]).set_weights(weights)


def attended(model: keras.Model) -> list[str]:
    """Names of the neurons whose maps are attended to: the last at each spatial resolution.

    In a VGG these are the activations before each pool and before the head, in a ResNet the ends of
    the stem and of each stage.
    """
    last = {
        tuple(layer.output_shape[1:3]): name
        for name, layer in Graph.of(model).select(is_neuron).items()
        if len(layer.output_shape) == 4
    }
    return list(last.values())
