"""Norse: `LIFBoxCell`, the neuron without a synapse's own current, one time step at a call."""

import torch
from norse.torch.functional.lif_box import LIFBoxParameters
from norse.torch.functional.reset import reset_subtract
from norse.torch.module.lif_box import LIFBoxCell
from norse.torch.module.sequential import SequentialState
from torch import nn

from libraries import Entrant, torch_steps
from workloads import LEAK, SURROGATE_SCALE, V_TH, Workload

_DT = 1e-3  # seconds


class _Neuron(nn.Module):
    """A box neuron with trained leak and threshold.

    Norse multiplies the input current by dt/τ = 1 − leak too; dividing by it gives the common neuron.
    """

    def __init__(self):
        super().__init__()
        self.tau_mem_inv = nn.Parameter(torch.tensor((1.0 - LEAK) / _DT))
        self.v_th = nn.Parameter(torch.tensor(V_TH))
        parameters = LIFBoxParameters(
            tau_mem_inv=self.tau_mem_inv,
            v_th=self.v_th,
            method="triangle",
            alpha=SURROGATE_SCALE,
            reset_method=reset_subtract,
        )
        self.cell = LIFBoxCell(parameters, dt=_DT)

    def forward(self, current, state=None):
        return self.cell(current / (_DT * self.tau_mem_inv), state)


def entrant(workload: Workload, variant: str) -> Entrant:
    """See `libraries`; variants as in `torch_steps`."""
    network = SequentialState(*torch_steps.modules(workload, torch_steps.Layers(_Neuron)))

    def logits(images: torch.Tensor) -> torch.Tensor:
        total, state = 0.0, None
        for _ in range(workload.timesteps):
            currents, state = network(images, state)
            total = total + currents
        return total

    return torch_steps.entrant(workload, variant, network, logits)
