"""What looks wrong in a training, and what helps.

Layers that never or always fire, spikes that end before the output, parameters at their lower bound, a
loss at rest.
"""

import statistics
from collections.abc import Mapping

import numpy as np

from snn_tf.config import COMPRESS, TRAIN_ANN, TRAIN_SNN

STILL = 0.95
"""A loss that never falls below this share of its first value has not moved."""

ENOUGH_STEPS = 50
"""A loss may rest for the first steps, however few an epoch has."""

_LOWER_V_TH = "lower --v_th_scale (calibrated v_th), raise --initial_membrane (--activation_levels)"
_LOSS_REMEDIES = {
    TRAIN_ANN: "raise --ann_learning_rate, or set --batch_norm or --warmup_epochs",
    COMPRESS: "raise --ann_learning_rate or --density, set --batch_norm, or change "
    "--density_schedule=constant to cubic",
    TRAIN_SNN: f"raise --snn_learning_rate or --surrogate_scale, or {_LOWER_V_TH}",
}

_BOUND_REMEDIES = {
    "v_th": "lower --snn_learning_rate, or set --train_v_th=false",
    "leak": "lower --snn_learning_rate, or set --train_leak=false",
    "clip": "lower --ann_learning_rate, or set --activation_levels=0",
}


def firing(rates: Mapping[str, float]) -> dict[str, str]:
    """A warning for every layer of neurons that never fires or always does, by layer name.

    Args:
      rates: spikes per neuron and time step, in [0, 1], by layer name.
    """
    found = {}
    for name, rate in rates.items():
        if rate == 0.0:
            found[name] = f"layer {name} never fires; {_LOWER_V_TH} or --timesteps"
        elif rate == 1.0:
            found[name] = f"layer {name} fires at every step; raise --v_th_scale (calibrated v_th)"
    return found


def silenced(rates: Mapping[str, float]) -> list[str]:
    """A warning if no spike reaches the output layer; rates as for `firing`, in the network's order."""
    if not rates or list(rates.values())[-1] > 0.0:
        return []
    first = next(name for name, rate in rates.items() if rate == 0.0)
    line = f"no spike reaches the output layer; the first silent layer is {first}"
    return [f"{line}; {_LOWER_V_TH}, or lower --snn_learning_rate"]


def at_bounds(parameters: Mapping[str, Mapping[str, float]], least: float) -> list[str]:
    """A warning for each kind of parameter that training has brought to the least it may be.

    A leak of 1, its upper bound, is nothing to warn of: every SNN starts there.

    Args:
      parameters: float32 values by kind and layer name, see `snn_tf.graph.neuron_parameters`.
      least: their lower bound.
    """
    found = []
    for kind, remedy in _BOUND_REMEDIES.items():
        # A parameter holds the bound as float32 does, which may be more.
        names = [name for name, value in parameters[kind].items() if value <= least * (1 + 1e-6)]
        if names:
            line = f"{kind} of {', '.join(names)} is at its lower bound, {least:g}"
            found.append(f"{line}; {remedy}")
    return found


def below_bound(v_th: Mapping[str, float], least: float) -> list[str]:
    """A warning if a conversion has made thresholds that training may not keep.

    Args:
      v_th: float32 values by layer name.
      least: their lower bound in training.
    """
    names = [name for name, value in v_th.items() if value < np.float32(least)]
    if not names:
        return []
    line = f"v_th of {', '.join(names)} is below {least:g}, to which training raises it"
    return [f"{line}; raise --v_th_scale or --weight_rms"]


class Watch:
    """Follows a stage's training, and says each thing once.

    Args:
      stage: its name.
      classes: number of classes of the data.
    """

    def __init__(self, stage: str, classes: int):
        self.stage, self.classes = stage, classes
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.epochs = 0
        self.said: set[str] = set()

    def saw(self, loss: float, accuracy: float) -> None:
        """Takes the loss and the accuracy, in [0, 1], of a training step."""
        self.losses.append(loss)
        self.accuracies.append(accuracy)

    def end_epoch(self, rates: Mapping[str, float], step: int) -> list[str]:
        """The new warnings after an epoch that ended with `step`; rates are of the validation images."""
        self.epochs += 1
        warnings = [*firing(rates).values()]
        if self.epochs >= 2 and step >= ENOUGH_STEPS and self.losses and self._rests():
            # Figures would make it another sentence after every epoch.
            warnings.append(f"the loss does not move; {_LOSS_REMEDIES[self.stage]}")
        return [f"{self.stage}: warning: {warning}" for warning in self._new(warnings)]

    def once(self, step: int, warnings: list[str]) -> list[str]:
        """Those of the warnings that have not been said, with the step."""
        return [f"{self.stage}: warning: step {step}: {warning}" for warning in self._new(warnings)]

    def _rests(self) -> bool:
        """Whether the loss has not moved, though the network had not learnt before."""
        still = min(self.losses) > STILL * self.losses[0]
        halfway_from_chance = (1.0 + 1.0 / self.classes) / 2.0
        return still and statistics.mean(self.accuracies) < halfway_from_chance

    def _new(self, warnings: list[str]) -> list[str]:
        new = [warning for warning in warnings if warning not in self.said]
        self.said.update(new)
        return new
