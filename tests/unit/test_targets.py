"""Folded targets against the window-by-window formula; forks, the running quantile, caps."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topd_ray.errors import DataError
from topd_ray.objective import (
    RunningQuantile,
    Window,
    cap_mask,
    classify,
    entropic_transport,
    exact_transport,
    fold_windows,
    unfold,
    window_targets,
)
from topd_ray.types import SparseTargets

VOCABULARY = 6


def random_windows(seed: int, num_windows: int, num_tokens: int, entropic: bool = False) -> list[Window]:
    rng = np.random.default_rng(seed)
    windows = []
    for position in rng.choice(num_tokens, num_windows, replace=False).tolist():
        num_student = int(rng.integers(1, min(5, num_tokens - position) + 1))
        num_teacher = int(rng.integers(1, 6))
        cost = rng.random((num_student, num_teacher))
        result = entropic_transport(cost, 0.2) if entropic else exact_transport(cost)
        windows.append(
            Window(
                position=position,
                student_ids=rng.integers(0, VOCABULARY, num_student).astype(np.int32),
                teacher_ids=rng.integers(0, VOCABULARY, num_teacher).astype(np.int32),
                plan_ST=result.plan_ST,
                distance=result.distance,
            )
        )
    return windows


def soft_target(window: Window, i: int) -> dict[int, float]:
    target: dict[int, float] = {}
    for j, token in enumerate(window.teacher_ids.tolist()):
        target[token] = target.get(token, 0.0) + float(window.plan_ST[i, j]) * len(window.student_ids)
    return {token: weight for token, weight in target.items() if weight > 1e-8}


def window_by_window(windows: list[Window], log_probs: np.ndarray) -> float:
    total = 0.0
    for window in windows:
        for i in range(len(window.student_ids)):
            for token, weight in soft_target(window, i).items():
                total += weight * (np.log(weight) - log_probs[window.position + i, token])
    return total


def folded(targets: SparseTargets, log_probs: np.ndarray) -> float:
    total = -float(targets.entropy.sum(dtype=np.float64))
    for position in range(len(log_probs)):
        total += sum(-weight * log_probs[position, token] for token, weight in unfold(targets, position).items())
    return total


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(0, 12), st.booleans())
def test_folding_is_the_sum_over_windows(seed: int, num_windows: int, entropic: bool) -> None:
    num_tokens = 12
    windows = random_windows(seed, num_windows, num_tokens, entropic)
    logits = np.random.default_rng(seed).normal(size=(num_tokens, VOCABULARY))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = fold_windows(windows, num_tokens)
    assert folded(targets, log_probs) == pytest.approx(window_by_window(windows, log_probs), abs=2e-5)
    assert targets.num_guided == pytest.approx(sum(len(window.student_ids) for window in windows), abs=1e-5)
    for position in range(num_tokens):
        covering = [w for w in windows if w.position <= position < w.position + len(w.student_ids)]
        expected: dict[int, float] = {}
        for window in covering:
            for token, weight in soft_target(window, position - window.position).items():
                expected[token] = expected.get(token, 0.0) + weight
        assert unfold(targets, position) == pytest.approx(expected, abs=1e-6)


def test_order_of_windows_changes_nothing() -> None:
    windows = random_windows(5, 10, 14, entropic=True)
    first, second = fold_windows(windows, 14), fold_windows(windows[::-1], 14)
    for name in ("indptr", "token_ids", "weights", "entropy"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert [first.indptr.dtype, first.token_ids.dtype, first.weights.dtype] == [np.int64, np.int32, np.float32]


def test_window_targets_of_a_rectangular_plan() -> None:
    plan = np.array([[1 / 3, 1 / 12, 1 / 12], [0, 1 / 4, 1 / 4]])
    targets = window_targets(plan, [9, 4, 9])
    assert targets.token_ids.tolist() == [4, 9]
    np.testing.assert_allclose(targets.weights_SU, [[1 / 6, 5 / 6], [1 / 2, 1 / 2]], atol=1e-12)
    expected = [-(1 / 6) * np.log(1 / 6) - (5 / 6) * np.log(5 / 6), np.log(2)]
    np.testing.assert_allclose(targets.entropy_S, expected, atol=1e-12)


def test_every_soft_target_is_a_distribution() -> None:
    for window in random_windows(7, 12, 12, entropic=True):
        targets = window_targets(window.plan_ST, window.teacher_ids)
        np.testing.assert_allclose(targets.weights_SU.sum(1), 1.0, atol=1e-12)
        assert (targets.weights_SU >= 0).all() and (targets.entropy_S >= 0).all()


def test_noise_of_a_dense_plan_is_dropped() -> None:
    targets = window_targets(np.array([[1.0 - 5e-9, 5e-9]]), [3, 4])
    np.testing.assert_array_equal(targets.weights_SU, [[1.0, 0.0]])
    assert targets.entropy_S.tolist() == [0.0]


def test_a_transposed_plan_is_refused() -> None:
    with pytest.raises(DataError, match="student, teacher"):
        window_targets(np.full((2, 3), 1 / 6), [1, 2])
    with pytest.raises(DataError, match="not a feasible plan"):
        window_targets(np.eye(3), [1, 2, 3])


def test_a_window_past_the_end_is_refused() -> None:
    window = Window(
        position=3,
        student_ids=np.array([1, 2], np.int32),
        teacher_ids=np.array([1], np.int32),
        plan_ST=np.full((2, 1), 0.5),
        distance=0.1,
    )
    assert fold_windows([window], 5).num_guided == 2.0
    with pytest.raises(DataError, match="ends at 5"):
        fold_windows([window], 4)


def test_no_windows_guide_nothing() -> None:
    targets, empty = fold_windows([], 4), SparseTargets.empty(4)
    for name in ("indptr", "token_ids", "weights", "entropy"):
        np.testing.assert_array_equal(getattr(targets, name), getattr(empty, name))
    assert unfold(targets, 3) == {}
    with pytest.raises(DataError, match="outside"):
        unfold(targets, 4)


def test_classify_is_strict() -> None:
    assert classify([0.1, 0.2, 0.3], 0.2).tolist() == [False, False, True]
    assert classify([], 0.2).tolist() == []


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 2), min_size=1, max_size=30), st.floats(0, 1), st.integers(1, 10))
def test_running_quantile_of_the_latest(distances: list[float], quantile: float, window: int) -> None:
    running = RunningQuantile(quantile, window)
    running.update(distances[:3])
    running.update(distances[3:])
    assert running.value == pytest.approx(float(np.quantile(distances[-window:], quantile)), abs=1e-12)
    restored = RunningQuantile.from_state(json.loads(json.dumps(running.state())))
    restored.update([0.5])
    running.update([0.5])
    assert restored.value == running.value and restored.state() == running.state()


def test_running_quantile_before_any_distance() -> None:
    running = RunningQuantile(0.3, 8)
    assert running.value == 0.0
    running.update(np.array([], np.float32))
    assert running.value == 0.0
    assert classify([0.0, 0.01], running.value).tolist() == [False, True]
    with pytest.raises(DataError, match="finite"):
        running.update([0.1, float("nan")])
    assert running.state()["distances"] == []
    with pytest.raises(DataError, match="quantile"):
        RunningQuantile(1.5, 8)


POSITIONS, DISTANCES = [0, 2, 5, 6, 9], [0.1, 0.5, 0.2, 0.6, 0.7]


def test_low_ot_caps_the_false_alarms() -> None:
    mask = cap_mask(POSITIONS, DISTANCES, 0.3, "low_ot", 10, np.random.default_rng(0))
    assert np.flatnonzero(mask).tolist() == [0, 5]


def test_matched_high_ot_caps_as_many_forks() -> None:
    seen = set()
    for seed in range(30):
        mask = cap_mask(POSITIONS, DISTANCES, 0.3, "matched_high_ot", 10, np.random.default_rng(seed))
        capped = tuple(np.flatnonzero(mask).tolist())
        assert len(capped) == 2 and set(capped) <= {2, 6, 9}
        seen.add(capped)
    assert seen == {(2, 6), (2, 9), (6, 9)}
    again = cap_mask(POSITIONS, DISTANCES, 0.3, "matched_high_ot", 10, np.random.default_rng(29))
    np.testing.assert_array_equal(mask, again)


@pytest.mark.parametrize(
    ("threshold", "mode", "expected"),
    [
        (0.65, "matched_high_ot", [9]),
        (1.0, "matched_high_ot", []),
        (1.0, "low_ot", POSITIONS),
        (0.0, "low_ot", []),
        (0.0, "matched_high_ot", []),
        (0.3, "none", []),
    ],
)
def test_caps_at_the_edges(threshold: float, mode: str, expected: list[int]) -> None:
    mask = cap_mask(POSITIONS, DISTANCES, threshold, mode, 10, np.random.default_rng(0))  # type: ignore[arg-type]
    assert np.flatnonzero(mask).tolist() == expected


def test_caps_without_candidates() -> None:
    for mode in ("none", "low_ot", "matched_high_ot"):
        mask = cap_mask([], [], 0.3, mode, 4, np.random.default_rng(0))  # type: ignore[arg-type]
        assert mask.tolist() == [False] * 4
    with pytest.raises(DataError, match="one each"):
        cap_mask([1, 2], [0.1], 0.3, "low_ot", 4, np.random.default_rng(0))
