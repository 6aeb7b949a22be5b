"""The networks: VGG and ResNet variants as functional models, as an ANN or as an SNN.

Both have the same graph and the same layer names. A model takes uint8 images [B, H, W, C] and gives
logits [B, classes]; standardisation is its first layer. In an SNN, time is folded into the batch from
the first neuron to the read-out (see `snn_tf.layers`).
"""

import dataclasses
from typing import Any

import numpy as np
import tf_keras as keras

from snn_tf.config import Config
from snn_tf.copies import spiking
from snn_tf.data import DataSpec
from snn_tf.errors import UsageError, UserError, check_choice
from snn_tf.folding import fold
from snn_tf.graph import Graph, is_neuron
from snn_tf.layers import Conv2D, Dropout, QuantisedReLU, ReadOut

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
      config: network, width, head, batch_norm, dropout, head_dropout, precision; for "lif" also
        timesteps and the neuron's; for "quantised_relu" also activation_levels.
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
        precision = "float32" if config.precision == "auto" else config.precision
        self.policy = keras.mixed_precision.Policy(precision)
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
