"""Masks of single weights: from scores and magnitudes to boolean masks with exact counts.

Holds sparse learning (drop by magnitude, regrow by score; Dettmers & Zettlemoyer 2019), the cut through
all layers' saliencies, and the two together. Everything is a pure function of NumPy arrays in dicts by
layer name; the layers' order is that of `Budget.sizes`. A mask has its kernel's shape, True where a
weight is active. Equal values are taken in the order of their index, equal layers in the network's
order, so that the same input gives the same masks. Whole channels are in `channels`; wrappers and
variables are in `pruning`.
"""

import bisect
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from snn_tf.budget import Budget, Counts, active_counts, common_counts, plan_update, shared_counts
from snn_tf.errors import UserError

Masks = dict[str, np.ndarray]


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
) -> Masks:
    """Drops the smallest active weights and regrows as much where the scores ask for it.

    If the masks hold more than the budget, one cut through |W| of all layers comes first. Then a layer
    loses the share p of its active weights, but no more than it had inactive ones and never falls under
    its floor; the largest weight into each class stays. What is freed, and what was left of the budget,
    is shared in proportion to the layers' mean |score| over active weights, and grown at the largest
    |score| among the weights that were inactive before. If those are used up or too dear for the rest,
    fewer weights are dropped instead, so that what is left is less than the cost of the cheapest
    inactive weight (nothing, if weights are counted).

    Args:
      weights: kernels W; or |W|, with a factor for each layer, which the cut through all layers heeds.
      scores: m, of the kernels' shapes: moving average of the loss's gradient by every weight; its
        factor for each layer weighs that layer's share.
      masks: the masks so far.
      budget: cost that may be active.
      p: share dropped, in [0, 1].
      output_layer: layer whose last axis is the classes.

    Returns:
      The new masks. Inputs are left as they are.

    Raises:
      UserError: weights or scores are not finite.
    """
    _check_finite(weights, "weights")
    _check_finite(scores, "scores")
    magnitudes = {name: np.abs(weight) for name, weight in weights.items()}
    kept = dict(masks)
    if budget.cost(active_counts(masks)) > budget.target:
        kept = ranked_masks(magnitudes, budget, output_layer, masks)
    contributions, room = _contributions(scores, masks), active_counts(_inverse(masks))
    churn = plan_update(contributions, active_counts(kept), budget, p, room)
    for name in budget.sizes:
        droppable = kept[name]
        if name == output_layer:
            droppable = droppable & ~_largest_per_class(magnitudes[name], droppable)
        kept[name] = kept[name] & ~_smallest(magnitudes[name], droppable, churn.dropped[name])
    return _regrown(kept, scores, magnitudes, masks, budget, churn.grown)


def update_masks_globally(
    saliency: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    budget: Budget,
    p: float,
    output_layer: str,
) -> Masks:
    """Keeps the active weights of largest saliency over all layers, and regrows where the scores ask.

    One cut leaves the share 1 - p of the budget, or more if so much was not inactive before. What is
    freed is shared in proportion to what the layers keep, and grown at the largest |score| among the
    weights that were inactive before: so the ranking alone decides the layers' shares, and the scores
    decide the places (the magnitude's form with p > 0: Liu et al. 2021, GraNet).

    Args:
      saliency: of the kernels' shapes, not negative.
      scores, masks, budget, p, output_layer: as for `update_masks`, and so is what is returned.

    Raises:
      UserError: saliencies or scores are not finite.
    """
    _check_finite(saliency, "saliencies")
    _check_finite(scores, "scores")
    room = active_counts(_inverse(masks))
    free = budget.target - budget.cost(budget.floors)
    exchanged = min(int(p * budget.target), budget.cost(room), free)
    kept = ranked_masks(saliency, budget, output_layer, masks, exchanged)
    counts = active_counts(kept)
    shares = {name: Fraction(count * budget.unit_costs[name]) for name, count in counts.items()}
    grown = shared_counts(shares, room, budget, budget.target - budget.cost(counts))
    return _regrown(kept, scores, saliency, masks, budget, grown)


def _regrown(
    kept: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
    saliency: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    budget: Budget,
    counts: Counts,
) -> Masks:
    """`kept` and `counts` weights that `masks` had inactive; then of the dropped ones whatever fits."""
    new = {
        name: kept[name] | _smallest(-np.abs(scores[name]), ~masks[name], counts[name])
        for name in budget.sizes
    }
    dropped = {name: masks[name] & ~new[name] for name in new}
    gap = budget.target - budget.cost(active_counts(new))
    _take_what_fits(_ranks(saliency, dropped), new, budget, gap)
    return new


def ranked_masks(
    saliency: Mapping[str, np.ndarray],
    budget: Budget,
    output_layer: str,
    among: Mapping[str, np.ndarray] | None = None,
    spare: int = 0,
) -> Masks:
    """One cut through the saliencies of all layers, compared as float32.

    Each layer keeps the largest of its floor, the output layer the largest into each class. Then the
    largest of all the others follow, those skipped that cost more than what is left. The total is met
    exactly if the budget counts weights; otherwise what is left of it is less than the cost of the
    cheapest inactive weight of `among`.

    Args:
      saliency: |W| or another value that is not negative, of the kernels' shapes.
      budget: cost that may be active.
      output_layer: layer whose last axis is the classes.
      among: flags the weights that may be active; all if None. They meet the floors.
      spare: cost left unused, at most the target less the floors.

    Raises:
      UserError: saliencies are not finite.
    """
    _check_finite(saliency, "weights")
    masks = {}
    among = among or {name: np.ones(value.shape, bool) for name, value in saliency.items()}
    for name, floor in budget.floors.items():
        value = saliency[name].astype(np.float32)
        keep = np.zeros(value.shape, bool)
        if name == output_layer:
            keep = _largest_per_class(value, among[name])
        keep |= _smallest(-value, among[name] & ~keep, floor - int(np.count_nonzero(keep)))
        masks[name] = keep
    ranks = _ranks(saliency, {name: among[name] & ~mask for name, mask in masks.items()})
    gap = budget.target - spare - budget.cost(active_counts(masks))
    gap = _take_above_cut(ranks, masks, budget, gap)
    _take_what_fits(ranks, masks, budget, gap)
    return masks


def _ranks(saliency: Mapping[str, np.ndarray], among: Mapping[str, np.ndarray]) -> Masks:
    """Whole numbers from 0 in the order of the saliencies, -1 outside the flagged ones."""
    # Bit patterns of floats that are not negative have the order of the floats.
    return {
        name: np.where(among[name], value.astype(np.float32).view(np.int32), np.int32(-1))
        for name, value in saliency.items()
    }


def _inverse(masks: Mapping[str, np.ndarray]) -> Masks:
    return {name: ~mask for name, mask in masks.items()}


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


def _take_above_cut(ranks: Mapping[str, np.ndarray], masks: Masks, budget: Budget, gap: int) -> int:
    """Adds the largest ranks to `masks` down to the first that does not fit; returns the cost left.

    Ranks are whole numbers from 0, or -1 for what is not to be added. Of those equal to the first that
    does not fit, as many are added as fit into `gap`.
    """

    def fits(cut: int) -> bool:
        return budget.cost(active_counts({name: rank >= cut for name, rank in ranks.items()})) <= gap

    cut = bisect.bisect_left(range(2**31), True, key=fits)
    for name, rank in ranks.items():
        masks[name] |= rank >= cut
        gap -= budget.unit_costs[name] * int(np.count_nonzero(rank >= cut))
    for name, rank in ranks.items():
        tied = (rank == cut - 1) & (rank >= 0)
        count = min(int(np.count_nonzero(tied)), gap // budget.unit_costs[name])
        masks[name] |= _smallest(rank, tied, count)
        gap -= count * budget.unit_costs[name]
    return gap


def _take_what_fits(ranks: Mapping[str, np.ndarray], masks: Masks, budget: Budget, gap: int) -> None:
    """Adds the largest ranks to `masks` one by one, skipping what costs more than is left.

    `gap` is small, so that few come into question.
    """
    candidates: list[tuple[int, str, int]] = []
    for name, rank in ranks.items():
        inactive = (rank >= 0) & ~masks[name]
        count = min(int(np.count_nonzero(inactive)), gap // budget.unit_costs[name])
        best = np.flatnonzero(_smallest(-rank, inactive, count))
        candidates += [(int(rank.flat[i]), name, int(i)) for i in best]
    for _, name, index in sorted(candidates, key=lambda candidate: -candidate[0]):
        if budget.unit_costs[name] <= gap:
            masks[name].flat[index] = True
            gap -= budget.unit_costs[name]
