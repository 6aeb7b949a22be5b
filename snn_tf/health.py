"""What looks wrong in a training, and what helps: layers that never or always fire, a loss at rest."""

from collections.abc import Mapping

from snn_tf.config import COMPRESS, TRAIN_ANN, TRAIN_SNN

STILL = 0.95
"""A loss that never falls below this share of its first value has not moved."""

_LOSS_REMEDIES = {
    TRAIN_ANN: "raise --ann_learning_rate, or set --batch_norm or --warmup_epochs",
    COMPRESS: "raise --ann_learning_rate or --density, or set --batch_norm or --density_schedule=cubic",
    TRAIN_SNN: "raise --snn_learning_rate or --surrogate_scale, or lower --v_th_scale",
}


def firing(rates: Mapping[str, float]) -> dict[str, str]:
    """A warning for every layer of neurons that never fires or always does, by layer name.

    Args:
      rates: spikes per neuron and time step, in [0, 1], by layer name.
    """
    found = {}
    for name, rate in rates.items():
        if rate == 0.0:
            found[name] = f"layer {name} never fires; lower --v_th_scale or raise --timesteps"
        elif rate == 1.0:
            found[name] = f"layer {name} fires at every step; raise --v_th_scale"
    return found


class Watch:
    """Follows a stage's training, and says each thing once."""

    def __init__(self, stage: str):
        self.stage = stage
        self.losses: list[float] = []
        self.epochs = 0
        self.said: set[str] = set()

    def saw(self, loss: float) -> None:
        """Takes the training loss of a step."""
        self.losses.append(loss)

    def end_epoch(self, rates: Mapping[str, float]) -> list[str]:
        """The warnings that are new after an epoch; rates are those of the validation images."""
        self.epochs += 1
        warnings = [*firing(rates).values()]
        first, best = self.losses[0], min(self.losses)
        if self.epochs >= 2 and best > STILL * first:
            # Figures would make it another sentence after every epoch.
            warnings.append(f"the loss does not move; {_LOSS_REMEDIES[self.stage]}")
        new = [warning for warning in warnings if warning not in self.said]
        self.said.update(new)
        return [f"{self.stage}: warning: {warning}" for warning in new]
