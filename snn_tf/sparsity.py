"""Masks of single weights: from scores and magnitudes to boolean masks with exact counts.

Holds sparse learning (drop by magnitude, regrow by score; Dettmers & Zettlemoyer 2019) and the global
magnitude cut. Everything is a pure function of NumPy arrays in dicts by layer name; the layers' order
is that of `Budget.sizes`. A mask has its kernel's shape, True where a weight is active. Equal values
are taken in the order of their index, equal layers in the network's order, so that the same input
gives the same masks. Whole channels are in `channels`; wrappers and variables are in `pruning`.
"""

import bisect
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from snn_tf.budget import Budget, Churn, Counts, common_counts, plan_update
from snn_tf.errors import UserError

Masks = dict[str, np.ndarray]


def active_counts(masks: Mapping[str, np.ndarray]) -> Counts:
    """Active weights of each layer."""
    return {name: int(np.count_nonzero(mask)) for name, mask in masks.items()}


def drop_fraction(step: int, last_step: int, first: float, last: float) -> float:
    """Share p of the active weights that the update at `step` drops.

    A cosine from `first` at step 0 to `last` at `last_step`; 0 afterwards, when masks are fixed.
    """
    if step > last_step:
        return 0.0
    progress = step / max(last_step, 1)
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def initial_masks(
    shapes: Mapping[str, tuple[int, ...]],
    budget: Budget,
    rng: np.random.Generator,
    output_layer: str,
) -> Masks:
    """Random masks of one common density, except where a layer's floor is above it.

    Args:
      shapes: kernel shapes.
      budget: the total is met exactly if it counts weights; otherwise what is left of it is less than
        the cost of the cheapest inactive weight.
      rng: drawn from in the layers' order.
      output_layer: layer whose last axis is the classes; each class keeps at least one weight.
    """
    counts = common_counts(budget)
    return {
        name: _random_mask(shapes[name], counts[name], rng, name == output_layer)
        for name in budget.sizes
    }


def update_masks(
    weights: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    budget: Budget,
    p: float,
    output_layer: str,
) -> tuple[Masks, Churn]:
    """Drops the smallest active weights and regrows as much where the scores ask for it.

    A layer loses the share p of its active weights, but no more than it had inactive ones and never
    falls under its floor; the largest weight into each class stays. What is freed, and what was left of
    the budget, is shared in proportion to the layers' mean |score| over active weights, and grown at
    the largest |score| among the weights that were inactive before the drop. If those are used up or
    too dear for the rest, fewer weights are dropped instead, so that what is left is less than the cost
    of the cheapest inactive weight (nothing, if weights are counted).

    Args:
      weights: kernels W.
      scores: m, of the kernels' shapes: moving average of the loss's gradient by every weight.
      masks: the masks so far.
      budget: cost that may be active.
      p: share dropped, in [0, 1].
      output_layer: layer whose last axis is the classes.

    Returns:
      The new masks, and what changed. Inputs are left as they are.

    Raises:
      UserError: weights or scores are not finite.
      ValueError: the masks hold more than the budget.
    """
    _check_finite(weights, "weights")
    _check_finite(scores, "scores")
    churn = plan_update(_contributions(scores, masks), active_counts(masks), budget, p)
    updated = {}
    for name in budget.sizes:
        active, magnitude = masks[name], np.abs(weights[name])
        droppable = active
        if name == output_layer:
            droppable = active & ~_largest_per_class(magnitude, active)
        drop = _smallest(magnitude, droppable, churn.dropped[name])
        grow = _smallest(-np.abs(scores[name]), ~active, churn.grown[name])
        updated[name] = (active & ~drop) | grow
    return updated, churn


def magnitude_masks(weights: Mapping[str, np.ndarray], budget: Budget, output_layer: str) -> Masks:
    """One cut through the magnitudes of all layers, compared as float32.

    Each layer keeps the largest weights of its floor, the output layer the largest into each class.
    Then the largest of all the others follow, those skipped that cost more than what is left. The
    total is met exactly if the budget counts weights; otherwise what is left of it is less than the
    cost of the cheapest inactive weight.

    Raises:
      UserError: weights are not finite.
    """
    _check_finite(weights, "weights")
    masks, ranks = {}, {}
    for name, floor in budget.floors.items():
        magnitude = np.abs(weights[name]).astype(np.float32)
        keep = np.zeros(magnitude.shape, bool)
        if name == output_layer:
            keep = _largest_per_class(magnitude, ~keep)
        keep |= _smallest(-magnitude, ~keep, floor - int(np.count_nonzero(keep)))
        # Bit patterns of floats that are not negative have the order of the floats.
        masks[name], ranks[name] = keep, np.where(keep, np.int32(-1), magnitude.view(np.int32))
    gap = _take_above_cut(ranks, masks, budget)
    _take_what_fits(ranks, masks, budget, gap)
    return masks


def _check_finite(arrays: Mapping[str, np.ndarray], what: str) -> None:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"layer {name}: {what} are not finite, no mask can be made of them")


def _contributions(
    scores: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]
) -> dict[str, Fraction]:
    """s_l: mean |m| over a layer's active weights; 0 for a layer with none."""
    return {
        name: Fraction(float(np.abs(scores[name][mask]).mean(dtype=np.float64)) if mask.any() else 0)
        for name, mask in masks.items()
    }


def _random_mask(
    shape: tuple[int, ...], count: int, rng: np.random.Generator, every_class: bool
) -> np.ndarray:
    """`count` random weights; with `every_class`, at least one for each index of the last axis."""
    mask = np.zeros((math.prod(shape[:-1]), shape[-1]), bool)
    if every_class:
        mask[rng.integers(mask.shape[0], size=mask.shape[1]), np.arange(mask.shape[1])] = True
    inactive = np.flatnonzero(~mask)
    more = count - int(np.count_nonzero(mask))
    mask.flat[rng.choice(inactive, more, replace=False, shuffle=False)] = True
    return mask.reshape(shape)


def _smallest(values: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """Flags the `count` smallest values among those flagged, ties to the lower index."""
    chosen = np.zeros(among.shape, bool)
    if count:
        candidates = values[among]
        cut = np.partition(candidates, count - 1)[count - 1]
        taken = candidates < cut
        ties = np.flatnonzero(candidates == cut)
        taken[ties[: count - int(np.count_nonzero(taken))]] = True
        chosen[among] = taken
    return chosen


def _largest_per_class(magnitude: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Flags, for each index of the last axis, the largest magnitude among those flagged, if any."""
    classes = magnitude.shape[-1]
    values = np.where(among, magnitude, -1).reshape(-1, classes)
    best = np.zeros(values.shape, bool)
    best[values.argmax(axis=0), np.arange(classes)] = True
    return best.reshape(magnitude.shape) & among


def _take_above_cut(ranks: Mapping[str, np.ndarray], masks: Masks, budget: Budget) -> int:
    """Adds the largest ranks to `masks` down to the first that does not fit; returns the cost left.

    Ranks are whole numbers from 0, or -1 where the mask is True. Of those equal to the first that does
    not fit, as many are added as fit.
    """
    gap = budget.target - budget.cost(active_counts(masks))

    def fits(cut: int) -> bool:
        return budget.cost(active_counts({name: rank >= cut for name, rank in ranks.items()})) <= gap

    cut = bisect.bisect_left(range(2**31), True, key=fits)
    for name, rank in ranks.items():
        masks[name] |= rank >= cut
    gap = budget.target - budget.cost(active_counts(masks))
    for name, rank in ranks.items():
        tied = (rank == cut - 1) & ~masks[name]
        count = min(int(np.count_nonzero(tied)), gap // budget.unit_costs[name])
        masks[name] |= _smallest(rank, tied, count)
        gap -= count * budget.unit_costs[name]
    return gap


def _take_what_fits(ranks: Mapping[str, np.ndarray], masks: Masks, budget: Budget, gap: int) -> None:
    """Adds the largest ranks to `masks` one by one, skipping what costs more than is left.

    `gap` is less than the dearest weight's cost, so that few come into question.
    """
    candidates: list[tuple[int, str, int]] = []
    for name, rank in ranks.items():
        inactive = ~masks[name]
        count = min(int(np.count_nonzero(inactive)), gap // budget.unit_costs[name])
        best = np.flatnonzero(_smallest(-rank, inactive, count))
        candidates += [(int(rank.flat[i]), name, int(i)) for i in best]
    for _, name, index in sorted(candidates, key=lambda candidate: -candidate[0]):
        if budget.unit_costs[name] <= gap:
            masks[name].flat[index] = True
            gap -= budget.unit_costs[name]
