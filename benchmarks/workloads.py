"""The two workloads that every library runs: networks, weights, images. NumPy only.

W1 is a small VGG at T = 8 and batch 32, W2 is VGG16 with the 4096-4096 head at T = 5 and batch 16; both
on images of 32×32, ten classes, without bias or batch norm. Neurons have leak 0.9, v_th 1, soft reset
and a triangle surrogate of height 0.3; the loss is cross entropy, the optimizer Adam at 1e-4.

Shapes are those of the channels-first libraries: images [B, C, H, W], kernels of convolutions [out, in,
3, 3], of products [out, in].
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

POOL = "P"
SIDE, CHANNELS, CLASSES = 32, 3, 10
LEAK, V_TH, SURROGATE_SCALE, LEARNING_RATE = 0.9, 1.0, 0.3, 1e-4


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or a product: inputs and outputs, and the side of the map it is applied to."""

    inputs: int
    outputs: int
    side: int
    kernel: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network and how it is run.

    Attributes:
      convolutions: widths of 3×3 convolutions, `POOL` a 2×2 average pool.
      head: widths of the products before the logits.
      gain: factor on He's standard deviation; with it spikes reach the last layer.
      timesteps: T.
      batch: images in a step.
      logits: the first two of the first image, exact neuron, float32.
    """

    convolutions: tuple[int | str, ...]
    head: tuple[int, ...]
    gain: float
    timesteps: int
    batch: int
    logits: tuple[float, float]

    def layers(self) -> Iterator[Layer]:
        """Synapse layers in order; products have kernel 1 and side 1."""
        inputs, side = CHANNELS, SIDE
        for width in self.convolutions:
            if width == POOL:
                side //= 2
            else:
                yield Layer(inputs, width, side, kernel=3)
                inputs = width
        inputs *= side**2
        for width in (*self.head, CLASSES):
            yield Layer(inputs, width, side=1, kernel=1)
            inputs = width

    def weights(self) -> list[np.ndarray]:
        """He-normal kernels times `gain`, float32, from seed 0, one layer after the other."""
        rng = np.random.default_rng(0)
        kernels = []
        for layer in self.layers():
            window = (3, 3) if layer.kernel == 3 else ()
            fan_in = layer.inputs * layer.kernel**2
            deviation = np.float32(self.gain * np.sqrt(2.0 / fan_in))
            shape = (layer.outputs, layer.inputs, *window)
            kernels.append(rng.standard_normal(shape, dtype=np.float32) * deviation)
        return kernels

    def examples(self) -> tuple[np.ndarray, np.ndarray]:
        """Images, standard normal float32 [B, C, H, W], and labels int64 [B], from seed 1."""
        rng = np.random.default_rng(1)
        images = rng.standard_normal((self.batch, CHANNELS, SIDE, SIDE), dtype=np.float32)
        return images, rng.integers(0, CLASSES, self.batch)


WORKLOADS = {
    "W1": Workload(
        convolutions=(32, 32, POOL, 64, 64, POOL, 128, 128, POOL),
        head=(256,),
        gain=1.4,
        timesteps=8,
        batch=32,
        logits=(2.2725, 0.2737),
    ),
    "W2": Workload(
        convolutions=(
            *(64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL),
            *(512, 512, 512, POOL, 512, 512, 512),
        ),
        head=(4096, 4096),
        gain=2.0,
        timesteps=5,
        batch=16,
        logits=(-0.6361, 0.4870),
    ),
}


def channels_last(kernels: list[np.ndarray]) -> list[np.ndarray]:
    """`Workload.weights` for images [B, H, W, C]: kernels [3, 3, in, out] and [in, out].

    The first product's rows go from the order channel, row, column to row, column, channel.
    """
    turned = []
    channels = CHANNELS
    for before, kernel in zip([None, *kernels], kernels, strict=False):
        if kernel.ndim == 4:
            turned.append(kernel.transpose(2, 3, 1, 0))
            channels = kernel.shape[0]
            continue
        if before is not None and before.ndim == 4:
            side = math.isqrt(kernel.shape[1] // channels)
            by_map = kernel.reshape(-1, channels, side, side)
            kernel = by_map.transpose(0, 2, 3, 1).reshape(kernel.shape)
        turned.append(kernel.T)
    return turned
