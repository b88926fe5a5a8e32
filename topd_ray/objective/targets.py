"""From transport plans to what the student learns: soft targets per position, forks, caps (paper, section 4).

Axes: S student and T teacher tokens of one window, U distinct teacher tokens of it, M windows (candidates), P response
positions. The student window is the rollout's own tokens ("reuse"): the window at t covers positions t .. t + S - 1.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topd_ray.errors import DataError
from topd_ray.types import Int32, Int64, SparseTargets

Float64 = NDArray[np.float64]
CapMode = Literal["none", "low_ot", "matched_high_ot"]

# An entropic plan is dense; entries below this share of a position's target are noise that would only cost memory.
SMALLEST_WEIGHT = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Window:
    """One look into the near future, and how it maps onto the student's own."""

    position: int
    """response position t of the candidate, where both windows start"""
    student_ids: Int32
    """[S]"""
    teacher_ids: Int32
    """[T]"""
    plan_ST: Float64
    """[S, T], rows sum to 1/S"""
    distance: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowTargets:
    """The soft targets of one window: row i is the distribution y~ of student position i over `token_ids`."""

    token_ids: Int32
    """[U], distinct, ascending"""
    weights_SU: Float64
    """[S, U], rows sum to 1"""
    entropy_S: Float64
    """[S], H(y~_i) (nats)"""


def window_targets(plan_ST: ArrayLike, teacher_ids: ArrayLike) -> WindowTargets:
    """y~_i(v) = (1 / a_i) * sum of plan[i, j] over the j with teacher token v, a_i = 1/S.

    Dividing by a_i makes every y~_i a distribution. Raises DataError if the plan is not [S, len(teacher_ids)] or a row
    does not sum to 1/S. Source: the soft target of the paper's section 4.
    """
    plan_ST, ids_T = np.asarray(plan_ST, np.float64), np.asarray(teacher_ids)
    if plan_ST.ndim != 2 or plan_ST.size == 0 or plan_ST.shape[1:] != ids_T.shape:
        raise DataError(f"a plan of shape {plan_ST.shape} for {ids_T.shape} teacher tokens: want [student, teacher]")
    num_student = plan_ST.shape[0]
    rows_S = plan_ST.sum(1) * num_student
    if not np.allclose(rows_S, 1.0, rtol=0.0, atol=1e-6):
        raise DataError(f"plan rows times S sum to {rows_S.min():.6g}..{rows_S.max():.6g}, want 1: not a feasible plan")
    token_ids = np.unique(ids_T)
    weights_SU = plan_ST * num_student @ (ids_T[:, None] == token_ids)
    weights_SU[weights_SU < SMALLEST_WEIGHT] = 0.0
    weights_SU /= weights_SU.sum(1, keepdims=True)
    log_SU = np.log(weights_SU, out=np.zeros_like(weights_SU), where=weights_SU > 0.0)
    entropy_S = np.maximum(-(weights_SU * log_SU).sum(1), 0.0)
    return WindowTargets(token_ids=token_ids.astype(np.int32), weights_SU=weights_SU, entropy_S=entropy_S)


def fold_windows(windows: Iterable[Window], num_tokens: int) -> SparseTargets:
    """All windows of one trajectory as one sparse target per response position.

    w_p(v) = sum over the windows covering p of y~_p(v), and entropy_p = sum of their H(y~_p), so that
    sum over windows of KL(y~ || p_S) = sum_p [ sum_v w_p(v) * (-log p_S(v)) - entropy_p ].
    The order of the windows does not matter. Pass only the windows that shall guide (the divergent ones).
    Raises DataError if a window reaches past the response or its plan does not fit its tokens.
    """
    positions, token_ids, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    entropy_P = np.zeros(num_tokens)
    for window in sorted(windows, key=lambda window: window.position):
        num_student = len(window.student_ids)
        if window.plan_ST.shape[0] != num_student:
            raise DataError(f"a plan of shape {window.plan_ST.shape} for {num_student} student tokens: want equal rows")
        end = window.position + num_student
        if window.position < 0 or end > num_tokens:
            raise DataError(f"the window at {window.position} ends at {end}, the response has {num_tokens} tokens")
        targets = window_targets(window.plan_ST, window.teacher_ids)
        row, column = np.nonzero(targets.weights_SU)
        positions.append(row + window.position)
        token_ids.append(targets.token_ids[column].astype(np.int64))
        weights.append(targets.weights_SU[row, column])
        entropy_P[window.position : end] += targets.entropy_S
    return _merge(np.concatenate(positions), np.concatenate(token_ids), np.concatenate(weights), entropy_P)


def unfold(targets: SparseTargets, position: int) -> dict[int, float]:
    """The target of one position, token id -> weight; empty where nothing guides. Raises DataError outside of it."""
    if not 0 <= position < len(targets.indptr) - 1:
        raise DataError(f"position {position} is outside the {len(targets.indptr) - 1} response tokens")
    row = slice(int(targets.indptr[position]), int(targets.indptr[position + 1]))
    return dict(zip(targets.token_ids[row].tolist(), targets.weights[row].tolist(), strict=True))


def classify(distances: ArrayLike, threshold: float) -> NDArray[np.bool_]:
    """[M], true (a real fork) where distance > threshold, false (a false alarm) at or below it."""
    return np.asarray(distances, np.float64) > threshold


class RunningQuantile:
    """Quantile of the latest `window` transport distances: the line between false alarms and real forks.

    Linear interpolation between order statistics (numpy's default). Depends on nothing but the distances in the order
    they came, and `state` holds all of it.
    """

    def __init__(self, quantile: float, window: int) -> None:
        if not 0.0 <= quantile <= 1.0 or window < 1:
            raise DataError(f"quantile={quantile} must lie in [0, 1] and window={window} be at least 1")
        self.quantile = quantile
        self.window = window
        self._distances: deque[float] = deque(maxlen=window)

    def update(self, distances: Iterable[float]) -> None:
        """Takes in new distances, oldest first. Raises DataError, and takes none, if one is not finite."""
        values = [float(distance) for distance in distances]
        if not np.isfinite(values).all():
            raise DataError(f"transport distances must be finite, got {values}")
        self._distances.extend(values)

    @property
    def value(self) -> float:
        """The quantile; 0.0 before any distance, which calls every window a fork unless the two futures are equal."""
        return float(np.quantile(list(self._distances), self.quantile)) if self._distances else 0.0

    def state(self) -> dict[str, Any]:
        """All there is to know, ready for JSON."""
        return {"quantile": self.quantile, "window": self.window, "distances": list(self._distances)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "RunningQuantile":
        """The quantile whose `state` this is."""
        restored = cls(float(state["quantile"]), int(state["window"]))
        restored.update(state["distances"])
        return restored


def cap_mask(
    positions: ArrayLike,
    distances: ArrayLike,
    threshold: float,
    mode: CapMode,
    num_tokens: int,
    rng: np.random.Generator,
) -> NDArray[np.bool_]:
    """[P], true where the paper's ablation caps a token's loss at its trajectory's median.

    `low_ot`: the candidates at or below the threshold. `matched_high_ot`: as many, drawn at random without replacement
    from those above it (all of them if there are fewer). `none`: nothing. Only `matched_high_ot` draws from `rng`.
    Raises DataError if positions and distances differ in number. Source: the paper's down-weighting ablation.
    """
    positions_M = np.asarray(positions, np.int64)
    divergent_M = classify(distances, threshold)
    if positions_M.shape != divergent_M.shape:
        raise DataError(f"{positions_M.shape} positions for {divergent_M.shape} distances: want one each")
    capped_P = np.zeros(num_tokens, np.bool_)
    if mode == "low_ot":
        capped_P[positions_M[~divergent_M]] = True
    elif mode == "matched_high_ot":
        forks = positions_M[divergent_M]
        num_capped = min(int((~divergent_M).sum()), forks.size)
        capped_P[rng.choice(forks, num_capped, replace=False) if num_capped else forks[:0]] = True
    return capped_P


def _merge(positions: Int64, token_ids: Int64, weights: Float64, entropy_P: Float64) -> SparseTargets:
    """Adds up the weights of equal (position, token) pairs into CSR rows, token ids ascending within a row."""
    order = np.lexsort((token_ids, positions))
    positions, token_ids, weights = positions[order], token_ids[order], weights[order]
    is_first = np.ones(positions.size, np.bool_)
    is_first[1:] = (np.diff(positions) != 0) | (np.diff(token_ids) != 0)
    starts = np.flatnonzero(is_first)
    merged: Float64 = np.add.reduceat(weights, starts) if starts.size else weights
    indptr = np.zeros(entropy_P.size + 1, np.int64)
    np.cumsum(np.bincount(positions[starts], minlength=entropy_P.size), out=indptr[1:])
    return SparseTargets(
        indptr=indptr,
        token_ids=token_ids[starts].astype(np.int32),
        weights=merged.astype(np.float32),
        entropy=entropy_P.astype(np.float32),
    )
