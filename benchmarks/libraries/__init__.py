"""Each library's way through a workload: one module each, with `entrant(workload, variant) -> Entrant`.

A module imports its framework and library at the top, so that importing it is what importing them costs.
A variant is a set of words, joined by "+"; each module says which it knows.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A library's network with a workload's weights, ready to run.

    Attributes:
      train_step: one training step on the workload's batch; returns the loss.
      infer: logits [B, classes] of the workload's batch.
      device: the GPU's name; empty for the CPU.
      device_peak_mib: the most memory held on the GPU so far; 0 for the CPU.
    """

    train_step: Callable[[], float]
    infer: Callable[[], np.ndarray]
    device: str
    device_peak_mib: Callable[[], float]
