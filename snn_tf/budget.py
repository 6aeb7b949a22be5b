"""How many weights of each layer may be active: what a density buys, and how layers share it.

Whole counts only, by layer name in the network's order; which weights they are is up to `sparsity`.
Densities are taken as the decimals they are written as, so that 0.29 of 100 is 29 and not 28, and
shares are exact fractions: equal layers tie, and ties go to the earlier one.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from snn_tf.errors import UsageError

Counts = dict[str, int]


def active_counts(masks: Mapping[str, np.ndarray]) -> Counts:
    """Active units by layer or group, from boolean masks."""
    return {name: int(np.count_nonzero(mask)) for name, mask in masks.items()}


def exact(fraction: float) -> Fraction:
    """The decimal a float is printed as, without its binary rounding error."""
    return Fraction(str(fraction))


def target_cost(density: float, full_cost: int, unit_costs: Iterable[int]) -> int:
    """Cost that may stay of `full_cost`, from `density` in (0, 1].

    Where every unit costs 1 the cost counts weights and is rounded (halves to even); otherwise it is
    the largest whole cost that does not exceed the density.
    """
    share = exact(density) * full_cost
    return round(share) if all(cost == 1 for cost in unit_costs) else math.floor(share)


def check_affordable(density: float, target: int, least: int, full_cost: int, keeps: str) -> None:
    """Raises `UsageError` with the smallest possible density if `target` is below `least`.

    Args:
      density: value of --density.
      target: cost that it buys.
      least: cost of what must stay in any case.
      full_cost: cost of everything.
      keeps: what must stay, in words.
    """
    if target < least:
        smallest = math.ceil(Fraction(least, full_cost) * 10**6) / 10**6
        raise UsageError(f"--density={density:g}: must be at least {smallest:g}, {keeps}")


@dataclass(frozen=True)
class Budget:
    """How many weights may be active, in total and at least in each layer.

    Attributes:
      sizes: weights of every prunable layer, in the network's order.
      unit_costs: cost of one weight: 1 if the density counts weights, the layer's output positions if
        it counts multiply-accumulates.
      density: share of the cost that is kept, in (0, 1].
      min_layer_density: no layer gets sparser than this, in [0, 1].
      protected: weights a layer needs for another reason: the number of classes in the output layer, all
        of a layer that stays dense, 0 elsewhere.

    Raises:
      UsageError: what every layer must keep costs more than the density allows.
    """

    sizes: Mapping[str, int]
    unit_costs: Mapping[str, int]
    density: float
    min_layer_density: float
    protected: Mapping[str, int]

    def __post_init__(self) -> None:
        least = f"--min_layer_density={self.min_layer_density:g}"
        keeps = f"what {least}, one weight per class and layers that stay dense need"
        check_affordable(self.density, self.target, self.cost(self.floors), self.cost(self.sizes), keeps)

    @property
    def target(self) -> int:
        """Cost of the active weights: reached exactly if weights are counted, else never exceeded."""
        return target_cost(self.density, self.cost(self.sizes), self.unit_costs.values())

    @property
    def floors(self) -> Counts:
        """Fewest active weights of each layer."""
        share = exact(self.min_layer_density)
        return {
            name: max(1, math.ceil(share * size), self.protected[name])
            for name, size in self.sizes.items()
        }

    def cost(self, counts: Mapping[str, int]) -> int:
        """Cost of so many weights in each layer."""
        return sum(count * self.unit_costs[name] for name, count in counts.items())


@dataclass(frozen=True)
class Churn:
    """How many weights of each layer an update drops and grows."""

    dropped: Counts
    grown: Counts


def common_counts(budget: Budget) -> Counts:
    """Active weights of each layer at one common density, except where a floor is above it.

    The total is met exactly if weights are counted; otherwise what is left of the target is less than
    the cost of the cheapest inactive weight.
    """
    return _whole(_common_density(budget), budget.sizes, budget, budget.target)


def plan_update(
    contributions: Mapping[str, Fraction],
    active: Counts,
    budget: Budget,
    p: float,
    room: Counts,
) -> Churn:
    """How many weights each layer loses and gains.

    Layer l offers max(0, min(floor(p active), room, active - floor_l)) weights. The cost they free,
    with what was left of the target, is shared in proportion to the contributions s_l, or to the room
    if no layer with room contributes; a layer grows no more than its room, and what overflows is shared
    again (largest remainder). If room ends before the cost does, layers lose fewer
    weights than they offered.

    Args:
      contributions: s_l.
      active: active weights of each layer.
      budget: cost that may be active.
      p: share offered, in [0, 1].
      room: weights that each layer may grow.

    Raises:
      ValueError: the active weights cost more than the target.
    """
    unspent = budget.target - budget.cost(active)
    if unspent < 0:
        raise ValueError(f"active weights cost {budget.cost(active)}, the target is {budget.target}")
    offered = {
        name: max(0, min(int(p * active[name]), room[name], active[name] - floor))
        for name, floor in budget.floors.items()
    }
    pool = unspent + budget.cost(offered)
    grown = shared_counts(contributions, room, budget, pool)
    kept = _fill(offered, budget, pool - budget.cost(grown))
    return Churn({name: count - kept[name] for name, count in offered.items()}, grown)


def shared_counts(
    contributions: Mapping[str, Fraction], room: Counts, budget: Budget, pool: int
) -> Counts:
    """Weights of each layer if cost `pool` is shared by contribution, within the room."""
    return _whole(_shares(contributions, room, budget, pool), room, budget, pool)


def _shares(
    contributions: Mapping[str, Fraction], room: Counts, budget: Budget, pool: int
) -> dict[str, Fraction]:
    """Weights of each layer if cost `pool` is shared by contribution, what overflows shared again."""
    quotas = dict.fromkeys(room, Fraction(0))
    capacity = {name: room[name] * budget.unit_costs[name] for name in room}
    open_layers = [name for name in room if room[name]]
    left = Fraction(pool)
    while open_layers:
        share = {name: contributions[name] for name in open_layers}
        if not any(share.values()):
            share = {name: Fraction(capacity[name]) for name in open_layers}
        level = left / sum(share.values(), Fraction(0))
        full = [name for name in open_layers if level * share[name] >= capacity[name]]
        if not full:
            return quotas | {n: level * share[n] / budget.unit_costs[n] for n in open_layers}
        quotas |= {name: Fraction(room[name]) for name in full}
        left -= sum(capacity[name] for name in full)
        open_layers = [name for name in open_layers if name not in full]
    return quotas


def _common_density(budget: Budget) -> dict[str, Fraction]:
    """Weights of each layer at the common density that meets the target, or the floor above it."""
    quotas = {name: Fraction(floor) for name, floor in budget.floors.items()}
    open_layers = list(budget.sizes)
    while True:
        fixed = {n: floor for n, floor in budget.floors.items() if n not in open_layers}
        full_cost = budget.cost({name: budget.sizes[name] for name in open_layers})
        density = Fraction(budget.target - budget.cost(fixed), full_cost)
        above = [name for name in open_layers if density * budget.sizes[name] >= quotas[name]]
        if above == open_layers:
            return quotas | {name: density * budget.sizes[name] for name in open_layers}
        open_layers = above


def _whole(
    quotas: Mapping[str, Fraction], capacity: Mapping[str, int], budget: Budget, pool: int
) -> Counts:
    """Whole counts near the quotas, by largest remainder, within capacity and the cost `pool`.

    After that, whatever still fits is added: no layer below its capacity has a weight that costs no
    more than what is left.
    """
    counts = {name: math.floor(quota) for name, quota in quotas.items()}
    gap = pool - budget.cost(counts)
    for name in sorted(quotas, key=lambda name: counts[name] - quotas[name]):
        if counts[name] < capacity[name] and budget.unit_costs[name] <= gap:
            counts[name] += 1
            gap -= budget.unit_costs[name]
    extra = _fill({name: capacity[name] - count for name, count in counts.items()}, budget, gap)
    return {name: count + extra[name] for name, count in counts.items()}


def _fill(room: Counts, budget: Budget, gap: int) -> Counts:
    """Weights that fit into cost `gap`, the dearest layers first, ties to the earlier one."""
    extra = dict.fromkeys(room, 0)
    for name in sorted(room, key=lambda name: -budget.unit_costs[name]):
        extra[name] = min(room[name], gap // budget.unit_costs[name])
        gap -= extra[name] * budget.unit_costs[name]
    return extra
