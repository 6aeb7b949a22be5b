"""Weights, multiply-accumulates (MACs), accumulates (ACs) and energy of an ANN or an SNN, per image.

Takes the masked layers of synapses and, for an SNN, the mean activity of their inputs; gives plain
dictionaries that go into record.json unchanged. Measuring activity belongs to the evaluation.

Two conventions, each used for MACs and ACs alike:

    padded   macs = active weights x output positions, zeros of the padding included; one unit of input
             of channel c is charged (active weights leaving c) x output positions / input positions
    exact    only taps that exist: an input position meets the kernel offsets that some output position
             lays upon it

`taps` holds both. With x[p] one unit of input at position p, macs = sum_p taps[p] and
acs = sum_p total[p] . taps[p], so a network whose neurons all fire at every step has acs = T . macs.

What an SNN layer's input carries decides what it costs:

    image    analog values, the same at every step: MACs, once
    spikes   0 or 1: one AC per spike and tap
    pooled   means of spikes: rate x MACs counted as ACs (DIET-SNN, Rathi & Roy 2020)

This is the variant `default`. `image_every_step` charges the image's MACs T times, `pooled_as_macs`
charges one MAC per non-zero pooled input and tap (NeuroBench), and
`image_every_step_pooled_as_macs` does both.

The record of `ann_costs` and `snn_costs`, with counts per image (means where they depend on activity):

    weights, active_weights     prunable weights of the uncut network; those that remain
    density, compression        active_weights / weights; its inverse (null if nothing is active)
    mac_density                 one_pass_macs / dense_macs, padded
    macs, acs, energy_pj        padded, default; energy_pj = {model: picojoule}
    conventions                 {"padded" | "exact": {
        one_pass_macs               MACs of one pass through the masked network, whatever the activity
        dense_macs                  the same of the uncut network with all weights active
        mac_density                 their ratio
        variants                    {variant: {macs, acs, energy_pj}}; an ANN has only "default"}}
    layers                      [{name, source, and all of the above}], in the order given
    neuron_updates              SNN only: neurons x T, each a leak multiply and an add; in no energy
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

Convention = Literal["padded", "exact"]
Padding = Literal["same", "valid"]
Source = Literal["image", "spikes", "pooled"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


@dataclasses.dataclass(frozen=True)
class EnergyModel:
    """Energy of one multiply-accumulate and of one accumulate, in picojoules."""

    mac_pj: float
    ac_pj: float


# M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, 45 nm:
# 32-bit float multiply 3.7 pJ and add 0.9 pJ; 32-bit integer multiply 3.1 pJ and add 0.1 pJ.
ENERGY: Mapping[str, EnergyModel] = {
    "fp32_45nm": EnergyModel(mac_pj=4.6, ac_pj=0.9),
    "int32_45nm": EnergyModel(mac_pj=3.2, ac_pj=0.1),
}


class Variant(NamedTuple):
    """Choices in which published SNN counts differ, besides the convention."""

    image_every_step: bool = False
    pooled_as_macs: bool = False


VARIANTS: Mapping[str, Variant] = {
    "default": Variant(),
    "image_every_step": Variant(image_every_step=True),
    "pooled_as_macs": Variant(pooled_as_macs=True),
    "image_every_step_pooled_as_macs": Variant(image_every_step=True, pooled_as_macs=True),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Synapses:
    """One layer of synapses: a convolution or a dense product, without what surrounds it.

    Attributes:
      name: the layer's name, the key of its activity.
      mask: [kh, kw, cin, cout] or [cin, cout], true where a weight is active; not changed afterwards.
      input_shape: (H, W, C), or (C,) of a dense product.
      output_shape: likewise, with the layer's output channels.
      strides: (sh, sw), in positions.
      padding: "same" or "valid", as TensorFlow pads.
      source: what the input carries: "image", "spikes", or "pooled" (after an average pool).

    Raises:
      ValueError: the shapes do not belong together, or padding or source is unknown.
    """

    name: str
    mask: np.ndarray
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    strides: tuple[int, int] = (1, 1)
    padding: Padding = "same"
    source: Source = "spikes"

    def __post_init__(self) -> None:
        _check_choice("padding", self.padding, get_args(Padding))
        _check_choice("source", self.source, get_args(Source))
        dimensions = {1: 2, 3: 4}.get(len(self.input_shape))
        if self.mask.ndim != dimensions or self.mask.shape[-2] != self.input_shape[-1]:
            raise ValueError(
                f"{self.name}: a mask of shape {self.mask.shape} does not fit inputs of shape "
                f"{self.input_shape}; allowed are [kh, kw, C, cout] on (H, W, C) and [C, cout] on (C,)"
            )
        expected = (*(axis.outputs for axis in self.axes), self.mask.shape[-1])
        if tuple(self.output_shape) != expected or min(expected) < 1:
            raise ValueError(
                f"{self.name}: output_shape is {self.output_shape}, but inputs of shape "
                f"{self.input_shape} with padding {self.padding!r} give {expected}"
            )

    @property
    def axes(self) -> tuple["_Axis", ...]:
        """Rows and columns of a convolution; nothing of a dense product."""
        sizes = self.input_shape[:-1]
        kernel = self.mask.shape[: len(sizes)]
        return tuple(
            _Axis(*axis, padding=self.padding)
            for axis in zip(sizes, kernel, self.strides[: len(sizes)], strict=True)
        )

    @functools.cached_property
    def fan_out(self) -> np.ndarray:
        """[kh, kw, cin] or [cin]: active weights over the output channels, int64."""
        return np.count_nonzero(self.mask, axis=-1).astype(np.int64)

    @property
    def active_weights(self) -> int:
        return int(self.fan_out.sum())

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return self.mask.size

    @property
    def density(self) -> float:
        """Active share of the weights, in [0, 1]."""
        return self.active_weights / self.weights


@dataclasses.dataclass(frozen=True, eq=False)
class Activity:
    """What a layer of synapses receives in the T steps of one image, mean over images.

    Attributes:
      total: of the layer's input_shape, sum over time of the input values.
      nonzero: of the same shape, number of time steps with a non-zero input, in [0, T].
    """

    total: np.ndarray
    nonzero: np.ndarray


_Count = Callable[[Synapses, Convention], tuple[float, float]]  # (macs, acs) of one layer


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A convolution along rows or columns: input positions, kernel width, stride."""

    size: int
    kernel: int
    stride: int
    padding: Padding

    @property
    def outputs(self) -> int:
        """Number of output positions (tf.nn.convolution)."""
        if self.padding == "same":
            return -(-self.size // self.stride)
        return max(0, (self.size - self.kernel) // self.stride + 1)

    def meets(self) -> np.ndarray:
        """[size, kernel]: 1 where some output position lays kernel offset i on input position p.

        Output y reads p = y . stride + i - before, with the SAME rule's smaller half of the padding
        in front; so (p + before - i) / stride must be a whole number in [0, outputs).
        """
        before = 0
        if self.padding == "same":
            before = max(0, (self.outputs - 1) * self.stride + self.kernel - self.size) // 2
        y, rest = np.divmod(
            np.arange(self.size)[:, None] + before - np.arange(self.kernel)[None, :], self.stride
        )
        return ((rest == 0) & (y >= 0) & (y < self.outputs)).astype(np.int64)


def taps(synapses: Synapses, convention: Convention) -> np.ndarray:
    """Active weights that one unit of input meets at each position: an array of input_shape.

    Whole numbers (int64) in the exact convention, a float64 mean over positions in the padded one.

    Raises:
      ValueError: the convention is neither "padded" nor "exact".
    """
    _check_choice("convention", convention, CONVENTIONS)
    if not synapses.axes:
        return synapses.fan_out
    if convention == "exact":
        rows, columns = (axis.meets() for axis in synapses.axes)
        return np.einsum("hi,wj,ijc->hwc", rows, columns, synapses.fan_out, optimize=True)
    inputs, outputs = _positions(synapses.input_shape), _positions(synapses.output_shape)
    per_channel = synapses.fan_out.sum(axis=(0, 1)) * outputs / inputs
    return np.broadcast_to(per_channel, synapses.input_shape)


def macs(synapses: Synapses, convention: Convention) -> int:
    """Multiply-accumulates of one pass, zeros among the inputs included."""
    if convention == "padded":
        return synapses.active_weights * _positions(synapses.output_shape)
    return int(taps(synapses, convention).sum())


def acs(synapses: Synapses, activity: Activity, convention: Convention) -> float:
    """Accumulates in all T steps: the sum of total . taps.

    For binary spikes each spike times its fan-out; for pooled inputs the rate times the MACs. An
    activity that is not of the layer's input_shape raises ValueError.
    """
    return _weighted_taps(synapses, activity.total, convention)


def nonzero_macs(synapses: Synapses, activity: Activity, convention: Convention) -> float:
    """Multiply-accumulates in all T steps if zero inputs cost nothing: the sum of nonzero . taps.

    NeuroBench's count for inputs that are not binary. Raises ValueError as `acs` does.
    """
    return _weighted_taps(synapses, activity.nonzero, convention)


def ann_costs(layers: Sequence[Synapses], dense: Sequence[Synapses] | None = None) -> dict[str, Any]:
    """Costs of one pass of an ANN: the record described in the module's docstring.

    Args:
      layers: the network's synapses, at least one.
      dense: the same layers before channels were cut out; their sizes alone matter, they are the
        denominators. None: `layers` themselves, with every weight active.

    Raises:
      ValueError: `dense` does not name the same layers in the same order.
    """
    return _network_record(layers, dense, {"default": lambda s, convention: (macs(s, convention), 0.0)})


def snn_costs(
    layers: Sequence[Synapses],
    activities: Mapping[str, Activity],
    timesteps: int,
    neurons: int,
    dense: Sequence[Synapses] | None = None,
) -> dict[str, Any]:
    """Costs of an SNN for one image of T steps: the record described in the module's docstring.

    Args:
      layers, dense: as in `ann_costs`.
      activities: by layer name; layers that read the image need none.
      timesteps: T.
      neurons: number of all spiking neurons of the network.

    Raises:
      ValueError: an activity is missing or not of its layer's input_shape, or `dense` does not name
        the same layers in the same order.
    """
    missing = [s.name for s in layers if s.source != "image" and s.name not in activities]
    if missing:
        raise ValueError(f"activities: missing for {', '.join(missing)}")
    counts = {
        name: functools.partial(_spiking_operations, activities, int(timesteps), variant)
        for name, variant in VARIANTS.items()
    }
    return _network_record(layers, dense, counts) | {"neuron_updates": int(neurons) * int(timesteps)}


def _spiking_operations(
    activities: Mapping[str, Activity],
    timesteps: int,
    variant: Variant,
    synapses: Synapses,
    convention: Convention,
) -> tuple[float, float]:
    if synapses.source == "image":
        return macs(synapses, convention) * (timesteps if variant.image_every_step else 1), 0.0
    activity = activities[synapses.name]
    if synapses.source == "pooled" and variant.pooled_as_macs:
        return nonzero_macs(synapses, activity, convention), 0.0
    return 0, acs(synapses, activity, convention)


def _network_record(
    layers: Sequence[Synapses], dense: Sequence[Synapses] | None, counts: Mapping[str, _Count]
) -> dict[str, Any]:
    uncut = layers if dense is None else dense
    if [s.name for s in layers] != [s.name for s in uncut]:
        raise ValueError("dense: must name the same layers as the network, in the same order")
    full = [dataclasses.replace(s, mask=np.broadcast_to(np.True_, s.mask.shape)) for s in uncut]
    rows = [
        {"name": s.name, "source": s.source} | _record([s], [f], counts)
        for s, f in zip(layers, full, strict=True)
    ]
    return _record(layers, full, counts) | {"layers": rows}


def _record(
    layers: Sequence[Synapses], full: Sequence[Synapses], counts: Mapping[str, _Count]
) -> dict[str, Any]:
    """The record of these layers together: of one for its row, of all for the network."""
    weights = sum(s.weights for s in full)
    active = sum(s.active_weights for s in layers)
    conventions = {c: _convention_record(layers, full, counts, c) for c in CONVENTIONS}
    return {
        "weights": weights,
        "active_weights": active,
        "density": active / weights,
        "compression": weights / active if active else None,
        "mac_density": conventions["padded"]["mac_density"],
        **conventions["padded"]["variants"]["default"],
        "conventions": conventions,
    }


def _convention_record(
    layers: Sequence[Synapses],
    full: Sequence[Synapses],
    counts: Mapping[str, _Count],
    convention: Convention,
) -> dict[str, Any]:
    one_pass = sum(macs(s, convention) for s in layers)
    dense = sum(macs(s, convention) for s in full)
    variants = {}
    for variant, count in counts.items():
        total_macs, total_acs = map(sum, zip(*(count(s, convention) for s in layers), strict=True))
        energy = {name: total_macs * e.mac_pj + total_acs * e.ac_pj for name, e in ENERGY.items()}
        variants[variant] = {"macs": total_macs, "acs": total_acs, "energy_pj": energy}
    return {
        "one_pass_macs": one_pass,
        "dense_macs": dense,
        "mac_density": one_pass / dense,
        "variants": variants,
    }


def _weighted_taps(synapses: Synapses, values: np.ndarray, convention: Convention) -> float:
    if values.shape != tuple(synapses.input_shape):
        raise ValueError(
            f"{synapses.name}: an activity of shape {values.shape} does not fit inputs of shape "
            f"{tuple(synapses.input_shape)}"
        )
    return float(np.sum(np.multiply(values, taps(synapses, convention), dtype=np.float64)))


def _positions(shape: tuple[int, ...]) -> int:
    """Positions of a map; 1 for a vector."""
    return int(np.prod(shape[:-1], dtype=np.int64))


def _check_choice(argument: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{argument} is {value!r}; allowed are {', '.join(allowed)}")
