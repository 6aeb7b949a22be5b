"""What the PyTorch libraries share: their layers in a workload's order, its weights, and the steps.

Variants: "compile" (torch.compile), "bfloat16" (autocast) and "channels_last", in any combination;
"eager" for none of them.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import nn

from libraries import Entrant
from workloads import LEARNING_RATE, POOL, Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
torch.set_num_interop_threads(1)


class Layers:
    """How a library makes each kind of layer.

    Args:
      neuron: makes a layer of spiking neurons.
      convolution, product, pool, flatten: as in `torch.nn`.
    """

    def __init__(
        self,
        neuron: Callable[[], nn.Module],
        convolution=nn.Conv2d,
        product=nn.Linear,
        pool=nn.AvgPool2d,
        flatten=nn.Flatten,
    ):
        self.neuron, self.convolution, self.product = neuron, convolution, product
        self.pool, self.flatten = pool, flatten


def modules(workload: Workload, layers: Layers) -> list[nn.Module]:
    """The workload's network with its weights, from the image to each step's share of the logits."""
    kernels = iter(zip(workload.layers(), workload.weights(), strict=True))
    made: list[nn.Module] = []
    for width in workload.convolutions:
        if width == POOL:
            made.append(layers.pool(2))
            continue
        layer, kernel = next(kernels)
        convolution = layers.convolution(layer.inputs, layer.outputs, 3, padding=1, bias=False)
        made += [_with_kernel(convolution, kernel), layers.neuron()]
    made.append(layers.flatten())
    for layer, kernel in kernels:
        product = layers.product(layer.inputs, layer.outputs, bias=False)
        made += [_with_kernel(product, kernel), layers.neuron()]
    return made[:-1]  # the logits' neurons do not fire


def _with_kernel(module: nn.Module, kernel) -> nn.Module:
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(kernel))
    return module


def entrant(
    workload: Workload,
    variant: str,
    network: nn.Module,
    logits: Callable[[torch.Tensor], torch.Tensor],
    reset: Callable[[], None] = lambda: None,
) -> Entrant:
    """The steps of a network.

    Args:
      workload: its batch.
      variant: see the module.
      network: holds all that is trained.
      logits: images [B, C, H, W] → logits [B, classes].
      reset: brings the neurons to rest; called before every pass.
    """
    words = set(variant.split("+"))
    layout = torch.channels_last if "channels_last" in words else torch.contiguous_format
    network.to(device=DEVICE, memory_format=layout)
    images, labels = (torch.from_numpy(array).to(DEVICE) for array in workload.examples())
    images = images.contiguous(memory_format=layout)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    forward = torch.compile(logits) if "compile" in words else logits

    @contextlib.contextmanager
    def precision() -> Iterator[None]:
        with torch.autocast(DEVICE, torch.bfloat16, enabled="bfloat16" in words):
            yield

    def train_step() -> float:
        optimizer.zero_grad(set_to_none=True)
        reset()
        with precision():
            loss = nn.functional.cross_entropy(forward(images).float(), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    def infer():
        reset()
        with torch.no_grad(), precision():
            return forward(images).float().cpu().numpy()

    on_gpu = DEVICE == "cuda"
    return Entrant(
        train_step,
        infer,
        torch.cuda.get_device_name() if on_gpu else "",
        lambda: torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0,
    )
