"""Operations of one layer of synapses: its active weights, and what an input meets there.

Two conventions, each used for multiply-accumulates (MACs) and accumulates (ACs) alike:

    padded   macs = active weights x output positions, zeros of the padding included; one unit of input
             of channel c is charged (active weights leaving c) x output positions / input positions
    exact    only taps that exist: an input position meets the kernel offsets that some output position
             lays upon it

`taps` holds both. With x[p] one unit of input at position p, macs = sum_p taps[p] and
acs = sum_p total[p] . taps[p], so a network whose neurons all fire at every step has acs = T . macs.
"""

import dataclasses
import functools
from typing import Literal, get_args

import numpy as np

from snn_tf.errors import check_choice

Convention = Literal["padded", "exact"]
Padding = Literal["same", "valid"]
Source = Literal["image", "spikes", "pooled"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


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
        check_choice("padding", self.padding, get_args(Padding))
        check_choice("source", self.source, get_args(Source))
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


@dataclasses.dataclass(frozen=True, eq=False)
class Activity:
    """What a layer of synapses receives in the T steps of one image (an ANN's: T = 1), mean over images.

    Attributes:
      total: of the layer's input_shape, sum over time of the input values.
      nonzero: of the same shape, number of time steps with a non-zero input, in [0, T].
    """

    total: np.ndarray
    nonzero: np.ndarray


def taps(synapses: Synapses, convention: Convention) -> np.ndarray:
    """Active weights that one unit of input meets at each position: an array of input_shape.

    Whole numbers (int64) in the exact convention, a float64 mean over positions in the padded one.

    Raises:
      ValueError: the convention is neither "padded" nor "exact".
    """
    check_choice("convention", convention, CONVENTIONS)
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

    NeuroBench's count for inputs that are not binary, of an ANN as of an SNN. Raises ValueError as
    `acs` does.
    """
    return _weighted_taps(synapses, activity.nonzero, convention)


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
