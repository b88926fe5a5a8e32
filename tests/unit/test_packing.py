"""Which trajectories share a micro-batch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topd_ray.engines.packing import QUADRATIC_TOKENS, balance, cost, pack
from topd_ray.errors import DataError

lengths_lists = st.lists(st.integers(1, 700), max_size=60)


@given(lengths=lengths_lists, budget=st.integers(1, 1500))
def test_budgets_hold_and_nobody_is_lost(lengths: list[int], budget: int) -> None:
    parts = pack(lengths, budget)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or sum(lengths[index] for index in part) <= budget
    costs = [sum(cost(lengths[index]) for index in part) for part in parts]
    assert costs == sorted(costs, reverse=True)


@given(lengths=lengths_lists, budget=st.integers(700, 1500))
def test_few_micro_batches(lengths: list[int], budget: int) -> None:
    """At least the tokens over the budget, and never two that one could hold."""
    parts = pack(lengths, budget)
    filled = sorted(sum(lengths[index] for index in part) for part in parts)
    assert len(parts) <= 2 * -(-sum(lengths) // budget)
    assert len(filled) < 2 or sum(filled) > budget * len(filled) / 2


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60), budget=st.integers(2000, 4000))
def test_micro_batches_cost_about_the_same(lengths: list[int], budget: int) -> None:
    """Where the budget is many trajectories, the last one to be placed evens them out unless the parts are full."""
    parts = pack(lengths, budget)
    costs = [sum(cost(lengths[index]) for index in part) for part in parts]
    room = min(budget - sum(lengths[index] for index in part) for part in parts)
    assert costs[0] - costs[-1] <= cost(100) or room < 100


def test_micro_batches_are_even_rather_than_full() -> None:
    assert pack([6, 4, 4, 3, 3], 14) == [[1, 2, 4], [0, 3]]
    assert [sum([50, 40, 30, 20][index] for index in part) for part in pack([50, 40, 30, 20], 120)] == [70, 70]


def test_first_fit_where_evening_out_finds_no_room() -> None:
    lengths = [6, 5, 4, 3, 2]
    assert sorted(sum(lengths[index] for index in part) for part in pack(lengths, 10)) == [10, 10]


def test_longer_than_the_budget_travels_alone() -> None:
    assert pack([30, 5, 5, 90], 20) == [[3], [0], [1, 2]]


def test_a_budget_of_one_packs_nothing() -> None:
    assert pack([1, 1, 2, 7], 1) == [[3], [2], [0], [1]]


def test_nothing_needs_no_micro_batch() -> None:
    assert pack([], 10) == []
    assert balance([], 2) == [[], []]


def test_equals_keep_their_order() -> None:
    assert pack([3, 3, 3], 9) == [[0, 1, 2]]
    assert balance([1.0, 1.0, 1.0], 2) == [[0, 2], [1]]


def test_attention_counts_as_much_as_the_rest_at_the_stated_length() -> None:
    assert cost(QUADRATIC_TOKENS) == 2 * QUADRATIC_TOKENS


@pytest.mark.parametrize("budget", [0, -3])
def test_a_budget_of_nothing_is_refused(budget: int) -> None:
    with pytest.raises(DataError, match=f"budget is {budget} tokens, and should be at least 1"):
        pack([1], budget)


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(DataError, match="lengths holds 0, and a sequence has at least 1 token"):
        pack([2, 0], 5)
