"""PyTorch without a library: time folded into the batch, the neuron's equations in a loop over T."""

import torch
from torch import nn

from libraries import Entrant, torch_steps
from workloads import LEAK, SURROGATE_SCALE, V_TH, Workload


class _Fire(torch.autograd.Function):
    """1 where z > 0; a triangle for its derivative."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, d_spikes):
        (z,) = ctx.saved_tensors
        return d_spikes * SURROGATE_SCALE * (1.0 - z.abs()).clamp(min=0.0)


class _Neuron(nn.Module):
    """Currents [T·B, ...] → spikes [T·B, ...], time-major."""

    def __init__(self, timesteps: int):
        super().__init__()
        self.timesteps = timesteps
        self.leak, self.v_th = (nn.Parameter(torch.tensor(value)) for value in (LEAK, V_TH))

    def forward(self, currents):
        membrane, fired = 0.0, []
        for current in currents.unflatten(0, (self.timesteps, -1)):
            membrane = self.leak * membrane + current
            spikes = _Fire.apply(membrane / self.v_th - 1.0)
            membrane = membrane - self.v_th * spikes.detach()
            fired.append(spikes)
        return torch.cat(fired)


def entrant(workload: Workload, variant: str) -> Entrant:
    """See `libraries`; variants as in `torch_steps`."""
    timesteps = workload.timesteps
    layers = torch_steps.Layers(lambda: _Neuron(timesteps))
    network = nn.Sequential(*torch_steps.modules(workload, layers))

    def logits(images: torch.Tensor) -> torch.Tensor:
        currents = network(images.repeat(timesteps, 1, 1, 1))
        return currents.unflatten(0, (timesteps, -1)).sum(0)

    return torch_steps.entrant(workload, variant, network, logits)
