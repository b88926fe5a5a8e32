"""Transport against a linear program, and against plain definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog

from topd_ray.errors import DataError
from topd_ray.objective import entropic_transport, exact_transport, ground_cost, solve_windows, unit_embeddings

SHAPES = [(1, 1), (1, 5), (5, 1), (3, 3), (4, 7), (7, 4), (6, 6), (2, 3)]


def linear_program(cost: NDArray[np.float64]) -> float:
    num_student, num_teacher = cost.shape
    rows = np.kron(np.eye(num_student), np.ones(num_teacher))
    columns = np.kron(np.ones(num_student), np.eye(num_teacher))
    marginals = np.concatenate([np.full(num_student, 1 / num_student), np.full(num_teacher, 1 / num_teacher)])
    solved = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals, method="highs")
    assert solved.success
    return float(solved.fun)


def assert_coupling(plan: NDArray[np.float64], shape: tuple[int, int]) -> None:
    assert plan.shape == shape and plan.min() >= 0.0
    np.testing.assert_allclose(plan.sum(1), 1 / shape[0], atol=1e-9, rtol=0)
    np.testing.assert_allclose(plan.sum(0), 1 / shape[1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_exact_matches_linear_program(shape: tuple[int, int], seed: int) -> None:
    cost = np.random.default_rng(seed).random(shape) * 2
    result = exact_transport(cost)
    assert_coupling(result.plan_ST, shape)
    assert result.distance == pytest.approx(linear_program(cost), abs=1e-9)
    assert result.distance == pytest.approx(float((result.plan_ST * cost).sum()), abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000))
def test_exact_with_ties_matches_linear_program(num_student: int, num_teacher: int, seed: int) -> None:
    cost = np.random.default_rng(seed).integers(0, 3, (num_student, num_teacher)).astype(np.float64)
    result = exact_transport(cost)
    assert_coupling(result.plan_ST, cost.shape)
    assert result.distance == pytest.approx(linear_program(cost), abs=1e-9)


def test_a_plan_is_student_by_teacher() -> None:
    cost = np.array([[0.0, 2.0, 1.0], [1.0, 0.0, 1.0]])
    plan = exact_transport(cost).plan_ST
    np.testing.assert_allclose(plan, [[1 / 3, 0, 1 / 6], [0, 1 / 3, 1 / 6]], atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epsilon", [1.0, 0.05, 0.005])
def test_entropic_is_a_coupling_and_close_to_exact(shape: tuple[int, int], epsilon: float) -> None:
    cost = np.random.default_rng(1).random(shape) * 2
    result = entropic_transport(cost, epsilon)
    exact = exact_transport(cost).distance
    assert_coupling(result.plan_ST, shape)
    # The optimal entropic plan costs at most epsilon * (entropy of a coupling) more than the exact one.
    assert exact - 1e-9 <= result.distance <= exact + epsilon * np.log(shape[0] * shape[1]) + 1e-5


def test_entropic_satisfies_its_optimality_condition() -> None:
    cost, epsilon = np.random.default_rng(2).random((4, 6)), 0.1
    plan = entropic_transport(cost, epsilon, tolerance=1e-12, max_iterations=20_000).plan_ST
    # log plan + cost / epsilon = u_i + v_j: every 2 x 2 minor of it vanishes.
    potential = np.log(plan) + cost / epsilon
    minors = potential - potential[:, :1] - potential[:1, :] + potential[0, 0]
    np.testing.assert_allclose(minors, 0.0, atol=1e-6)


def test_entropic_stopped_early_keeps_its_marginals() -> None:
    cost = np.random.default_rng(3).random((9, 5)) * 2
    assert_coupling(entropic_transport(cost, 0.001, max_iterations=1).plan_ST, (9, 5))


def test_cost_is_one_minus_cosine() -> None:
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    unit = unit_embeddings(weight)
    student, teacher = np.array([1, 2, 2], np.int32), np.array([2, 3, 0, 7], np.int32)
    cost = ground_cost(student, teacher, unit)
    cosine = torch.nn.functional.cosine_similarity(
        weight[student][:, None].double(), weight[teacher][None].double(), -1
    )
    np.testing.assert_allclose(cost, 1 - cosine.numpy(), atol=1e-6)
    assert cost.shape == (3, 4) and cost.dtype == np.float64
    assert cost[1, 0] == 0.0 and cost[2, 0] == 0.0


def test_zero_embedding_costs_one() -> None:
    weight = torch.eye(3)
    weight[1] = 0
    unit = unit_embeddings(weight)
    assert torch.equal(unit, weight)
    np.testing.assert_array_equal(ground_cost([0, 1], [0, 1, 2], unit), [[0, 1, 1], [1, 0, 1]])


def test_equal_windows_are_at_distance_zero_exactly() -> None:
    unit = unit_embeddings(torch.randn(50, 7, generator=torch.Generator().manual_seed(1)).bfloat16())
    ids = np.array([3, 3, 9, 49, 3])
    assert exact_transport(ground_cost(ids, ids, unit)).distance == 0.0
    assert exact_transport(ground_cost(ids, ids[::-1], unit)).distance == 0.0


def test_repeated_tokens_share_their_mass() -> None:
    unit = unit_embeddings(torch.eye(4))
    result = exact_transport(ground_cost([0, 0, 1], [0, 1, 2, 2], unit))
    assert result.distance == pytest.approx(0.5)


def test_windows_are_solved_in_order() -> None:
    rng = np.random.default_rng(4)
    costs = [rng.random(shape) for shape in SHAPES]
    for method, solve in (("exact", exact_transport), ("entropic", lambda cost: entropic_transport(cost, 0.1))):
        for result, cost in zip(solve_windows(costs, method, 0.1), costs, strict=True):
            np.testing.assert_array_equal(result.plan_ST, solve(cost).plan_ST)
    assert solve_windows([], "exact") == []


@pytest.mark.parametrize("cost", [np.zeros((0, 3)), np.zeros(3), np.array([[np.nan]]), np.array([[1.0, np.inf]])])
def test_refuses_costs(cost: NDArray[np.float64]) -> None:
    with pytest.raises(DataError):
        exact_transport(cost)
    with pytest.raises(DataError):
        entropic_transport(cost, 0.1)


def test_refuses_ids_and_epsilon() -> None:
    unit = torch.eye(3)
    for student, teacher in (([3], [0]), ([0], [-1]), ([], [0])):
        with pytest.raises(DataError):
            ground_cost(student, teacher, unit)
    with pytest.raises(DataError, match="epsilon"):
        entropic_transport(np.ones((2, 2)), 0.0)
