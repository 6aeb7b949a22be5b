"""snnTorch: `Leaky` with trained beta and threshold, one time step at a call.

Its reset by subtraction comes one step later than the others'.
"""

import snntorch
import torch
from snntorch import surrogate
from torch import nn

from libraries import Entrant, torch_steps
from workloads import LEAK, V_TH, Workload


def _neuron() -> nn.Module:
    return snntorch.Leaky(
        beta=LEAK,
        threshold=V_TH,
        learn_beta=True,
        learn_threshold=True,
        spike_grad=surrogate.triangular(),
        reset_mechanism="subtract",
    )


def entrant(workload: Workload, variant: str) -> Entrant:
    """See `libraries`; variants as in `torch_steps`."""
    network = nn.ModuleList(torch_steps.modules(workload, torch_steps.Layers(_neuron)))
    neurons = [module for module in network if isinstance(module, snntorch.Leaky)]

    def logits(images: torch.Tensor) -> torch.Tensor:
        membranes = [neuron.init_leaky() for neuron in neurons]

        def step(x: torch.Tensor) -> torch.Tensor:
            fired = 0
            for module in network:
                if isinstance(module, snntorch.Leaky):
                    x, membranes[fired] = module(x, membranes[fired])
                    fired += 1
                else:
                    x = module(x)
            return x

        return sum(step(images) for _ in range(workload.timesteps))

    return torch_steps.entrant(workload, variant, network, logits)
