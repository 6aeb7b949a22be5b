"""Tests of `snn_tf.budget`: what a density buys and how layers share it, on tables drawn by hand."""

import re
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from snn_tf.budget import Budget, Churn, common_counts, plan_update, shared_counts, target_cost
from snn_tf.errors import UsageError


def make_budget(sizes, density, costs=None, min_layer_density=0.0, protected=None):
    return Budget(
        sizes=sizes,
        unit_costs=costs or dict.fromkeys(sizes, 1),
        density=density,
        min_layer_density=min_layer_density,
        protected=dict.fromkeys(sizes, 0) | (protected or {}),
    )


def planned(contributions, active, budget, p):
    """`plan_update` where every inactive weight may grow."""
    room = {name: size - active[name] for name, size in budget.sizes.items()}
    return plan_update(contributions, active, budget, p, room)


def fractions(**contributions):
    return {name: Fraction(value) for name, value in contributions.items()}


@pytest.mark.parametrize(
    ("density", "full_cost", "unit_costs", "target"),
    [
        (0.29, 100, [1, 1], 29),  # 0.29 * 100 is 28.999999999999996 in floating point
        (0.5, 5, [1], 2),
        (0.5, 7, [1], 4),
        (0.267, 10, [1], 3),
        (0.267, 10, [1, 3], 2),
        (1.0, 39_917_248, [1], 39_917_248),
        (1e-05, 1_000_000, [4], 10),
    ],
)
def test_target_is_rounded_for_weights_and_not_exceeded_for_macs(density, full_cost, unit_costs, target):
    assert target_cost(density, full_cost, unit_costs) == target


def test_target_of_macs_counts_each_weight_with_its_positions():
    budget = make_budget({"conv": 10, "head": 40}, 0.29, {"conv": 16, "head": 1})
    assert budget.target == 58  # 0.29 * (160 + 40)
    assert budget.cost({"conv": 3, "head": 5}) == 53


def test_floors_are_the_largest_of_three_needs():
    sizes = {"tiny": 9, "plain": 100, "broken": 101, "output": 50}
    budget = make_budget(sizes, 0.5, min_layer_density=0.07, protected={"output": 10})
    assert budget.floors == {"tiny": 1, "plain": 7, "broken": 8, "output": 10}


def test_floors_keep_one_weight_without_a_smallest_density():
    assert make_budget({"a": 5, "b": 7}, 0.5).floors == {"a": 1, "b": 1}


@pytest.mark.parametrize("costs", [{"a": 1, "b": 1}, {"a": 7, "b": 2}])
def test_budget_below_the_floors_names_the_smallest_possible_density(costs):
    rest = {"costs": costs, "min_layer_density": 0.1, "protected": {"b": 10}}
    sizes = {"a": 33, "b": 50}
    with pytest.raises(UsageError) as caught:
        make_budget(sizes, 0.05, **rest)
    message = str(caught.value)
    assert "--density=0.05" in message
    assert "--min_layer_density=0.1" in message
    assert "\n" not in message
    smallest = float(re.search(r"at least ([0-9.e-]+)", message)[1])
    exact = (4 * costs["a"] + 10 * costs["b"]) / (33 * costs["a"] + 50 * costs["b"])
    assert exact <= smallest <= exact + 1e-6
    least = make_budget(sizes, smallest, **rest)
    assert least.target == least.cost(least.floors)


@pytest.mark.parametrize(
    ("sizes", "density", "counts"),
    [
        ({"a": 4, "b": 8, "c": 12}, 0.5, [2, 4, 6]),
        ({"a": 3, "b": 3, "c": 3}, 0.5556, [2, 2, 1]),  # 5/3 each: remainders tie
        ({"a": 3, "b": 6, "c": 6}, 0.4667, [1, 3, 3]),  # 7 = 1.4 + 2.8 + 2.8
        ({"a": 2, "b": 98}, 0.05, [1, 4]),
        ({"a": 1, "b": 9, "c": 90}, 0.1, [1, 1, 8]),
        ({"a": 4, "b": 8}, 1.0, [4, 8]),
    ],
)
def test_common_counts_share_one_density(sizes, density, counts):
    assert list(common_counts(make_budget(sizes, density)).values()) == counts


def test_common_counts_leave_less_macs_than_a_weight_costs():
    budget = make_budget({"a": 4, "b": 8}, 0.6, {"a": 4, "b": 1})
    # Target 14 of 24: 2.33 and 4.67 weights; b has the larger remainder, then only b still fits.
    assert common_counts(budget) == {"a": 2, "b": 6}


def test_common_counts_spend_the_rest_on_the_dearest_that_fits():
    budget = make_budget({"a": 20, "b": 20, "c": 2}, 0.75, {"a": 1, "b": 3, "c": 20})
    # Target 90 of 120: 15, 15 and 1.5 weights. c's half is lost, one each to a and b, two more to b.
    assert common_counts(budget) == {"a": 16, "b": 18, "c": 1}


def test_plan_shares_what_is_freed_by_contribution():
    budget = make_budget({"a": 8, "b": 8}, 0.5)
    churn = planned(fractions(a="0.75", b="0.25"), {"a": 4, "b": 4}, budget, 0.5)
    assert churn == Churn(dropped={"a": 2, "b": 2}, grown={"a": 3, "b": 1})


def test_plan_shares_again_what_overflows():
    budget = make_budget({"a": 5, "b": 10, "c": 10}, 0.48)
    churn = planned(fractions(a=8, b=1, c=1), {"a": 4, "b": 4, "c": 4}, budget, 0.5)
    assert churn == Churn(dropped={"a": 1, "b": 2, "c": 2}, grown={"a": 1, "b": 2, "c": 2})


def test_plan_gives_a_tied_remainder_to_the_earlier_layer():
    budget = make_budget({"a": 10, "b": 10}, 0.3)
    churn = planned(fractions(a=1, b=1), {"a": 4, "b": 2}, budget, 0.5)
    assert churn == Churn(dropped={"a": 2, "b": 1}, grown={"a": 2, "b": 1})


def test_plan_shares_by_room_if_no_layer_contributes():
    budget = make_budget({"a": 4, "b": 16}, 0.4)
    churn = planned(fractions(a=0, b=0), {"a": 2, "b": 6}, budget, 0.5)
    assert churn == Churn(dropped={"a": 1, "b": 3}, grown={"a": 1, "b": 3})  # 4 * 2/12, 4 * 10/12


def test_plan_shares_by_room_once_the_contributing_layers_are_full():
    budget = make_budget({"a": 5, "b": 6, "c": 12}, 0.5217)
    churn = planned(fractions(a=1, b=0, c=0), {"a": 4, "b": 4, "c": 4}, budget, 0.5)
    # 1 + 2 + 2 freed; a takes 1, the other 4 go to rooms of 2 and 8 as 0.8 and 3.2.
    assert churn == Churn(dropped={"a": 1, "b": 2, "c": 2}, grown={"a": 1, "b": 1, "c": 3})


def test_plan_drops_no_layer_below_its_floor():
    budget = make_budget({"a": 10, "b": 10}, 0.7, min_layer_density=0.5)
    churn = planned(fractions(a=0, b=1), {"a": 6, "b": 8}, budget, 1.0)
    assert churn == Churn(dropped={"a": 1, "b": 2}, grown={"a": 1, "b": 2})


def test_plan_with_macs_shares_the_freed_cost():
    budget = make_budget({"a": 10, "b": 100}, 0.44, {"a": 10, "b": 2})
    # Target 132 = 10 * 8 + 2 * 26. Freed: 2 * 10 + 13 * 2 = 46, halves of 23: 2.3 and 11.5 weights,
    # rounded down 42; what is left buys two of b, none of a.
    churn = planned(fractions(a=1, b=1), {"a": 8, "b": 26}, budget, 0.5)
    assert churn == Churn(dropped={"a": 2, "b": 13}, grown={"a": 2, "b": 13})


def test_plan_with_macs_drops_less_where_candidates_run_out():
    budget = make_budget({"a": 9, "b": 6, "c": 10}, 0.432, {"a": 1, "b": 10, "c": 7})
    # 3 + 20 + 7 freed. a grows its 3, c three for 21; the 6 left buy neither b nor c, and a has no
    # more that were inactive before: its own three are not dropped.
    churn = planned(fractions(a=1, b=0, c=1), {"a": 6, "b": 4, "c": 2}, budget, 0.5)
    assert churn == Churn(dropped={"a": 0, "b": 2, "c": 1}, grown={"a": 3, "b": 0, "c": 3})


def test_plan_spends_what_was_left_before():
    budget = make_budget({"a": 8, "b": 8}, 0.5)
    churn = planned(fractions(a=1, b=1), {"a": 4, "b": 2}, budget, 0.0)
    assert churn == Churn(dropped={"a": 0, "b": 0}, grown={"a": 1, "b": 1})


def test_plan_refuses_more_than_the_target():
    with pytest.raises(ValueError, match="cost 9, the target is 8"):
        planned(fractions(a=1, b=1), {"a": 5, "b": 4}, make_budget({"a": 8, "b": 8}, 0.5), 0.5)


# --- whatever the layers, their costs and the density


@st.composite
def budgets(draw):
    """A budget that can be met, in weights or in MACs."""
    names = "abcdef"[: draw(st.integers(1, 6))]
    sizes = {name: draw(st.integers(1, 60)) for name in names}
    costs = {name: draw(st.sampled_from([1, 1, 4, 9, 64])) for name in names}
    counts_weights = draw(st.booleans())
    try:
        return make_budget(
            sizes,
            draw(st.integers(1, 1000)) / 1000,
            None if counts_weights else costs,
            draw(st.sampled_from([0.0, 0.005, 0.1, 0.5])),
            {names[-1]: draw(st.integers(0, sizes[names[-1]]))},
        )
    except UsageError:
        assume(False)


def contributions_to(budget):
    values = st.fractions(0, 10, max_denominator=50) | st.just(Fraction(0))
    return st.fixed_dictionaries(dict.fromkeys(budget.sizes, values))


def within(counts, budget):
    """Active counts between each layer's floor and its size."""
    return all(floor <= counts[name] <= budget.sizes[name] for name, floor in budget.floors.items())


def cheapest_left(room, budget):
    """Cost of the cheapest weight that might still be added; infinite if there is none."""
    return min((budget.unit_costs[name] for name, count in room.items() if count), default=float("inf"))


def in_weights(budget):
    return set(budget.unit_costs.values()) == {1}


@settings(max_examples=80, deadline=None)
@given(budgets())
def test_common_counts_never_exceed_size_or_target_and_leave_nothing_that_fits(budget):
    counts = common_counts(budget)
    gap = budget.target - budget.cost(counts)
    assert within(counts, budget)
    assert 0 <= gap < cheapest_left({n: budget.sizes[n] - counts[n] for n in counts}, budget)
    assert not in_weights(budget) or gap == 0


@settings(max_examples=80, deadline=None)
@given(budgets().flatmap(lambda b: st.tuples(st.just(b), contributions_to(b))), st.data())
def test_shared_counts_never_exceed_room_or_pool_and_leave_nothing_that_fits(case, data):
    budget, contributions = case
    room = {name: data.draw(st.integers(0, size)) for name, size in budget.sizes.items()}
    pool = data.draw(st.integers(0, 2 * budget.cost(budget.sizes)))
    counts = shared_counts(contributions, room, budget, pool)
    assert all(0 <= counts[name] <= room[name] for name in room)
    gap = pool - budget.cost(counts)
    assert 0 <= gap < cheapest_left({name: room[name] - counts[name] for name in room}, budget)


@settings(max_examples=80, deadline=None)
@given(
    budgets().flatmap(lambda b: st.tuples(st.just(b), contributions_to(b))), st.floats(0, 1), st.data()
)
def test_plan_update_keeps_floors_rooms_and_target(case, p, data):
    budget, contributions = case
    active = dict(budget.floors)
    for name, more in common_counts(budget).items():
        active[name] = data.draw(st.integers(active[name], more))
    churn = planned(contributions, active, budget, p)
    after = {name: active[name] - churn.dropped[name] + churn.grown[name] for name in active}
    for name, size in budget.sizes.items():
        assert 0 <= churn.dropped[name] <= p * active[name]
        assert 0 <= churn.grown[name] <= size - active[name]
    gap = budget.target - budget.cost(after)
    assert within(after, budget)
    assert 0 <= gap < cheapest_left({n: budget.sizes[n] - after[n] for n in after}, budget)
    assert not in_weights(budget) or gap == 0
