"""Tests of `snn_tf.channels`: tables drawn by hand, and oracles that search one unit at a time."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_tf.channels import (
    ChannelBudget,
    ChannelLayer,
    channel_norms,
    initial_channels,
    input_mask,
    output_mask,
    ranked_channels,
    slice_sizes,
    update_channels,
)
from snn_tf.errors import UsageError

UNTIMED = settings(deadline=None, max_examples=100)

# image (1) -> 1x1 conv -> g (4) -> 1x1 conv -> h (4) -> flatten of two positions -> 2 classes
CHAIN = (
    ChannelLayer("stem", 1, 1, None, "g", 1, 4, 1),
    ChannelLayer("conv", 1, 1, "g", "h", 4, 4, 1),
    ChannelLayer("head", 1, 2, "h", None, 4, 2, 1),
)


def flags(*values):
    return np.array(values, bool)


def counts_of(active):
    return {group: int(channels.sum()) for group, channels in active.items()}


@st.composite
def budgets(draw):
    """A stage of group s with up to two branches (one of them s to s), a chain behind it, classes."""
    s, inner, behind = (draw(st.integers(1, 6)) for _ in range(3))
    unit = st.integers(1, 5) if draw(st.booleans()) else st.just(1)

    def layer(name, repeat, source, target, n_in, n_out):
        return ChannelLayer(
            name, draw(st.sampled_from([1, 4, 9])), repeat, source, target, n_in, n_out, draw(unit)
        )

    layers = [layer("stem", 1, None, "s", draw(st.integers(1, 3)), s)]
    if draw(st.booleans()):
        layers += [layer("first", 1, "s", "i", s, inner), layer("second", 1, "i", "s", inner, s)]
    if draw(st.booleans()):
        layers.append(layer("loop", 1, "s", "s", s, s))
    layers.append(layer("dense", draw(st.integers(1, 4)), "s", "b", s, behind))
    layers.append(layer("out", 1, "b", None, behind, draw(st.integers(1, 4))))
    whole = ChannelBudget(layers, 1.0)
    least = whole.cost(dict.fromkeys(whole.sizes, 1))
    density = min(1.0, math.nextafter(draw(st.integers(least, whole.target)) / whole.target, 2))
    return ChannelBudget(layers, density)


@st.composite
def training_states(draw):
    """A budget with active channels, and norms and scores that often tie."""
    budget = draw(budgets())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.integers(1, 20))
    norms, scores = (
        {group: rng.integers(0, levels, size) / 4 for group, size in budget.sizes.items()}
        for _ in range(2)
    )
    return norms, scores, initial_channels(budget, rng), budget


def assert_meets(active, budget):
    """Within the target, a channel in each group, and no inactive channel would still fit."""
    counts = counts_of(active)
    assert {group: len(channels) for group, channels in active.items()} == budget.sizes
    assert min(counts.values()) >= 1
    assert budget.cost(counts) <= budget.target
    for group, size in budget.sizes.items():
        if counts[group] < size:
            assert budget.cost(counts | {group: counts[group] + 1}) > budget.target


def same(first, second):
    return list(first) == list(second) and all(np.array_equal(first[g], second[g]) for g in first)


# Costs


def test_cost_counts_what_remains_on_both_sides():
    budget = ChannelBudget(CHAIN, 0.5)
    assert budget.sizes == {"g": 4, "h": 4}
    assert budget.cost({"g": 4, "h": 4}) == 4 + 16 + 16
    assert budget.cost({"g": 2, "h": 3}) == 2 + 6 + 12
    assert budget.target == 18


def test_cost_multiplies_kernel_flatten_and_positions():
    layer = ChannelLayer("conv", 9, 1, "g", "h", 8, 8, 64)
    assert layer.cost({"g": 2, "h": 3}) == 9 * 2 * 3 * 64
    layer = ChannelLayer("dense", 1, 49, "g", None, 8, 10, 1)
    assert layer.cost({"g": 2}) == 49 * 2 * 10


def test_target_is_rounded_for_weights_and_not_exceeded_for_macs():
    assert ChannelBudget(CHAIN, 0.655).target == 24  # 23.58
    dear = (dataclasses.replace(CHAIN[0], unit_cost=4), *CHAIN[1:])
    assert ChannelBudget(dear, 0.655).target == 31  # 31.44
    assert ChannelBudget(dear, 0.664).target == 31  # 31.87


def test_budget_below_one_channel_per_group_names_the_smallest_possible_density():
    with pytest.raises(UsageError) as caught:
        ChannelBudget(CHAIN, 0.1)
    message = str(caught.value)
    assert message.startswith("--density=0.1: must be at least ")
    assert "\n" not in message
    smallest = float(re.search(r"at least ([0-9.e-]+)", message)[1])
    assert 6 / 36 <= smallest <= 6 / 36 + 1e-6
    assert counts_of(initial_channels(ChannelBudget(CHAIN, smallest), np.random.default_rng(0))) == {
        "g": 1,
        "h": 1,
    }


# Random channels


@UNTIMED
@given(budgets(), st.integers(0, 1000))
def test_initial_channels_meet_the_budget(budget, seed):
    active = initial_channels(budget, np.random.default_rng(seed))
    assert_meets(active, budget)
    assert same(active, initial_channels(budget, np.random.default_rng(seed)))


@UNTIMED
@given(budgets())
def test_initial_channels_start_from_the_largest_common_share(budget):
    steps = {n / size for size in budget.sizes.values() for n in range(1, size + 1)}
    shares = [
        counts
        for step in sorted(steps)
        if budget.cost(
            counts := {g: max(1, math.floor(step * c + 1e-9)) for g, c in budget.sizes.items()}
        )
        <= budget.target
    ]
    drawn = counts_of(initial_channels(budget, np.random.default_rng(0)))
    if shares:
        assert all(drawn[group] >= count for group, count in shares[-1].items())


def test_initial_channels_choose_every_channel_equally_often():
    draws, rng = 2000, np.random.default_rng(3)
    budget = ChannelBudget(CHAIN, 0.4)  # 14: two of each (2 + 4 + 8), nothing left
    drawn = [initial_channels(budget, rng) for _ in range(draws)]
    for group in budget.sizes:
        share = np.mean([active[group] for active in drawn], axis=0)
        assert np.abs(share - 0.5).max() < 5 * math.sqrt(0.25 / draws)


# Sparse learning


def test_update_drops_small_norms_and_grows_large_scores():
    active = {"g": flags(1, 1, 0, 0), "h": flags(1, 0, 0, 1)}
    norms = {"g": np.array([2.0, 1.0, 9.0, 9.0]), "h": np.array([1.0, 9.0, 9.0, 3.0])}
    scores = {"g": np.array([9.0, 9.0, 1.0, 4.0]), "h": np.array([9.0, 3.0, 2.0, 9.0])}
    new = update_channels(norms, norms, scores, active, ChannelBudget(CHAIN, 0.4), 0.5)
    # Target 14. One of each is left, cost 6. g's fourth costs 1 + 1, h's second 2 + 4: together 14.
    assert new["g"].tolist() == [True, False, False, True]
    assert new["h"].tolist() == [False, True, False, True]


def test_update_lets_channels_move_between_groups():
    active = {"g": flags(1, 1, 0, 0), "h": flags(1, 0, 0, 1)}
    norms = {"g": np.ones(4), "h": np.ones(4)}
    scores = {"g": np.array([0.0, 0.0, 8.0, 9.0]), "h": np.array([0.0, 1.0, 2.0, 0.0])}
    new = update_channels(norms, norms, scores, active, ChannelBudget(CHAIN, 0.4), 0.5)
    # g grows both for 2 each, cost 10; one of h would cost 3 + 4. g's own dropped channel fits: 12.
    assert new["g"].tolist() == [True, True, True, True]
    assert new["h"].tolist() == [False, False, False, True]


def test_update_keeps_one_channel_in_each_group():
    active = {"g": flags(0, 1, 0, 0), "h": flags(0, 0, 1, 0)}
    new = update_channels(
        *({g: np.zeros(4) for g in "gh"} for _ in range(3)), active, ChannelBudget(CHAIN, 6 / 36), 1.0
    )
    assert same(new, active)


def oracle_grow(active, candidates, values, budget):
    """Adds the best candidate that fits, looking at all of them again after each."""
    order = [(g, c) for g in budget.sizes for c in range(budget.sizes[g]) if (g, c) in candidates]
    order.sort(key=lambda unit: -values[unit[0]][unit[1]])

    def fits(unit):
        return sum(layer_costs(active | {unit}, budget)) <= budget.target

    while fitting := [unit for unit in order if unit not in active and fits(unit)]:
        active = active | {fitting[0]}
    return active


def layer_costs(active, budget):
    """Weights of each layer, counted from the set of active units."""
    for layer in budget.layers:
        n_in = len([u for u in active if u[0] == layer.in_group]) or layer.in_channels
        n_out = len([u for u in active if u[0] == layer.out_group]) or layer.out_channels
        yield layer.kernel_positions * layer.repeat * layer.unit_cost * n_in * n_out


def as_units(active):
    return {
        (group, c) for group, channels in active.items() for c in range(len(channels)) if channels[c]
    }


def oracle_update(norms, scores, active, budget, p):
    before, kept = as_units(active), set()
    for group, size in budget.sizes.items():
        own = sorted(c for g, c in before if g == group)
        drop = min(math.floor(p * len(own)), size - len(own), len(own) - 1)
        kept |= {(group, c) for c in sorted(own, key=norms[group].__getitem__)[drop:]}
    everything = {(group, c) for group, size in budget.sizes.items() for c in range(size)}
    grown = oracle_grow(kept, everything - before, scores, budget)
    return oracle_grow(grown, before - kept, scores, budget)


@UNTIMED
@given(training_states(), st.floats(0.0, 1.0))
def test_update_equals_the_oracle_and_meets_the_budget(state, p):
    norms, scores, active, budget = state
    before = {group: channels.copy() for group, channels in active.items()}
    new = update_channels(norms, norms, scores, active, budget, p)
    assert as_units(new) == oracle_update(norms, scores, active, budget, p)
    assert_meets(new, budget)
    assert same(active, before)


@UNTIMED
@given(training_states(), st.floats(0.0, 1.0))
def test_update_at_density_one_changes_nothing(state, p):
    norms, scores, _, budget = state
    dense = {group: np.ones(size, bool) for group, size in budget.sizes.items()}
    new = update_channels(norms, norms, scores, dense, dataclasses.replace(budget, density=1.0), p)
    assert same(new, dense)


# Magnitude


def test_magnitude_keeps_the_best_of_each_group_then_what_fits():
    values = {"g": np.array([1.0, 7.0, 6.0, 7.0]), "h": np.array([0.1, 0.4, 0.3, 0.2])}
    active = ranked_channels(values, ChannelBudget(CHAIN, 0.31))
    # Target 11, the best of each cost 6; g's fourth and third cost 1 + 1 each, then nothing fits in 1.
    assert active["g"].tolist() == [False, True, True, True]
    assert active["h"].tolist() == [False, True, False, False]


@UNTIMED
@given(training_states())
def test_magnitude_equals_the_oracle_and_meets_the_budget(state):
    values, _, _, budget = state
    active = ranked_channels(values, budget)
    best = {(group, int(np.argmax(values[group]))) for group in budget.sizes}
    everything = {(group, c) for group, size in budget.sizes.items() for c in range(size)}
    assert as_units(active) == oracle_grow(best, everything, values, budget)
    assert_meets(active, budget)


# Kernels


RESIDUAL = (
    ChannelLayer("stem", 9, 1, None, "g", 3, 2, 1),
    ChannelLayer("conv", 9, 1, "g", "h", 2, 4, 1),
    ChannelLayer("shortcut", 1, 1, "g", "h", 2, 4, 1),
    ChannelLayer("head", 1, 6, "h", None, 4, 5, 1),
)
SHAPES = {"stem": (3, 3, 3, 2), "conv": (3, 3, 2, 4), "shortcut": (1, 1, 2, 4), "head": (24, 5)}


def read_by(name, shape, group):
    """(index in the kernel, channel) of each weight that reads the group, one by one."""
    (layer,) = (layer for layer in RESIDUAL if layer.name == name)
    if layer.in_group == group:
        for index in itertools.product(*map(range, shape)):
            # After a flatten with channels last, neighbours are channels of one position.
            yield index, index[-2] % layer.in_channels


@pytest.mark.parametrize(("group", "size"), [("g", 2), ("h", 4)])
def test_norms_and_sizes_gather_all_consumers(group, size):
    rng = np.random.default_rng(0)
    kernels = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    squares, weights = np.zeros(size), np.zeros(size, int)
    for name, shape in SHAPES.items():
        for index, channel in read_by(name, shape, group):
            squares[channel] += kernels[name][index] ** 2
            weights[channel] += 1
    norms = channel_norms(kernels, RESIDUAL)
    assert set(norms) == set(slice_sizes(RESIDUAL)) == {"g", "h"}
    np.testing.assert_allclose(norms[group], np.sqrt(squares), rtol=1e-12)
    assert weights.tolist() == [slice_sizes(RESIDUAL)[group]] * size


@pytest.mark.parametrize("layer", RESIDUAL, ids=lambda layer: layer.name)
def test_input_mask_covers_the_slices_of_active_channels(layer):
    active = {"g": flags(0, 1), "h": flags(1, 0, 0, 1)}
    expected = np.ones(SHAPES[layer.name], bool)
    for index, channel in read_by(layer.name, SHAPES[layer.name], layer.in_group):
        if layer.in_group is not None:
            expected[index] = active[layer.in_group][channel]
    mask = input_mask(layer, active, SHAPES[layer.name])
    assert mask.dtype == bool
    assert np.array_equal(mask, expected)


def test_output_mask_is_that_of_the_group_made():
    active = {"g": flags(0, 1), "h": flags(1, 0, 0, 1)}
    stem, conv, _, head = RESIDUAL
    assert output_mask(stem, active).tolist() == [False, True]
    assert output_mask(conv, active).tolist() == [True, False, False, True]
    assert output_mask(head, active).tolist() == [True] * 5


def test_cost_is_what_the_two_masks_leave():
    active = {"g": flags(0, 1), "h": flags(1, 0, 0, 1)}
    left = sum(
        int((input_mask(layer, active, SHAPES[layer.name]) & output_mask(layer, active)).sum())
        for layer in RESIDUAL
    )
    assert left == ChannelBudget(RESIDUAL, 1.0).cost(counts_of(active)) == 27 + 18 + 2 + 60
