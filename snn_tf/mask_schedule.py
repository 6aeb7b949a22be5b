"""When masks change over a student's training, and what density and exchange each update has."""

import itertools
import math

from snn_tf import budget as budgets
from snn_tf import sparsity
from snn_tf.config import PUBLISHED_SCHEDULES, Config
from snn_tf.errors import UsageError
from snn_tf.pruning import sparsity_schedule

_TOO_STEEP = 0.25
_MANY_UPDATES = 50  # even to density 1e-4 none of so many is too steep


class MaskSchedule:
    """The steps of a `compress` stage after which masks are updated.

    Attributes:
      interval: steps between updates.
      total_steps: the stage's length.
      last_update: step after which masks are fixed; 0 if there is no update.
      falls: whether the density falls from 1 to `--density`, instead of holding.
      starts_dense: whether all weights are active until the first update.
      of_tfmot: the same densities as tfmot's wrappers take them.
    """

    def __init__(self, config: Config, steps_per_epoch: int):
        """Raises `UsageError` if the stage is shorter than the interval."""
        self.config = config
        self.interval = config.mask_update or steps_per_epoch
        self.total_steps = config.compress_epochs * steps_per_epoch
        if self.interval > self.total_steps:
            raise UsageError(
                f"--mask_update={self.interval}: must be at most the stage's {self.total_steps} steps"
            )
        last = budgets.exact(config.mask_update_end) * self.total_steps
        published = PUBLISHED_SCHEDULES[config.method]
        kind = published if config.density_schedule == "auto" else config.density_schedule
        self.falls = kind == "cubic"
        self.starts_dense = self.falls or config.method.startswith("magnitude")
        # What starts dense cannot do without an update.
        updates = max(1 if self.starts_dense else 0, math.floor(last / self.interval))
        self.last_update = updates * self.interval
        self.of_tfmot = sparsity_schedule(
            kind, config.density, self.interval, max(self.last_update, self.interval)
        )

    def due(self, step: int) -> bool:
        """Whether masks change after `step` optimizer steps."""
        moving = self.falls or self.config.method != "random"
        return moving and step % self.interval == 0 and 0 < step <= self.last_update

    def density(self, step: int) -> float:
        """Density after the update at `step`, as `--density_schedule` says."""
        if not self.falls or step >= self.last_update:
            return self.config.density
        # tfmot's is of float32, and may go past its end by a rounding.
        return max(self.config.density, 1.0 - float(self.of_tfmot(step)[1]))

    def drop_fraction(self, step: int) -> float:
        """p of the update after `step` steps."""
        config = self.config
        return sparsity.drop_fraction(
            step, self.last_update, config.drop_fraction, config.drop_fraction_end
        )

    def misfits(self) -> list[str]:
        """Warnings: what the length of the stage has no room for, with what helps."""
        remedy = "raise --compress_epochs, or lower --mask_update"
        if self.starts_dense and self.last_update >= self.total_steps:
            line = f"the density reaches {self.config.density:g} after the last step, and nothing is "
            return [f"{line}trained at it; {remedy} or --mask_update_end"]
        if self.falls and (kept := self._least_kept()) < _TOO_STEEP:
            line = f"one mask update keeps {kept:.2f} of the active weights, which few networks survive"
            return [f"{line}; {remedy}, or raise --mask_update_end"]
        if self.config.method == "attention" and not self.last_update:
            return [f"no mask update fits, and masks stay random; {remedy}, or raise --mask_update_end"]
        return []

    def _least_kept(self) -> float:
        """Smallest quotient of the densities after and before an update, of a density that falls."""
        updates = range(self.interval, self.last_update + 1, self.interval)
        if len(updates) > _MANY_UPDATES:
            return 1.0
        densities = [1.0, *map(self.density, updates)]
        return min(after / before for before, after in itertools.pairwise(densities))
