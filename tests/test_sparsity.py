"""Tests of `snn_tf.sparsity`: tables drawn by hand, and pure-Python oracles on small random networks."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_tf.budget import Budget, active_counts, shared_counts
from snn_tf.errors import UserError
from snn_tf.sparsity import (
    drop_fraction,
    initial_masks,
    ranked_masks,
    update_masks,
    update_masks_globally,
)

UNTIMED = settings(deadline=None, max_examples=100)
FRACTIONS = st.floats(0.0, 1.0)


def make_budget(shapes, density, costs=None, min_layer_density=0.0, classes=0):
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return Budget(
        sizes=sizes,
        unit_costs=costs or dict.fromkeys(sizes, 1),
        density=density,
        min_layer_density=min_layer_density,
        protected={name: classes if name == "out" else 0 for name in sizes},
    )


@st.composite
def networks(draw, by_macs):
    """Shapes and budget of one to four layers, the last one called out; any density that is possible."""
    hidden = draw(st.lists(st.tuples(*[st.integers(1, 4)] * 3), max_size=3))
    shapes = {f"layer{i}": shape for i, shape in enumerate(hidden)}
    shapes["out"] = draw(st.tuples(st.integers(1, 8), st.integers(1, 4)))
    costs = {name: draw(st.integers(1, 9)) if by_macs else 1 for name in shapes}
    smallest_density = draw(st.sampled_from([0.0, 0.005, 0.1, 0.3]))
    rest = (costs, smallest_density, shapes["out"][-1])
    full = make_budget(shapes, 1.0, *rest)
    cost = draw(st.integers(full.cost(full.floors), full.target))
    density = cost / full.target
    if by_macs:
        density = min(1.0, math.nextafter(density, 2))
    return shapes, make_budget(shapes, density, *rest)


@st.composite
def training_states(draw, by_macs=None):
    """A network with masks, and weights and scores that often tie and are often 0."""
    shapes, budget = draw(networks(draw(st.booleans()) if by_macs is None else by_macs))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.integers(1, 40))
    weights, scores = (
        {
            name: rng.integers(-levels, levels + 1, shape) / np.float32(8)
            for name, shape in shapes.items()
        }
        for _ in range(2)
    )
    for name in shapes:
        scores[name] *= draw(st.sampled_from([0, 1, 1]))
    return weights, scores, initial_masks(shapes, budget, rng, "out"), budget


def assert_meets(masks, budget):
    """Exact for weights; for macs within the target, and nothing inactive would still fit."""
    counts = active_counts(masks)
    gap = budget.target - budget.cost(counts)
    if set(budget.unit_costs.values()) == {1}:
        assert gap == 0
    inactive = [budget.unit_costs[name] for name in counts if counts[name] < budget.sizes[name]]
    assert gap >= 0
    assert gap < min(inactive, default=1)
    assert all(counts[name] >= floor for name, floor in budget.floors.items())
    assert masks["out"].reshape(-1, masks["out"].shape[-1]).any(axis=0).all()


def magnitudes(weights):
    return {name: abs(weight) for name, weight in weights.items()}


def same(first, second):
    return list(first) == list(second) and all(np.array_equal(first[n], second[n]) for n in first)


# Schedule


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.5), (25, 0.005 + 0.495 * (2 + math.sqrt(2)) / 4), (50, 0.2525), (100, 0.005), (101, 0.0)],
)
def test_drop_fraction_follows_a_cosine_then_stops(step, expected):
    assert drop_fraction(step, 100, 0.5, 0.005) == pytest.approx(expected, abs=1e-15)


def test_drop_fraction_of_a_schedule_without_length_is_its_start():
    assert drop_fraction(0, 0, 0.5, 0.005) == 0.5
    assert drop_fraction(1, 0, 0.5, 0.005) == 0.0


# Random masks


@UNTIMED
@given(st.booleans().flatmap(networks), st.integers(0, 1000))
def test_initial_masks_meet_the_budget(network, seed):
    shapes, budget = network
    masks = initial_masks(shapes, budget, np.random.default_rng(seed), "out")
    assert {name: mask.shape for name, mask in masks.items()} == shapes
    assert all(mask.dtype == bool for mask in masks.values())
    assert_meets(masks, budget)
    assert same(masks, initial_masks(shapes, budget, np.random.default_rng(seed), "out"))


@UNTIMED
@given(networks(by_macs=False))
def test_initial_masks_have_one_density_where_floors_allow(network):
    shapes, budget = network
    counts = active_counts(initial_masks(shapes, budget, np.random.default_rng(0), "out"))
    free = [name for name in shapes if counts[name] > budget.floors[name]]
    # Rounding moves each layer by less than one weight from the common density.
    low = max(((counts[name] - 1) / budget.sizes[name] for name in free), default=0)
    high = min((counts[name] + 1) / budget.sizes[name] for name in shapes)
    assert low < high


def test_initial_masks_choose_every_position_equally_often():
    shapes, draws = {"a": (3, 4), "out": (5, 2)}, 2000
    budget = make_budget(shapes, 0.5, classes=2)
    rng = np.random.default_rng(7)
    drawn = [initial_masks(shapes, budget, rng, "out") for _ in range(draws)]
    for name in shapes:
        share = np.mean([masks[name] for masks in drawn], axis=0)
        assert np.abs(share - 0.5).max() < 5 * math.sqrt(0.25 / draws)


# Sparse learning


def test_update_drops_small_weights_and_grows_large_scores():
    weights = {
        "a": np.array([[4.0, -1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0]]),
        "out": np.array([[5.0, 1.0], [-2.0, 0.0], [3.0, 0.0], [0.0, 0.0]]),
    }
    scores = {
        "a": np.array([[1.0, 1.0, -1.0, 1.0, 2.0, -9.0, 3.0, 4.0]]),
        "out": np.array([[1.0, 3.0], [-4.0, 9.0], [0.0, 1.0], [-2.0, 5.0]]),
    }
    masks = {
        "a": np.array([[1, 1, 1, 1, 0, 0, 0, 0]], bool),
        "out": np.array([[1, 1], [1, 0], [1, 0], [0, 0]], bool),
    }
    budget = make_budget({"a": (1, 8), "out": (4, 2)}, 0.5, classes=2)
    new = update_masks(weights, scores, masks, budget, 0.5, "out")
    # Mean scores 1 and 2: of the four dropped, 1.33 and 2.67 come back, so 1 and 3.
    # out: 5 and the lonely 1 are the largest into their classes; 2 and 3 go.
    assert new["a"].astype(int).tolist() == [[1, 0, 1, 0, 0, 1, 0, 0]]
    assert new["out"].astype(int).tolist() == [[1, 1], [0, 1], [0, 0], [1, 1]]


def test_update_takes_ties_in_the_order_of_their_index():
    weights = {"a": np.ones((8,)), "out": np.ones((4, 1))}
    scores = {"a": np.ones((8,)), "out": np.zeros((4, 1))}
    masks = {"a": np.array([0, 1, 1, 0, 1, 1, 0, 0], bool), "out": np.array([[0], [1], [1], [0]], bool)}
    budget = make_budget({"a": (8,), "out": (4, 1)}, 0.5, classes=1)
    new = update_masks(weights, scores, masks, budget, 0.5, "out")
    # a drops 1 and 2; out keeps its first as the class's largest and drops the other; a grows all three.
    assert new["a"].astype(int).tolist() == [1, 0, 0, 1, 1, 1, 1, 0]
    assert new["out"].astype(int).ravel().tolist() == [0, 1, 0, 0]


def oracle_update(weights, scores, masks, budget, p):
    """The rules for a budget of weights, one weight at a time."""
    layers = list(budget.sizes)
    flat = {n: [abs(float(w)) for w in weights[n].ravel()] for n in layers}
    score = {n: [abs(float(m)) for m in scores[n].ravel()] for n in layers}
    active = {n: [i for i, on in enumerate(masks[n].ravel()) if on] for n in layers}
    inactive = {n: [i for i, on in enumerate(masks[n].ravel()) if not on] for n in layers}
    mean = {n: Fraction(math.fsum(score[n][i] for i in active[n]) / len(active[n])) for n in layers}

    freed, dropped = 0, {}
    for n in layers:
        count = max(
            0, min(math.floor(p * len(active[n])), len(inactive[n]), len(active[n]) - budget.floors[n])
        )
        untouchable = set()
        if n == "out":
            classes = weights[n].shape[-1]
            for c in range(classes):
                untouchable.add(max((i for i in active[n] if i % classes == c), key=flat[n].__getitem__))
        droppable = [i for i in active[n] if i not in untouchable]
        dropped[n] = set(sorted(droppable, key=flat[n].__getitem__)[:count])
        freed += count

    share, left = dict.fromkeys(layers, Fraction(0)), Fraction(freed)
    while left:  # hand out, clip at the capacity, hand out the rest again
        room = {n: len(inactive[n]) - share[n] for n in layers if len(inactive[n]) > share[n]}
        key = mean if any(mean[n] for n in room) else {n: Fraction(len(inactive[n])) for n in room}
        gifts = {n: min(left * key[n] / sum(key[k] for k in room), room[n]) for n in room}
        for n, gift in gifts.items():
            share[n] += gift
            left -= gift
    grow = {n: math.floor(share[n]) for n in layers}
    by_remainder = sorted(layers, key=lambda n: grow[n] - share[n])
    for n in by_remainder[: freed - sum(grow.values())]:
        grow[n] += 1

    new = {}
    for n in layers:
        grown = set(sorted(inactive[n], key=lambda i, n=n: -score[n][i])[: grow[n]])
        on = (set(active[n]) - dropped[n]) | grown
        new[n] = np.array([i in on for i in range(budget.sizes[n])]).reshape(masks[n].shape)
    return new


@UNTIMED
@given(training_states(by_macs=False), FRACTIONS)
def test_update_equals_the_oracle(state, p):
    weights, scores, masks, budget = state
    new = update_masks(weights, scores, masks, budget, p, "out")
    assert same(new, oracle_update(weights, scores, masks, budget, p))


@UNTIMED
@given(training_states(), FRACTIONS)
def test_update_keeps_every_promise(state, p):
    weights, scores, masks, budget = state
    new = update_masks(weights, scores, masks, budget, p, "out")
    assert_meets(new, budget)
    for name, before in masks.items():
        dropped, grown = before & ~new[name], new[name] & ~before
        assert dropped.sum() <= p * before.sum()
        kept, missed = before & new[name], ~before & ~new[name]
        if grown.any() and missed.any():
            assert np.abs(scores[name][grown]).min() >= np.abs(scores[name][missed]).max()
        if name != "out" and dropped.any() and kept.any():
            assert np.abs(weights[name][dropped]).max() <= np.abs(weights[name][kept]).min()
    columns = masks["out"].shape[-1]
    strength = np.where(masks["out"], np.abs(weights["out"]), -1).reshape(-1, columns)
    assert new["out"].reshape(-1, columns)[strength.argmax(axis=0), np.arange(columns)].all()


@UNTIMED
@given(training_states(), FRACTIONS)
def test_update_is_repeatable_and_leaves_its_inputs_alone(state, p):
    weights, scores, masks, budget = state
    before = [{n: a.copy() for n, a in arrays.items()} for arrays in (weights, scores, masks)]
    first = update_masks(weights, scores, masks, budget, p, "out")
    second = update_masks(weights, scores, masks, budget, p, "out")
    assert same(first, second)
    assert all(same(a, b) for a, b in zip(before, (weights, scores, masks), strict=True))


@UNTIMED
@given(training_states(), st.sampled_from([0.5, 1.0]))
def test_update_at_density_one_changes_nothing(state, p):
    weights, scores, _, budget = state
    shapes = {name: array.shape for name, array in weights.items()}
    dense = {name: np.ones(shape, bool) for name, shape in shapes.items()}
    full = make_budget(shapes, 1.0, budget.unit_costs, classes=shapes["out"][-1])
    new = update_masks(weights, scores, dense, full, p, "out")
    assert same(new, dense)


@UNTIMED
@given(training_states())
def test_update_with_p_zero_changes_nothing(state):
    weights, scores, masks, budget = state
    new = update_masks(weights, scores, masks, budget, 0.0, "out")
    assert same(new, masks)


@pytest.mark.parametrize("broken", ["weights", "scores"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_update_refuses_what_is_not_finite(broken, value):
    arrays = {what: {"a": np.ones(4), "out": np.ones((2, 1))} for what in ("weights", "scores")}
    arrays[broken]["a"][2] = value
    masks = {"a": np.array([1, 1, 0, 0], bool), "out": np.ones((2, 1), bool)}
    budget = make_budget({"a": (4,), "out": (2, 1)}, 0.67, classes=1)
    with pytest.raises(UserError, match=rf"^layer a: {broken} are not finite"):
        update_masks(arrays["weights"], arrays["scores"], masks, budget, 0.5, "out")


@st.composite
def falling_states(draw):
    """A training state whose masks hold anything from its budget to everything."""
    weights, scores, masks, budget = draw(training_states())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    masks = {name: mask | (rng.random(mask.shape) < share) for name, mask in masks.items()}
    return weights, scores, masks, budget


def update_globally(weights, scores, masks, budget, p, output_layer):
    return update_masks_globally(magnitudes(weights), scores, masks, budget, p, output_layer)


@pytest.mark.parametrize("update", [update_masks, update_globally])
@UNTIMED
@given(falling_states(), FRACTIONS)
def test_update_meets_a_budget_that_has_fallen(update, state, p):
    weights, scores, masks, budget = state
    before = {name: mask.copy() for name, mask in masks.items()}
    new = update(weights, scores, masks, budget, p, "out")
    assert_meets(new, budget)
    assert same(masks, before)


@UNTIMED
@given(falling_states(), FRACTIONS)
def test_global_update_equals_the_oracle(state, p):
    """The cut by a walk over all weights; grown, per layer, the largest scores among the inactive."""
    weights, scores, masks, budget = state
    new = update_globally(weights, scores, masks, budget, p, "out")
    room = {name: np.count_nonzero(~mask) for name, mask in masks.items()}
    free = budget.target - budget.cost(budget.floors)
    exchanged = min(math.floor(p * budget.target), budget.cost(room), free)
    kept = oracle_ranking(weights, budget, masks, exchanged)
    counts = active_counts(kept)
    shares = {name: Fraction(budget.unit_costs[name] * count) for name, count in counts.items()}
    grown = shared_counts(shares, room, budget, budget.target - budget.cost(counts))
    for name, mask in masks.items():
        flat = abs(scores[name]).ravel()
        order = sorted(np.flatnonzero(~mask), key=lambda i, flat=flat: (-flat[i], i))
        assert set(np.flatnonzero(new[name] & ~mask)) == set(order[: grown[name]])
        assert not (kept[name] & ~new[name]).any()
        if set(budget.unit_costs.values()) == {1}:
            assert np.array_equal(new[name] & mask, kept[name])


def test_global_update_lets_the_ranking_decide_the_shares():
    weights = {
        "a": np.array([[9.0, 8.0, 7.0, 6.0, 0.0, 0.0, 0.0, 0.0]]),
        "b": np.array([[1.0, 2.0, 3.0, 5.0, 0.0, 0.0, 0.0, 0.0]]),
        "out": np.array([[9.0], [0.0]]),
    }
    scores = {
        "a": np.array([[0.0, 0.0, 0.0, 0.0, 0.1, 0.4, 0.2, 0.3]]),
        "b": np.array([[0.0, 0.0, 0.0, 0.0, 9.0, 9.0, 8.0, 9.0]]),
        "out": np.array([[1.0], [1.0]]),
    }
    masks = {name: weight > 0 for name, weight in weights.items()}
    budget = make_budget({"a": (1, 8), "b": (1, 8), "out": (2, 1)}, 0.5, classes=1)
    new = update_masks_globally(weights, scores, masks, budget, 0.25, "out")
    # Target 9, of which 2 are exchanged: 1, 2 go; a keeps 4, b 2, out 1: shares of 8/7, 4/7 and 2/7.
    assert new["a"].astype(int).tolist() == [[1, 1, 1, 1, 0, 1, 0, 0]]
    assert new["b"].astype(int).tolist() == [[0, 0, 1, 1, 1, 0, 0, 0]]


def test_update_of_a_dense_network_only_cuts():
    """Nothing was inactive, so nothing can grow: what is left is the largest of all layers."""
    rng = np.random.default_rng(3)
    weights = {"a": rng.normal(size=(4, 5)), "out": rng.normal(size=(6, 2))}
    scores = {name: rng.normal(size=weight.shape) for name, weight in weights.items()}
    dense = {name: np.ones(weight.shape, bool) for name, weight in weights.items()}
    budget = make_budget({"a": (4, 5), "out": (6, 2)}, 0.25, classes=2)
    for update in (update_masks, update_globally):
        new = update(weights, scores, dense, budget, 0.5, "out")
        assert same(new, oracle_ranking(weights, budget))


# Ranking


def test_ranking_cut_is_global_but_keeps_the_floors():
    weights = {
        "a": np.array([9.0, -8.0, 7.0, 6.0]),
        "b": np.array([0.1, -0.2, 0.3, 0.1]),
        "out": np.array([[5.0, 0.0], [-6.5, 0.2]]),
    }
    budget = make_budget({"a": (4,), "b": (4,), "out": (2, 2)}, 0.5, classes=2)
    masks = ranked_masks(magnitudes(weights), budget, "out")
    assert masks["a"].astype(int).tolist() == [1, 1, 1, 0]
    assert masks["b"].astype(int).tolist() == [0, 0, 1, 0]
    assert masks["out"].astype(int).tolist() == [[0, 0], [1, 1]]


def test_ranking_with_macs_skips_what_is_too_dear():
    weights = {"a": np.array([1.0, 9.0, 8.0]), "out": np.array([[7.0], [6.0], [5.0], [4.0]])}
    budget = make_budget({"a": (3,), "out": (4, 1)}, 0.5, {"a": 5, "out": 1}, classes=1)
    # Target 9: 9 (5) and 7 (1) by the floors; 8 costs 5 of the 3 left, so 6, 5 and 4.
    masks = ranked_masks(magnitudes(weights), budget, "out")
    assert masks["a"].astype(int).tolist() == [0, 1, 0]
    assert masks["out"].astype(int).ravel().tolist() == [1, 1, 1, 1]


def test_ranking_with_macs_spends_the_rest_by_magnitude():
    weights = {"a": np.array([9.0, 8.0]), "b": np.array([6.0, 2.0]), "out": np.array([[7.0], [3.0]])}
    costs = {"a": 5, "b": 3, "out": 2}
    budget = make_budget({"a": (2,), "b": (2,), "out": (2, 1)}, 0.7, costs, classes=1)
    # Target 14, the floors cost 10: of the 4 left, 8 would cost 5, 3 costs 2, then 2 would cost 3.
    masks = ranked_masks(magnitudes(weights), budget, "out")
    assert active_counts(masks) == {"a": 1, "b": 1, "out": 2}


def oracle_ranking(saliency, budget, among=None, spare=0):
    """Floors, then one walk over all weights by saliency, layer and index."""
    flat = {n: [abs(float(w)) for w in saliency[n].ravel()] for n in budget.sizes}
    free = {n: [among is None or bool(among[n].flat[i]) for i in range(len(flat[n]))] for n in flat}
    on = {}
    for n, values in flat.items():
        order = [i for i in range(len(values)) if free[n][i]]
        order.sort(key=lambda i, values=values: -values[i])
        classes = saliency[n].shape[-1]
        best = {next(i for i in order if i % classes == c) for c in range(classes if n == "out" else 0)}
        others = [i for i in order if i not in best]
        on[n] = best | set(others[: budget.floors[n] - len(best)])
    gap = budget.target - spare - sum(len(on[n]) * budget.unit_costs[n] for n in on)
    walk = [(n, i) for n in flat for i in range(len(flat[n])) if free[n][i] and i not in on[n]]
    for n, i in sorted(walk, key=lambda unit: -flat[unit[0]][unit[1]]):
        if budget.unit_costs[n] <= gap:
            on[n].add(i)
            gap -= budget.unit_costs[n]
    return {n: np.isin(np.arange(budget.sizes[n]), list(on[n])).reshape(saliency[n].shape) for n in on}


@UNTIMED
@given(training_states())
def test_ranking_equals_the_oracle(state):
    weights, _, _, budget = state
    masks = ranked_masks(magnitudes(weights), budget, "out")
    assert same(masks, oracle_ranking(weights, budget))
    assert_meets(masks, budget)


def test_ranking_is_exact_for_a_hundred_thousand_equal_weights():
    weights = {"a": np.zeros((300, 300), np.float32), "out": np.zeros((1000, 10), np.float32)}
    shapes = {name: array.shape for name, array in weights.items()}
    masks = ranked_masks(magnitudes(weights), make_budget(shapes, 0.1, classes=10), "out")
    assert active_counts(masks) == {"a": 9990, "out": 10}


def test_ranking_refuses_what_is_not_finite():
    weights = {"a": np.ones(4), "out": np.array([[np.nan], [1.0]])}
    budget = make_budget({"a": (4,), "out": (2, 1)}, 0.67, classes=1)
    with pytest.raises(UserError, match=r"^layer out: weights are not finite"):
        ranked_masks(magnitudes(weights), budget, "out")
