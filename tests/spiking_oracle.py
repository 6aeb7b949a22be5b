"""A spiking network walked in NumPy: one neuron, one tap and one time step after the other.

Maps are [H, W, C] of one image. Synapses are walked from their inputs outwards, so that what an input
value costs is counted where it is spent. Nothing of the package is used here.
"""

import dataclasses
import itertools
from fractions import Fraction

import numpy as np


@dataclasses.dataclass
class Count:
    """Operations of one layer of synapses, summed over images and time steps.

    `value` adds up input values times the taps they meet, `nonzero` the taps met by inputs that are
    not 0. The padded count spreads a channel's whole fan-out over the input positions.
    """

    value_exact: Fraction = Fraction(0)
    value_padded: Fraction = Fraction(0)
    nonzero_exact: int = 0
    nonzero_padded: Fraction = Fraction(0)


@dataclasses.dataclass
class Synapses:
    """A convolution [kh, kw, cin, cout] or a dense product [cin, cout]; zeros of `mask` are no taps."""

    name: str
    kernel: np.ndarray
    mask: np.ndarray
    strides: tuple[int, int] = (1, 1)
    padding: str = "same"

    def drive(self, x: np.ndarray, count: Count | None = None) -> np.ndarray:
        """The current that `x` gives, float64."""
        if x.ndim == 1:
            current = np.zeros(self.kernel.shape[1])
            for c in np.flatnonzero(x):
                current += x[c] * self.kernel[c]
                _add(count, x[c], met=np.count_nonzero(self.mask[c]), leaving=self.mask[c].sum())
            return current
        rows = _readers(x.shape[0], self.kernel.shape[0], self.strides[0], self.padding)
        columns = _readers(x.shape[1], self.kernel.shape[1], self.strides[1], self.padding)
        outputs = [1 + max(y for reader in axis for _, y in reader) for axis in (rows, columns)]
        current = np.zeros((*outputs, self.kernel.shape[3]))
        for h, w, c in zip(*np.nonzero(x), strict=True):
            met = 0
            for (i, y), (j, z) in itertools.product(rows[h], columns[w]):
                current[y, z] += x[h, w, c] * self.kernel[i, j, c]
                met += np.count_nonzero(self.mask[i, j, c])
            leaving = Fraction(int(self.mask[:, :, c].sum()) * outputs[0] * outputs[1], x[..., 0].size)
            _add(count, x[h, w, c], met, leaving)
        return current


def _add(count: Count | None, value: float, met: int, leaving) -> None:
    if count:
        count.value_exact += Fraction(float(value)) * int(met)
        count.value_padded += Fraction(float(value)) * Fraction(leaving)
        count.nonzero_exact += int(met)
        count.nonzero_padded += Fraction(leaving)


def _readers(size: int, kernel: int, stride: int, padding: str) -> list[list[tuple[int, int]]]:
    """For each input place: which kernel offset of which output lies upon it."""
    if padding == "same":
        outputs = -(-size // stride)
        front = max(0, (outputs - 1) * stride + kernel - size) // 2
    else:
        outputs, front = (size - kernel) // stride + 1, 0
    pairs = list(itertools.product(range(kernel), range(outputs)))
    return [[(i, y) for i, y in pairs if y * stride + i - front == place] for place in range(size)]


@dataclasses.dataclass
class Neurons:
    """Leaky integrate-and-fire neurons with soft reset; membranes are float32, as the package's are."""

    name: str
    v_th: float
    leak: float = 1.0
    membrane: np.ndarray | float = 0.0

    def step(self, current: np.ndarray) -> np.ndarray:
        """o[t] from I[t]."""
        u = np.float32(self.leak) * np.float32(self.membrane) + current.astype(np.float32)
        spikes = u > np.float32(self.v_th)
        self.membrane = u - np.float32(self.v_th) * spikes
        return spikes.astype(np.float64)


class Pool:
    """2×2 average pool; a last odd row or column is left out."""

    def step(self, x: np.ndarray) -> np.ndarray:
        height, width, channels = x.shape[0] // 2, x.shape[1] // 2, x.shape[2]
        pooled = np.zeros((height, width, channels))
        for y, z in itertools.product(range(height), range(width)):
            for i, j in itertools.product(range(2), range(2)):
                pooled[y, z] += x[2 * y + i, 2 * z + j] / 4
        return pooled


class Flatten:
    """Row-major, as Keras flattens."""

    def step(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(-1)


@dataclasses.dataclass
class Result:
    """What a chain does with one image: logits, inputs of synapses and spikes, both [T, ...] by name."""

    logits: np.ndarray
    inputs: dict[str, np.ndarray]
    spikes: dict[str, np.ndarray]


def run(chain: list, image: np.ndarray, timesteps: int, counts: dict[str, Count]) -> Result:
    """Presents `image` (standardised) for T steps to a chain of the classes above.

    `counts`, by name of synapses, is added to.
    """
    logits: np.ndarray | float = 0.0
    inputs: dict[str, list] = {}
    spikes: dict[str, list] = {}
    for layer in chain:
        if isinstance(layer, Neurons):
            layer.membrane = 0.0
    for _ in range(timesteps):
        x = image
        for layer in chain:
            if isinstance(layer, Synapses):
                inputs.setdefault(layer.name, []).append(x)
                x = layer.drive(x, counts.setdefault(layer.name, Count()))
            else:
                x = layer.step(x)
            if isinstance(layer, Neurons):
                spikes.setdefault(layer.name, []).append(x)
        logits = logits + x
    return Result(
        logits,
        {name: np.array(train) for name, train in inputs.items()},
        {name: np.array(train) for name, train in spikes.items()},
    )
