"""Folded targets against the window-by-window formula; forks, the running quantile, caps."""

import json
import re
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topd_ray.errors import DataError
from topd_ray.objective import (
    RunningQuantile,
    cap_mask,
    classify,
    entropic_transport,
    exact_transport,
    fold_windows,
    identity_plans,
    pad_windows,
    split_targets,
    unfold,
)
from topd_ray.types import SparseTargets

VOCABULARY = 6
PARTS = ("indptr", "token_ids", "weights", "entropy")


@dataclass(frozen=True)
class Windows:
    """Windows of one trajectory as `fold_windows` takes them."""

    plan: np.ndarray
    teacher_ids: np.ndarray
    positions: np.ndarray
    student_lengths: np.ndarray
    teacher_lengths: np.ndarray

    def at(self, rows: Any) -> "Windows":
        return Windows(*(getattr(self, field.name)[rows] for field in fields(self)))

    def fold(self, num_tokens: int) -> SparseTargets:
        plan, teacher_ids, positions, student_lengths, teacher_lengths = (getattr(self, f.name) for f in fields(self))
        return fold_windows(plan, teacher_ids, positions, num_tokens, student_lengths, teacher_lengths)

    def soft_target(self, m: int, i: int) -> dict[int, float]:
        """The paper's formula, one entry of the plan at a time."""
        target: dict[int, float] = {}
        for j in range(self.teacher_lengths[m]):
            token = int(self.teacher_ids[m, j])
            target[token] = target.get(token, 0.0) + float(self.plan[m, i, j]) * int(self.student_lengths[m])
        return {token: weight for token, weight in target.items() if weight > 1e-8}


def random_windows(seed: int, num_windows: int, num_tokens: int, entropic: bool = False) -> Windows:
    rng = np.random.default_rng(seed)
    positions = rng.choice(num_tokens, num_windows, replace=False)
    student_lengths = np.array([rng.integers(1, min(5, num_tokens - p) + 1) for p in positions], np.int64)
    teacher_ids, teacher_lengths = pad_windows(
        [rng.integers(0, VOCABULARY, rng.integers(1, 6)) for _ in positions], width=5
    )
    cost = rng.random((num_windows, 5, 5))
    if entropic:
        plan = entropic_transport(cost, student_lengths, teacher_lengths, epsilon=0.2).plan_MST
    else:
        plan = exact_transport(cost, student_lengths, teacher_lengths).plan_MST
    return Windows(plan.numpy(), teacher_ids, positions, student_lengths, teacher_lengths)


def window_by_window(windows: Windows, log_probs: np.ndarray) -> float:
    total = 0.0
    for m, position in enumerate(windows.positions):
        for i in range(windows.student_lengths[m]):
            for token, weight in windows.soft_target(m, i).items():
                total += weight * (np.log(weight) - log_probs[position + i, token])
    return total


def folded(targets: SparseTargets, log_probs: np.ndarray) -> float:
    total = -float(targets.entropy.sum(dtype=np.float64))
    for position, row in enumerate(unfold(targets)):
        total += sum(-weight * log_probs[position, token] for token, weight in row.items())
    return total


def assert_same(one: SparseTargets, other: SparseTargets) -> None:
    for part in PARTS:
        np.testing.assert_array_equal(getattr(one, part), getattr(other, part))


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(0, 12), st.booleans())
def test_folding_is_the_sum_over_windows(seed: int, num_windows: int, entropic: bool) -> None:
    num_tokens = 12
    windows = random_windows(seed, num_windows, num_tokens, entropic)
    logits = np.random.default_rng(seed).normal(size=(num_tokens, VOCABULARY))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = windows.fold(num_tokens)
    assert folded(targets, log_probs) == pytest.approx(window_by_window(windows, log_probs), abs=2e-5)
    assert targets.num_guided == pytest.approx(windows.student_lengths.sum(), abs=1e-5)
    expected: list[dict[int, float]] = [{} for _ in range(num_tokens)]
    for m, position in enumerate(windows.positions):
        for i in range(windows.student_lengths[m]):
            for token, weight in windows.soft_target(m, i).items():
                row = expected[position + i]
                row[token] = row.get(token, 0.0) + weight
    for found, wanted in zip(unfold(targets), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.permutations(range(10)), st.booleans())
def test_order_of_windows_changes_nothing(seed: int, order: list[int], entropic: bool) -> None:
    windows = random_windows(seed, 10, 14, entropic)
    targets = windows.fold(14)
    assert_same(windows.at(order).fold(14), targets)
    assert [getattr(targets, part).dtype for part in PARTS] == [np.int64, np.int32, np.float32, np.float32]
    for start, end in pairwise(targets.indptr):
        assert (np.diff(targets.token_ids[start:end]) > 0).all()


@pytest.mark.parametrize("filler", [0.0, 7.0, np.nan])
def test_padding_changes_nothing(filler: float) -> None:
    windows = random_windows(3, 8, 12, entropic=True)
    plan = np.full((8, 7, 9), filler)
    ids = np.full((8, 9), -100)
    for m in range(8):
        num_student, num_teacher = windows.student_lengths[m], windows.teacher_lengths[m]
        plan[m, :num_student, :num_teacher] = windows.plan[m, :num_student, :num_teacher]
        ids[m, :num_teacher] = windows.teacher_ids[m, :num_teacher]
    wider = replace(windows, plan=plan, teacher_ids=ids)
    assert_same(wider.fold(12), windows.fold(12))


def test_trajectories_fold_together_as_alone() -> None:
    parts = [(random_windows(1, 5, 9), 9), (random_windows(2, 0, 4), 4), (random_windows(3, 7, 7, True), 7)]
    offsets = np.cumsum([0] + [length for _, length in parts])
    together = Windows(
        *(np.concatenate([getattr(windows, field.name) for windows, _ in parts]) for field in fields(Windows))
    )
    starts = np.concatenate([windows.positions + at for (windows, _), at in zip(parts, offsets[:-1], strict=True)])
    targets = replace(together, positions=starts).fold(int(offsets[-1]))
    for found, (windows, length) in zip(split_targets(targets, [9, 4, 7]), parts, strict=True):
        assert_same(found, windows.fold(length))
    for lengths in ([9, 4], [9, 4, 8]):
        with pytest.raises(DataError, match=r"num_tokens: .* want lengths that add up to 20"):
            split_targets(targets, lengths)
    for lengths in ([24, -4], [19.5, 0.5]):
        with pytest.raises(DataError, match=r"num_tokens is .*, and should be a whole number of at least 0"):
            split_targets(targets, lengths)  # type: ignore[arg-type]


def one_window(
    plan: list[list[float]], teacher_ids: list[int], position: int = 0, num_tokens: int = 5
) -> SparseTargets:
    return fold_windows(np.array([plan]), [teacher_ids], [position], num_tokens)


def test_a_rectangular_plan_by_hand() -> None:
    targets = one_window([[1 / 3, 1 / 12, 1 / 12], [0, 1 / 4, 1 / 4]], [9, 4, 9], position=1)
    rows = unfold(targets)
    assert [list(row) for row in rows] == [[], [9, 4], [4, 9], [], []]
    assert rows[1] == pytest.approx({9: 5 / 6, 4: 1 / 6}, abs=1e-7)
    assert rows[2] == pytest.approx({4: 1 / 2, 9: 1 / 2}, abs=1e-7)
    entropy = -(1 / 6) * np.log(1 / 6) - (5 / 6) * np.log(5 / 6)
    np.testing.assert_allclose(targets.entropy, [0, entropy, np.log(2), 0, 0], atol=1e-7)


def test_noise_of_a_dense_plan_is_dropped() -> None:
    targets = one_window([[1.0 - 5e-9, 5e-9]], [3, 4])
    assert unfold(targets)[0] == {3: 1.0} and targets.entropy[0] == 0.0


def test_unfolded_targets_can_be_read() -> None:
    targets = one_window([[0.25, 0.125, 0.625]], [9, 4, 7])
    assert list(unfold(targets)[0].items()) == [(7, 0.625), (9, 0.25), (4, 0.125)]
    named = unfold(targets, lambda token: "?" if token in (4, 7) else chr(ord("a") + token))
    assert named == [{"?": 0.75, "j": 0.25}, {}, {}, {}, {}]


def test_no_windows_guide_nothing() -> None:
    targets = random_windows(0, 0, 4).fold(4)
    assert_same(targets, SparseTargets.empty(4))
    assert unfold(targets) == [{}, {}, {}, {}]


@pytest.mark.parametrize(
    ("plan", "ids", "positions", "lengths", "message"),
    [
        (np.eye(2), [[1, 2]], [0], {}, "shapes (2, 2), (1, 2), (1,), want [windows, student, teacher]"),
        (np.eye(2)[None] / 2, [[1, 2, 3]], [0], {}, "shapes (1, 2, 2), (1, 3), (1,), want"),
        (np.eye(2)[None] / 2, [[1, 2]], [0, 1], {}, "shapes (1, 2, 2), (1, 2), (2,), want"),
        (np.eye(2)[None] / 2, [[1, 2]], [3], {}, "positions_M: the window at 3 ends at 5, want it in the response's 4"),
        (np.eye(2)[None] / 2, [[1, 2]], [-1], {}, "positions_M: the window at -1 ends at 1"),
        (np.eye(2)[None], [[1, 2]], [0], {}, "plan_MST: rows times their window's S sum to 2..2, want 1"),
        (np.full((1, 3, 2), 1 / 2), [[1, 2]], [0], {}, "plan_MST: rows times their window's S sum to 3..3, want 1"),
        (np.array([[[1.5, -0.5]]]), [[1, 2]], [0], {}, "plan_MST: holds -0.5, want no negative entry"),
        (np.array([[[1.0, np.nan]]]), [[1, 2]], [0], {}, "plan_MST: holds nan"),
        (np.eye(2)[None] / 2, [[1, -2]], [0], {}, "teacher_ids_MT: -2..1, want token ids from 0"),
        (np.eye(2)[None] / 2, [[1, 0.5]], [0], {}, "teacher_ids_MT: float64, want whole numbers"),
        (
            np.eye(2)[None] / 2,
            [[1, 2]],
            [0],
            {"student_lengths_M": [3]},
            "student_lengths_M: 3..3, want 1 to the padded",
        ),
        (
            np.eye(2)[None] / 2,
            [[1, 2]],
            [0],
            {"teacher_lengths_M": [0]},
            "teacher_lengths_M: 0..0, want 1 to the padded",
        ),
        (np.eye(2)[None] / 2, [[1, 2]], [0], {"teacher_lengths_M": [1]}, "plan_MST: rows times their window's S sum"),
    ],
)
def test_refuses_windows(plan: np.ndarray, ids: list, positions: list, lengths: dict, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        fold_windows(plan, ids, positions, 4, **lengths)


def test_classify_is_strict() -> None:
    assert classify([0.1, 0.2, 0.3], 0.2).tolist() == [False, False, True]
    assert classify([], 0.2).tolist() == []
    for distances, threshold in (([0.1, np.nan], 0.2), ([0.1], np.nan)):
        with pytest.raises(DataError, match="want no NaN"):
            classify(distances, threshold)
    with pytest.raises(DataError, match=re.escape("distances_M: shape (1, 1), want a vector")):
        classify([[0.1]], 0.2)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 2), min_size=1, max_size=30), st.floats(0, 1), st.integers(1, 10))
def test_running_quantile_of_the_latest(distances: list[float], quantile: float, window: int) -> None:
    running = RunningQuantile(quantile, window)
    running.update(distances[:3])
    running.update(distances[3:])
    assert running.value == pytest.approx(float(np.quantile(distances[-window:], quantile)), abs=1e-12)
    restored = RunningQuantile(quantile, window)
    restored.update(json.loads(json.dumps(running.state()))["distances"])
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


@pytest.mark.parametrize(
    ("positions", "distances", "mode", "message"),
    [
        ([1, 2], [0.1], "low_ot", "positions_M: shape (2,) for (1,) distances, want one each"),
        ([4], [0.1], "low_ot", "positions_M: 4..4, want 0 to 3"),
        ([-1], [0.1], "low_ot", "positions_M: -1..-1, want 0 to 3"),
        ([1], [0.1], "high_ot", "mode: found 'high_ot', want one of none, low_ot, matched_high_ot"),
    ],
)
def test_refuses_caps(positions: list, distances: list, mode: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        cap_mask(positions, distances, 0.3, mode, 4, np.random.default_rng(0))  # type: ignore[arg-type]


ONE = np.eye(2)[None] / 2
HUGE = 2**63


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fold_windows(ONE, [[1, 2**31]], [0], 4),
            "teacher_ids_MT: 1..2147483648, want token ids from 0 within",
        ),
        (
            lambda: fold_windows(ONE, np.array([[1, HUGE]], np.uint64), [0], 4),
            "teacher_ids_MT: holds 9223372036854775808",
        ),
        (lambda: fold_windows(ONE, [["a", "b"]], [0], 4), "teacher_ids_MT: <U1, want whole numbers"),
        (lambda: fold_windows(ONE, [[1, 2]], [0.5], 4), "positions_M: float64, want whole numbers"),
        (lambda: fold_windows(ONE, [[1, 2]], [HUGE - 1], 4), "positions_M: the window at 9223372036854775807"),
        (lambda: fold_windows(ONE, [[1, 2]], np.array([HUGE], np.uint64), 4), "positions_M: holds 9223372036854775808"),
        (lambda: fold_windows([["a"]], [[1, 2]], [0], 4), "plan_MST: <U1, want numbers"),
        (lambda: fold_windows(ONE, [[1, 2]], [0], -1), "num_tokens is -1, and should be a whole number of at least 0"),
        (lambda: pad_windows([[1], [0.5]]), "windows[1]: float64, want whole numbers"),
        (lambda: pad_windows([["a"]]), "windows[0]: <U1, want whole numbers"),
        (lambda: pad_windows([np.array([HUGE], np.uint64)]), "windows[0]: holds 9223372036854775808"),
        (lambda: pad_windows([[1]], 1.5), "width is 1.5, and should be a whole number"),
        (
            lambda: cap_mask([0.5], [0.1], 0.3, "low_ot", 4, np.random.default_rng(0)),
            "positions_M: float64, want whole",
        ),
        (lambda: cap_mask([], [], 0.3, "low_ot", -4, np.random.default_rng(0)), "num_tokens is -4"),
        (lambda: classify([0.1], "1"), "threshold is '1', and should be a number"),
        (lambda: classify(["a"], 0.1), "distances_M: <U1, want numbers"),
        (lambda: RunningQuantile(0.5, 1.5), "window is 1.5, and should be a whole number of at least 1"),
        (lambda: RunningQuantile("a", 1), "quantile is 'a', and should lie in [0, 1]"),
        (lambda: RunningQuantile(0.5, 2).update(["a"]), "distances: <U1, want numbers"),
        (lambda: RunningQuantile(0.5, 2).update([[0.5]]), "transport distances must be finite numbers, got [[0.5]]"),
    ],
)
def test_refuses_what_is_no_number(call: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        call()


def test_identity_plans_teach_each_position_the_token_in_its_place() -> None:
    """Windows of 3 and 2, 2 and 4, 1 and 1 tokens: what lies beyond the shorter is not guided."""
    plan, lengths = identity_plans([3, 2, 1], [2, 4, 1], 4)
    assert lengths.tolist() == [2, 2, 1]
    ids = np.array([[7, 8, 0, 0], [9, 9, 5, 5], [8, 0, 0, 0]])
    targets = fold_windows(plan, ids, [0, 1, 4], 6, lengths, lengths)
    assert unfold(targets) == [{7: 1.0}, {8: 1.0, 9: 1.0}, {9: 1.0}, {}, {8: 1.0}, {}]
    assert not targets.entropy.any()
    with pytest.raises(DataError, match="teacher_lengths_M"):
        identity_plans([1, 2], [1], 4)
    with pytest.raises(DataError, match=r"student_lengths_M: 5\.\.5, want 1 to the padded width 4"):
        identity_plans([5], [1], 4)
