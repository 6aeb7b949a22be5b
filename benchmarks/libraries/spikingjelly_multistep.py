"""SpikingJelly in multi-step mode: `ParametricLIFNode`, whose leak is trained; soft reset.

It fires at u ≥ v_th, where the others need u > v_th, and leaks by u − u/τ.
"""

import torch
from loguru import logger
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from libraries import Entrant, torch_steps
from workloads import LEAK, V_TH, Workload

logger.remove()


def _neuron() -> nn.Module:
    return neuron.ParametricLIFNode(
        init_tau=1.0 / (1.0 - LEAK),
        decay_input=False,
        v_threshold=V_TH,
        v_reset=None,
        surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
        detach_reset=True,
    )


def entrant(workload: Workload, variant: str) -> Entrant:
    """See `libraries`; variants as in `torch_steps`."""
    layers = torch_steps.Layers(_neuron, layer.Conv2d, layer.Linear, layer.AvgPool2d, layer.Flatten)
    network = nn.Sequential(*torch_steps.modules(workload, layers))
    functional.set_step_mode(network, "m")

    def logits(images: torch.Tensor) -> torch.Tensor:
        return network(images.expand(workload.timesteps, *images.shape)).sum(0)

    return torch_steps.entrant(workload, variant, network, logits, lambda: functional.reset_net(network))
