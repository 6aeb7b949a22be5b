"""Masks of whole channels: from norms and scores to the active channels of every tie group.

A tie group is the set of tensors that must keep the same channels; its channel is the unit that is
dropped or grown. Only the consumers' input slices W[..., c, :] are masked, but the cost counts what
remains once the producers' filters of dropped channels are cut out too:

    cost = sum over layers of kernel positions * repeat * n_in * n_out * unit cost

with n the active channels of a layer's input and output group. The cost of one more channel therefore
depends on how many are active elsewhere, and it never falls while channels are added. Everything is a
pure function of NumPy arrays in dicts by group, True where a channel is active. Equal values are taken
in the order of groups and channels. Finding the groups and cutting the network is up to `surgery`.
"""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from snn_tf.budget import Counts, active_counts, check_affordable, target_cost

Channels = dict[str, np.ndarray]
Unit = tuple[str, int]


@dataclass(frozen=True)
class ChannelLayer:
    """A convolution or dense layer as the channel structure sees it.

    Attributes:
      name: the layer's name.
      kernel_positions: kh * kw; 1 for a dense layer.
      repeat: inputs per channel: H * W through a flatten, else 1.
      in_group: tie group of the input; None for the image, whose channels always stay.
      out_group: tie group of the output; None for the classes, which always stay.
      in_channels, out_channels: channels before cutting.
      unit_cost: cost of a weight: 1 if the density counts weights, the output positions if it counts
        multiply-accumulates.
    """

    name: str
    kernel_positions: int
    repeat: int
    in_group: str | None
    out_group: str | None
    in_channels: int
    out_channels: int
    unit_cost: int

    def cost(self, counts: Mapping[str, int]) -> int:
        """Cost of the layer with so many active channels in each group."""
        n_in = self.in_channels if self.in_group is None else counts[self.in_group]
        n_out = self.out_channels if self.out_group is None else counts[self.out_group]
        return self.kernel_positions * self.repeat * n_in * n_out * self.unit_cost


@dataclass(frozen=True)
class ChannelBudget:
    """How many channels may be active over all tie groups.

    Attributes:
      layers: all prunable layers, in the network's order.
      density: share of the cost that is kept, in (0, 1].

    Raises:
      UsageError: one channel in each group costs more than the density allows.
    """

    layers: Sequence[ChannelLayer]
    density: float

    def __post_init__(self) -> None:
        least = self.cost(dict.fromkeys(self.sizes, 1))
        keeps = "what one channel in each group of layers needs"
        check_affordable(self.density, self.target, least, self.cost(self.sizes), keeps)

    @property
    def sizes(self) -> Counts:
        """Channels of each group before cutting, in the order in which layers meet the groups."""
        sizes: Counts = {}
        for layer in self.layers:
            if layer.in_group is not None:
                sizes[layer.in_group] = layer.in_channels
            if layer.out_group is not None:
                sizes[layer.out_group] = layer.out_channels
        return sizes

    @property
    def target(self) -> int:
        """Cost that the active channels never exceed."""
        return target_cost(
            self.density, self.cost(self.sizes), (layer.unit_cost for layer in self.layers)
        )

    def cost(self, counts: Mapping[str, int]) -> int:
        """Cost of the network with so many active channels in each group."""
        return sum(layer.cost(counts) for layer in self.layers)


def initial_channels(budget: ChannelBudget, rng: np.random.Generator) -> Channels:
    """Random channels, the same share of every group, then whatever else fits in random order.

    The share is the largest whose cost is within the target; each group has at least one channel.
    What is left of the target is less than the cost of the cheapest further channel.
    """
    active = {}
    for group, count in _common_counts(budget).items():
        active[group] = np.zeros(budget.sizes[group], bool)
        active[group][rng.permutation(budget.sizes[group])[:count]] = True
    units = [(group, int(c)) for group, flags in active.items() for c in np.flatnonzero(~flags)]
    _grow(active, (units[i] for i in rng.permutation(len(units))), budget)
    return active


def update_channels(
    norms: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
    active: Mapping[str, np.ndarray],
    budget: ChannelBudget,
    p: float,
) -> Channels:
    """Drops the channels of smallest norm and regrows, over all groups, those of largest score.

    If more is active than the budget allows, the channels of smallest value over all groups go first.
    Then a group loses min(floor(p active), inactive, active - 1) channels. Those that were inactive
    before are tried in the order of their scores, each at its cost given the channels so far; those that
    do not fit are skipped. Then all the dropped ones are tried in the same way. So what is left of the
    target is less than the cost of the cheapest inactive channel.

    Args:
      norms: [C] for each group: Frobenius norm of the consumers' slices (`channel_norms`).
      values: [C] for each group: the same norm / sqrt(slice size).
      scores: [C] for each group: norm of m over the same slices / sqrt(slice size).
      active: [C] for each group: the channels so far.
      budget: cost that may be active.
      p: share dropped, in [0, 1].

    Returns:
      The new active channels. Inputs are left as they are.
    """
    new = {group: active[group].copy() for group in budget.sizes}
    if budget.cost(active_counts(new)) > budget.target:
        new = ranked_channels(values, budget, active)
    for group, flags in new.items():
        count = int(np.count_nonzero(flags))
        drop = min(int(p * count), int(np.count_nonzero(~active[group])), count - 1)
        channels = np.flatnonzero(flags)
        flags[channels[np.argsort(norms[group][channels], kind="stable")[:drop]]] = False
    dropped = {group: active[group] & ~flags for group, flags in new.items()}
    _grow(new, _by_value(scores, {group: ~active[group] for group in new}), budget)
    _grow(new, _by_value(scores, dropped), budget)
    return new


def ranked_channels(
    values: Mapping[str, np.ndarray],
    budget: ChannelBudget,
    among: Mapping[str, np.ndarray] | None = None,
) -> Channels:
    """The best channel of each group, then the best of all others, skipping what does not fit.

    Args:
      values: [C] for each group, not negative: norm of the consumers' slices / sqrt(slice size).
      budget: cost that may be active.
      among: flags the channels that may be active, one at least in each group; all if None.
    """
    among = among or {group: np.ones(size, bool) for group, size in budget.sizes.items()}
    active = {}
    for group, size in budget.sizes.items():
        best = np.argmax(np.where(among[group], values[group], -1))
        active[group] = np.arange(size) == best
    _grow(active, _by_value(values, {g: among[g] & ~flags for g, flags in active.items()}), budget)
    return active


def channel_norms(kernels: Mapping[str, np.ndarray], layers: Iterable[ChannelLayer]) -> Channels:
    """Frobenius norm, over all consumers, of the slices that read each channel.

    Args:
      kernels: by layer name, [kh, kw, C, out], or [H * W * C, out] after a flatten with channels last.
      layers: the layers of these kernels.

    Returns:
      [C] for each group that a layer reads.
    """
    squares: Channels = {}
    for layer in layers:
        if layer.in_group is not None:
            slices = _slices(kernels[layer.name], layer)
            total = np.square(slices).sum(axis=(0, 2), dtype=np.float64)
            squares[layer.in_group] = squares.get(layer.in_group, 0) + total
    return {group: np.sqrt(total) for group, total in squares.items()}


def slice_sizes(layers: Iterable[ChannelLayer]) -> Counts:
    """Weights that read one channel of each group, over all consumers, before cutting."""
    sizes: Counts = {}
    for layer in layers:
        if layer.in_group is not None:
            weights = layer.kernel_positions * layer.repeat * layer.out_channels
            sizes[layer.in_group] = sizes.get(layer.in_group, 0) + weights
    return sizes


def input_mask(
    layer: ChannelLayer, active: Mapping[str, np.ndarray], kernel_shape: tuple[int, ...]
) -> np.ndarray:
    """The layer's mask, of its kernel's shape: True where a weight reads an active channel."""
    mask = np.ones(kernel_shape, bool)
    if layer.in_group is not None:
        _slices(mask, layer)[:, ~active[layer.in_group], :] = False
    return mask


def output_mask(layer: ChannelLayer, active: Mapping[str, np.ndarray]) -> np.ndarray:
    """[out]: True where the layer's filter makes a channel that is active."""
    if layer.out_group is None:
        return np.ones(layer.out_channels, bool)
    return active[layer.out_group].copy()


def _slices(kernel: np.ndarray, layer: ChannelLayer) -> np.ndarray:
    """View of a kernel as [positions, C, out]; a flatten with channels last gives the same order."""
    return kernel.reshape(layer.kernel_positions * layer.repeat, layer.in_channels, layer.out_channels)


def _common_counts(budget: ChannelBudget) -> Counts:
    """max(1, floor(f C)) channels of each group, for the largest share f within the target."""

    def counts(share: Fraction) -> Counts:
        return {group: max(1, math.floor(share * size)) for group, size in budget.sizes.items()}

    steps = sorted({Fraction(n, size) for size in set(budget.sizes.values()) for n in range(size + 1)})
    within = bisect.bisect_right(steps, budget.target, key=lambda share: budget.cost(counts(share)))
    return counts(steps[within - 1])


def _by_value(values: Mapping[str, np.ndarray], among: Mapping[str, np.ndarray]) -> list[Unit]:
    """The flagged channels, largest value first."""
    units = [(group, int(c)) for group, flags in among.items() for c in np.flatnonzero(flags)]
    return sorted(units, key=lambda unit: -values[unit[0]][unit[1]])


def _grow(active: Channels, units: Iterable[Unit], budget: ChannelBudget) -> None:
    """Makes active, in the order given, each unit that fits into the target.

    One pass is enough: while channels are added, what is left falls and no unit gets cheaper.
    """
    counts = active_counts(active)
    touching = {
        group: [layer for layer in budget.layers if group in (layer.in_group, layer.out_group)]
        for group in active
    }
    gap = budget.target - budget.cost(counts)
    for group, channel in units:
        more = counts | {group: counts[group] + 1}
        cost = sum(layer.cost(more) - layer.cost(counts) for layer in touching[group])
        if cost <= gap:
            active[group][channel] = True
            counts, gap = more, gap - cost
