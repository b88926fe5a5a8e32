"""Transport against a linear program, against POT, and against plain definitions."""

import re
from itertools import pairwise
from pathlib import Path
from threading import Thread
from time import perf_counter

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.optimize import linprog

from topd_ray.errors import DataError
from topd_ray.objective import (
    TransportResult,
    entropic_transport,
    exact_transport,
    ground_cost,
    pad_windows,
    solve_windows,
    unit_embeddings,
)

Array = NDArray[np.float64]
SHAPES = [(1, 1), (1, 5), (5, 1), (3, 3), (4, 7), (7, 4), (6, 6), (2, 3), (6, 4), (9, 12)]
PAIR = Path(__file__).parents[2] / "topd_ray/demo/pair/teacher"


def linear_program(cost: Array) -> float:
    num_student, num_teacher = cost.shape
    rows = np.kron(np.eye(num_student), np.ones(num_teacher))
    columns = np.kron(np.ones(num_student), np.eye(num_teacher))
    marginals = np.concatenate([np.full(num_student, 1 / num_student), np.full(num_teacher, 1 / num_teacher)])
    solved = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals, method="highs")
    assert solved.success
    return float(solved.fun)


def padded(costs: list[Array], filler: float = 0.0, extra: int = 0) -> tuple[Array, Array, Array]:
    shape = max(len(cost) for cost in costs) + extra, max(cost.shape[1] for cost in costs) + extra
    batch = np.full((len(costs), *shape), filler)
    for m, cost in enumerate(costs):
        batch[m, : len(cost), : cost.shape[1]] = cost
    return batch, np.array([len(cost) for cost in costs]), np.array([cost.shape[1] for cost in costs])


def assert_couplings(result: TransportResult, costs: list[Array]) -> None:
    for m, cost in enumerate(costs):
        plan = result.plan_MST[m].numpy()
        assert plan.min() >= 0.0
        rows, columns = np.zeros(len(plan)), np.zeros(plan.shape[1])
        rows[: len(cost)], columns[: cost.shape[1]] = 1 / len(cost), 1 / cost.shape[1]
        np.testing.assert_allclose(plan.sum(1), rows, atol=1e-12, rtol=0)
        np.testing.assert_allclose(plan.sum(0), columns, atol=1e-12, rtol=0)
        spent = float((plan[: len(cost), : cost.shape[1]] * cost).sum())
        assert float(result.distance_M[m]) == pytest.approx(spent, abs=1e-12)


def random_costs(seed: int, levels: int | None = None) -> list[Array]:
    rng = np.random.default_rng(seed)
    if levels is None:
        return [rng.random(shape) * 2 for shape in SHAPES]
    return [rng.integers(0, levels, shape).astype(np.float64) for shape in SHAPES]


@pytest.mark.parametrize("levels", [None, 1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_exact_matches_a_linear_program(levels: int | None, seed: int) -> None:
    costs = random_costs(seed, levels)
    result = exact_transport(*padded(costs))
    assert_couplings(result, costs)
    np.testing.assert_allclose(result.distance_M, [linear_program(cost) for cost in costs], atol=1e-9, rtol=0)
    assert result.residual_M.tolist() == [0.0] * len(costs)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=5), st.integers(0, 9999), st.integers(1, 40)
)
def test_exact_matches_pot_with_ties(shapes: list[tuple[int, int]], seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    costs = [rng.integers(-levels, levels + 1, shape) / 7 for shape in shapes]
    if not costs:
        return
    result = exact_transport(*padded(costs))
    assert_couplings(result, costs)
    # Shifted costs shift the distance. POT finds some problems of negative costs alone infeasible.
    expected = [
        ot.emd2(np.full(len(c), 1 / len(c)), np.full(c.shape[1], 1 / c.shape[1]), c - c.min()) + c.min() for c in costs
    ]
    np.testing.assert_allclose(result.distance_M, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shapes", [[(50, 50)] * 12, [(50, 49), (49, 50), (37, 12), (12, 37), (5, 50), (50, 1)] * 2])
@pytest.mark.parametrize("kind", ["random", "clustered", "pair"])
def test_exact_on_long_windows_of_real_embeddings(shapes: list[tuple[int, int]], kind: str) -> None:
    rng = np.random.default_rng(0)
    weight = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    if kind == "clustered":
        weight = weight[torch.from_numpy(rng.integers(0, 30, 1000))] + 0.3 * weight
    if kind == "pair":
        weight = next(v for k, v in load_file(PAIR / "model.safetensors").items() if "embed" in k)
    sides = [pad_windows([rng.integers(0, len(weight), shape[side]) for shape in shapes]) for side in (0, 1)]
    (student, student_lengths), (teacher, teacher_lengths) = sides
    cost = ground_cost(student, teacher, unit_embeddings(weight), student_lengths, teacher_lengths)
    result = exact_transport(cost, student_lengths, teacher_lengths)
    costs = [cost[m, :s, :t].numpy() for m, (s, t) in enumerate(shapes)]
    assert_couplings(result, costs)
    expected = [ot.emd2(np.full(len(c), 1 / len(c)), np.full(c.shape[1], 1 / c.shape[1]), c) for c in costs]
    np.testing.assert_allclose(result.distance_M, expected, atol=1e-9, rtol=0)


def test_a_plan_is_student_by_teacher() -> None:
    cost = np.array([[[0.0, 2.0, 1.0], [1.0, 0.0, 1.0]]])
    plan = exact_transport(cost).plan_MST[0]
    np.testing.assert_allclose(plan, [[1 / 3, 0, 1 / 6], [0, 1 / 3, 1 / 6]], atol=1e-12)


METHODS = [("exact", 0.05), ("entropic", 0.5), ("entropic", 0.05)]


@pytest.mark.parametrize(("method", "epsilon"), METHODS)
@pytest.mark.parametrize("filler", [0.0, -1e9, np.nan, np.inf])
def test_padding_changes_nothing(method, epsilon: float, filler: float) -> None:
    costs = random_costs(5)
    cost, student_lengths, teacher_lengths = padded(costs)
    result = solve_windows(cost, student_lengths, teacher_lengths, method=method, epsilon=epsilon)
    wider = solve_windows(*padded(costs, filler, extra=3), method=method, epsilon=epsilon)
    assert wider.plan_MST[:, -3:].abs().sum() == 0.0 and wider.plan_MST[:, :, -3:].abs().sum() == 0.0
    np.testing.assert_allclose(wider.plan_MST[:, :-3, :-3], result.plan_MST, atol=1e-12, rtol=0)
    for m, single in enumerate(costs):
        alone = solve_windows(single[None], method=method, epsilon=epsilon)
        part = result.plan_MST[m, : len(single), : single.shape[1]]
        np.testing.assert_allclose(part, alone.plan_MST[0], atol=1e-12, rtol=0)


@settings(max_examples=25)
@given(st.integers(0, 9999), st.sampled_from(METHODS), st.permutations(range(len(SHAPES))))
def test_order_of_windows_changes_nothing(seed: int, method: tuple, order: list[int]) -> None:
    cost, student_lengths, teacher_lengths = padded(random_costs(seed, levels=4))
    options = {"method": method[0], "epsilon": method[1]}
    result = solve_windows(cost, student_lengths, teacher_lengths, **options)
    again = solve_windows(cost[order], student_lengths[order], teacher_lengths[order], **options)
    np.testing.assert_allclose(again.plan_MST, result.plan_MST[order], atol=1e-13, rtol=0)
    twice = solve_windows(cost, student_lengths, teacher_lengths, **options)
    assert torch.equal(twice.plan_MST, result.plan_MST) and torch.equal(twice.distance_M, result.distance_M)


@settings(max_examples=25)
@given(st.integers(0, 9999), st.integers(1, 30))
def test_distance_is_symmetric_in_a_shared_cost(seed: int, levels: int) -> None:
    cost, student_lengths, teacher_lengths = padded([cost / 3 for cost in random_costs(seed, levels)])
    forth = exact_transport(cost, student_lengths, teacher_lengths)
    back = exact_transport(cost.transpose(0, 2, 1), teacher_lengths, student_lengths)
    np.testing.assert_allclose(forth.distance_M, back.distance_M, atol=1e-12, rtol=0)


@pytest.mark.parametrize("epsilon", [1.0, 0.05, 0.005])
@pytest.mark.parametrize("max_iterations", [1, 40, 2000])
def test_entropic_is_a_coupling_within_its_stated_bias(epsilon: float, max_iterations: int) -> None:
    costs = random_costs(1)
    batch = padded(costs)
    result = entropic_transport(*batch, epsilon=epsilon, max_iterations=max_iterations)
    assert_couplings(result, costs)
    exact = exact_transport(*batch).distance_M
    smaller = torch.tensor([float(min(cost.shape)) for cost in costs])
    bias = epsilon * smaller.log() + 4 * result.residual_M * torch.tensor([cost.max() for cost in costs])
    assert (result.distance_M >= exact - 1e-12).all() and (result.distance_M <= exact + bias + 1e-12).all()


def test_entropic_converges_or_says_how_far_it_is() -> None:
    batch = padded(random_costs(2))
    assert entropic_transport(*batch, epsilon=0.2, tolerance=1e-9).residual_M.max() <= 1e-9
    assert entropic_transport(*batch, epsilon=0.001, max_iterations=3).residual_M.max() > 0.01


def test_entropic_satisfies_its_optimality_condition() -> None:
    cost, epsilon = np.random.default_rng(2).random((3, 4, 6)), 0.1
    plan = entropic_transport(cost, epsilon=epsilon, tolerance=1e-12, max_iterations=20_000).plan_MST.numpy()
    # log plan + cost / epsilon = u_i + v_j: every 2 x 2 minor of it vanishes.
    potential = np.log(plan) + cost / epsilon
    minors = potential - potential[:, :, :1] - potential[:, :1, :] + potential[:, :1, :1]
    np.testing.assert_allclose(minors, 0.0, atol=1e-6)


def test_entropic_matches_pot() -> None:
    cost = np.random.default_rng(3).random((9, 5))
    plan = entropic_transport(cost[None], epsilon=0.1, tolerance=1e-13, max_iterations=10_000).plan_MST[0]
    expected = ot.sinkhorn(np.full(9, 1 / 9), np.full(5, 1 / 5), cost, 0.1, method="sinkhorn_log", stopThr=1e-13)
    np.testing.assert_allclose(plan, expected, atol=1e-9)


def test_nothing_has_a_gradient() -> None:
    cost = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    for result in (exact_transport(cost), entropic_transport(cost, epsilon=0.1)):
        assert not result.plan_MST.requires_grad and not result.distance_M.requires_grad
    assert not ground_cost([[0, 1]], [[2]], unit_embeddings(weight)).requires_grad


def test_cost_is_one_minus_cosine() -> None:
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    student, teacher = np.array([[1, 2, 2], [0, 4, 7]]), np.array([[2, 3, 0, 7], [4, 4, 1, 1]])
    cost = ground_cost(student, teacher, unit_embeddings(weight))
    cosine = torch.nn.functional.cosine_similarity(weight[student][:, :, None].double(), weight[teacher][:, None], -1)
    np.testing.assert_allclose(cost, 1 - cosine.numpy(), atol=1e-6)
    assert cost.shape == (2, 3, 4) and cost.dtype == torch.float64
    assert cost[0, 1, 0] == 0.0 and cost[0, 2, 0] == 0.0
    assert torch.equal(cost * 2**24, (cost * 2**24).round())


def test_windows_of_few_repeats_cost_the_same() -> None:
    unit = unit_embeddings(torch.randn(5000, 6, generator=torch.Generator().manual_seed(0)))
    rng = np.random.default_rng(0)
    student, teacher = rng.integers(0, 5000, (40, 3)), rng.integers(0, 5000, (40, 4))
    cost = ground_cost(student, teacher, unit)
    for m in range(40):
        assert torch.equal(cost[m], ground_cost(student[m : m + 1], teacher[m : m + 1], unit)[0])


def test_zero_embedding_costs_one() -> None:
    weight = torch.eye(3)
    weight[1] = 0
    unit = unit_embeddings(weight)
    assert torch.equal(unit, weight)
    assert ground_cost([[0, 1]], [[0, 1, 2]], unit).tolist() == [[[0, 1, 1], [1, 0, 1]]]


def test_equal_windows_are_at_distance_zero_exactly() -> None:
    unit = unit_embeddings(torch.randn(50, 7, generator=torch.Generator().manual_seed(1)).bfloat16())
    ids = np.array([[3, 3, 9, 49, 3]])
    assert exact_transport(ground_cost(ids, ids, unit)).distance_M.tolist() == [0.0]
    assert exact_transport(ground_cost(ids, ids[:, ::-1], unit)).distance_M.tolist() == [0.0]


def test_repeated_tokens_share_their_mass() -> None:
    unit = unit_embeddings(torch.eye(4))
    assert exact_transport(ground_cost([[0, 0, 1]], [[0, 1, 2, 2]], unit)).distance_M.tolist() == [0.5]


def test_ids_past_the_length_are_not_read() -> None:
    unit = unit_embeddings(torch.eye(4))
    ids = np.array([[1, 2, -100], [3, -100, 99]])
    cost = ground_cost(ids, ids, unit, [2, 1], [2, 1])
    assert cost.tolist() == [[[0, 1, 0], [1, 0, 0], [0, 0, 0]], [[0, 0, 0]] * 3]


def test_no_windows_are_legal() -> None:
    ids, lengths = pad_windows([], 5)
    cost = ground_cost(ids, ids, torch.eye(3), lengths, lengths)
    assert ids.shape == (0, 5) and cost.shape == (0, 5, 5)
    for method in ("exact", "entropic"):
        result = solve_windows(cost, lengths, lengths, method=method)
        assert result.plan_MST.shape == (0, 5, 5) and result.distance_M.shape == (0,)


def test_windows_are_padded_with_zeros() -> None:
    ids, lengths = pad_windows([[7, 8], np.array([9], np.int32)], 3)
    assert ids.tolist() == [[7, 8, 0], [9, 0, 0]] and lengths.tolist() == [2, 1]
    assert pad_windows([[7, 8], [9]])[0].tolist() == [[7, 8], [9, 0]]


def test_other_threads_run_meanwhile() -> None:
    """Two threads: how late one that only waits wakes up, while the other solves for a second or so."""
    cost = np.random.default_rng(0).random((400, 50, 50))
    exact_transport(cost[:1])
    thread = Thread(target=lambda: exact_transport(cost[np.arange(4000) % 400]))
    thread.start()
    ticks = [perf_counter()]
    while thread.is_alive():
        ticks.append(perf_counter())
    thread.join()
    # Holding the interpreter's lock for a whole solve would leave one gap as long as all of it.
    assert max(after - before for before, after in pairwise(ticks)) < 0.5 * (ticks[-1] - ticks[0])


@pytest.mark.parametrize(
    ("cost", "lengths", "message"),
    [
        (np.zeros((2, 3)), {}, "cost_MST: shape (2, 3), want [windows, student, teacher]"),
        (np.zeros((2, 0, 3)), {}, "cost_MST: shape (2, 0, 3), want [windows, student, teacher] with no empty window"),
        (np.full((1, 2, 2), np.nan), {}, "cost_MST: nan at [0, 0, 0], want finite"),
        (np.array([[[1.0, np.inf]]]), {}, "cost_MST: inf at [0, 0, 1], want finite"),
        (np.array([[[1.0, -1e300]]]), {}, "cost_MST: -1e+300 at [0, 0, 1], want finite"),
        (
            np.zeros((2, 3, 4)),
            {"student_lengths_M": [3]},
            "student_lengths_M: int64 of shape (1,), want 2 whole numbers",
        ),
        (np.zeros((1, 3, 4)), {"student_lengths_M": [4]}, "student_lengths_M: 4..4, want 1 to the padded width 3"),
        (np.zeros((1, 3, 4)), {"teacher_lengths_M": [0]}, "teacher_lengths_M: 0..0, want 1 to the padded width 4"),
        (np.zeros((1, 3, 4)), {"teacher_lengths_M": [1.5]}, "teacher_lengths_M: float64 of shape (1,), want 1 whole"),
    ],
)
def test_refuses_problems(cost: Array, lengths: dict, message: str) -> None:
    for method in ("exact", "entropic"):
        with pytest.raises(DataError, match=re.escape(message)):
            solve_windows(cost, **lengths, method=method)


def test_refuses_parameters() -> None:
    cost = np.ones((1, 2, 2))
    for epsilon in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(DataError, match="epsilon: found"):
            entropic_transport(cost, epsilon=epsilon)
    with pytest.raises(DataError, match="tolerance: found -1"):
        entropic_transport(cost, epsilon=0.1, tolerance=-1.0)
    with pytest.raises(DataError, match="max_iterations is 0"):
        entropic_transport(cost, epsilon=0.1, max_iterations=0)
    with pytest.raises(DataError, match="method: found 'greedy', want exact or entropic"):
        solve_windows(cost, method="greedy")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([[3]], [[0]], "student_ids: 3..3, want ids of the embedding's 3 rows"),
        ([[0]], [[-1]], "teacher_ids: -1..-1, want ids"),
        ([0], [[0]], "student_ids: shape (1,), want [windows, tokens]"),
        ([[]], [[0]], "student_ids: shape (1, 0), want [windows, tokens] with no empty window"),
        ([[0.5]], [[0]], "student_ids: float64, want whole numbers"),
        ([[0], [1]], [[0]], "teacher_ids: 1 windows for 2 student windows"),
    ],
)
def test_refuses_ids(student: list, teacher: list, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        ground_cost(student, teacher, torch.eye(3))


def test_refuses_windows_and_embeddings() -> None:
    with pytest.raises(DataError, match=re.escape("windows[1]: shape (0,), want a vector of at least one")):
        pad_windows([[1], []])
    with pytest.raises(DataError, match=re.escape("windows[0]: 3 tokens, want at most width=2")):
        pad_windows([[1, 2, 3]], 2)
    with pytest.raises(DataError, match=re.escape("weight_VD has shape [3], and should have [V, D]")):
        unit_embeddings(torch.zeros(3))
    with pytest.raises(DataError, match="weight_VD: holds NaN"):
        unit_embeddings(torch.full((2, 2), torch.nan))
    with pytest.raises(DataError, match="weight_VD is a ndarray, and should be a tensor"):
        unit_embeddings(np.ones((2, 2)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1e-25, torch.float32),
        (1e-44, torch.float32),
        (3e38, torch.float32),
        (1e-60, torch.float64),
        (1e300, torch.float64),
    ],
)
def test_rows_of_any_magnitude_get_length_one(value: float, dtype: torch.dtype) -> None:
    unit = unit_embeddings(torch.tensor([[value, -value], [0.0, value], [0.0, 0.0]], dtype=dtype))
    root = 0.5**0.5
    torch.testing.assert_close(unit, torch.tensor([[root, -root], [0.0, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (torch.ones(3), "embedding_VD_unit has shape [3], and should have [V, D]"),
        (torch.ones(3, 4).int(), "embedding_VD_unit is of torch.int32, and should be of a float dtype"),
        (torch.eye(3) * torch.tensor([1.0, 3.0, 1.0]), "embedding_VD_unit: row 1 is of length 3, want 1 or 0"),
        (
            torch.tensor([[1.0, 0.0], [0.0, 1.0], [torch.nan, 0.0]]),
            "embedding_VD_unit: row 2 is of length nan, want 1 or 0",
        ),
    ],
)
def test_costs_need_unit_rows(embedding: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        ground_cost([[0, 1]], [[2, 0]], embedding)
    if embedding.ndim == 2 and embedding.is_floating_point():  # rows that are not read may hold anything
        assert ground_cost([[0]], [[0]], embedding).tolist() == [[[0.0]]]
