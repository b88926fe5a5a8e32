"""From transport plans to what the student learns: soft targets per position, forks, caps (paper, section 4).

Axes: M windows (candidates), S student and T teacher tokens of a window, padded to the longest (see transport.py), P
response positions. The student window is the rollout's own tokens ("reuse"): the window at t covers positions
t .. t + S_m - 1.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray

from topd_ray.errors import DataError
from topd_ray.objective.checks import check_whole, is_number
from topd_ray.objective.transport import Values, as_floats, as_whole, checked_lengths
from topd_ray.types import Int64, SparseTargets

Float64 = NDArray[np.float64]
CapMode = Literal["none", "low_ot", "matched_high_ot"]

# An entropic plan is dense; entries below this share of a position's target are noise that would only cost memory.
SMALLEST_WEIGHT = 1e-8
# How far a row of a plan, times S, may be from 1.
MARGINAL_TOLERANCE = 1e-6


def fold_windows(
    plan_MST: Values,
    teacher_ids_MT: Values,
    positions_M: Values,
    num_tokens: int,
    student_lengths_M: Values | None = None,
    teacher_lengths_M: Values | None = None,
) -> SparseTargets:
    """Transport plans of M windows as one sparse target per response position, for one trajectory or several in a row.

    Window m starts at position t_m and its student position i learns the distribution
    y~_mi(v) = (1 / a_i) * sum of plan[m, i, j] over the j with teacher token v, a_i = 1/S_m. Folded,
    w_p(v) = sum over the windows covering p of y~_p(v), and entropy_p = sum of their H(y~_p) (nats), so that
    sum over windows of KL(y~ || p_S) = sum_p [ sum_v w_p(v) * (-log p_S(v)) - entropy_p ].
    Shares below 1e-8 of a y~ are dropped. The order of the windows does not matter. Pass only the windows that shall
    guide (the divergent ones); none gives targets that guide nothing.

    Raises DataError if shapes or lengths do not fit, a window reaches outside of the response, a plan has a negative
    entry or a row that does not sum to 1/S_m, ids or positions are no whole numbers, or an id is not in 0..2**31 - 1.
    Source: the soft target of the paper's section 4.
    """
    check_whole("num_tokens", num_tokens, 0)
    plan = as_floats("plan_MST", plan_MST)
    ids = as_whole("teacher_ids_MT", teacher_ids_MT)
    starts = as_whole("positions_M", positions_M)
    if plan.ndim != 3 or starts.shape != plan.shape[:1] or ids.shape != (plan.shape[0], plan.shape[2]):
        raise DataError(
            f"plan_MST, teacher_ids_MT, positions_M: shapes {plan.shape}, {ids.shape}, {starts.shape}, "
            "want [windows, student, teacher], [windows, teacher], [windows]"
        )
    num_windows, num_student, num_teacher = plan.shape
    student_lengths = checked_lengths(student_lengths_M, num_windows, num_student, "student_lengths_M")
    teacher_lengths = checked_lengths(teacher_lengths_M, num_windows, num_teacher, "teacher_lengths_M")
    _check_windows(plan, ids, starts, num_tokens, student_lengths, teacher_lengths)
    if not num_windows:
        return SparseTargets.empty(num_tokens)
    if (np.diff(starts) < 0).any():  # sums of floats know their order
        order = np.argsort(starts, kind="stable")
        plan, ids, starts = plan[order], ids[order], starts[order]
        student_lengths, teacher_lengths = student_lengths[order], teacher_lengths[order]
    m, i, j = np.nonzero(plan)
    within = (i < student_lengths[m]) & (j < teacher_lengths[m])
    if not within.all():
        m, i, j = m[within], i[within], j[within]
    # Equal tokens of a window share its first place for them, so that y~ is whole before its entropy is taken.
    place_MT = (ids[:, :, None] == ids[:, None, :]).argmax(2)
    row = m * num_student + i
    flat = np.bincount(row * num_teacher + place_MT[m, j], plan[m, i, j] * student_lengths[m])
    kept = np.flatnonzero(flat >= SMALLEST_WEIGHT)
    row, share = kept // num_teacher, flat[kept]
    share = share / np.bincount(row, share)[row]
    m = row // num_student
    position = starts[m] + row % num_student
    entropy_P = np.maximum(np.bincount(position, -share * np.log(share), minlength=num_tokens), 0.0)
    return _merge(position, ids[m, kept % num_teacher].astype(np.int64), share, entropy_P)


def identity_plans(
    student_lengths_M: Values, teacher_lengths_M: Values, width: int
) -> tuple[NDArray[np.float64], Int64]:
    """The plans that move the teacher's i-th token to the student's i-th, [M, width, width], and their lengths, [M].

    Windows of S_m and T_m tokens are both cut to n_m = min(S_m, T_m), as `fold_windows` is then to be told: what lies
    beyond the shorter one takes no part. plan[m, i, i] = 1 / n_m for i < n_m, and 0 elsewhere.
    Raises DataError for lengths that are not whole numbers within 1..`width`, or differ in number.
    Source: this package's; the rival that the paper's transport is compared with.
    """
    check_whole("width", width, 1)
    num_windows = as_whole("student_lengths_M", student_lengths_M).size
    student_lengths = checked_lengths(student_lengths_M, num_windows, width, "student_lengths_M")
    teacher_lengths = checked_lengths(teacher_lengths_M, num_windows, width, "teacher_lengths_M")
    lengths = np.minimum(student_lengths, teacher_lengths)
    shares_MS = (np.arange(width) < lengths[:, None]) / lengths[:, None]
    return shares_MS[:, :, None] * np.eye(width), lengths


def split_targets(targets: SparseTargets, num_tokens: Sequence[int]) -> list[SparseTargets]:
    """The targets of several trajectories in a row, apart again: one for each of their lengths.

    Raises DataError if the lengths do not add up to the positions.
    """
    for length in num_tokens:
        check_whole("num_tokens", length, 0)
    ends = np.cumsum([0, *num_tokens]).tolist()
    if ends[-1] != targets.indptr.size - 1:
        raise DataError(
            f"num_tokens: {list(num_tokens)}, want lengths that add up to {targets.indptr.size - 1} positions"
        )
    parts = []
    for start, end in pairwise(ends):
        low, high = int(targets.indptr[start]), int(targets.indptr[end])
        parts.append(
            SparseTargets(
                indptr=targets.indptr[start : end + 1] - low,
                token_ids=targets.token_ids[low:high],
                weights=targets.weights[low:high],
                entropy=targets.entropy[start:end],
            )
        )
    return parts


@overload
def unfold(targets: SparseTargets) -> list[dict[int, float]]: ...
@overload
def unfold(targets: SparseTargets, decode: Callable[[int], str]) -> list[dict[str, float]]: ...
def unfold(
    targets: SparseTargets, decode: Callable[[int], str] | None = None
) -> list[dict[int, float]] | list[dict[str, float]]:
    """The targets to read: for each response position what it learns, token -> weight, heaviest first.

    An empty dict where nothing guides. Weights of a position sum to the number of windows that cover it. `decode`
    makes a token id readable, e.g. `lambda token: tokenizer.decode([token])`; ids that read alike are added up.
    """
    rows: list[dict[int, float]] = []
    for start, end in pairwise(targets.indptr.tolist()):
        pairs = zip(targets.token_ids[start:end].tolist(), targets.weights[start:end].tolist(), strict=True)
        rows.append(dict(sorted(pairs, key=lambda pair: -pair[1])))
    if decode is None:
        return rows
    named: list[dict[str, float]] = []
    for row in rows:
        read: dict[str, float] = {}
        for token, weight in row.items():
            text = decode(token)
            read[text] = read.get(text, 0.0) + weight
        named.append(dict(sorted(read.items(), key=lambda pair: -pair[1])))
    return named


def classify(distances_M: Values, threshold: float) -> NDArray[np.bool_]:
    """[M], true (a real fork) where distance > threshold, false (a false alarm) at or below it.

    Both in units of the ground cost. Raises DataError if the distances are not a vector of numbers, or one of them or
    the threshold is NaN. Source: real and false divergent points of the paper's section 4.
    """
    distances = as_floats("distances_M", distances_M)
    if distances.ndim != 1:
        raise DataError(f"distances_M: shape {distances.shape}, want a vector, one distance a window")
    if not is_number(threshold):
        raise DataError(f"threshold is {threshold!r}, and should be a number")
    if np.isnan(threshold) or np.isnan(distances).any():
        raise DataError(f"distances_M: {distances.tolist()} against threshold={threshold}, want no NaN")
    divergent_M: NDArray[np.bool_] = distances > threshold
    return divergent_M


class RunningQuantile:
    """Quantile of the latest `window` transport distances: the line between false alarms and real forks.

    Linear interpolation between order statistics (numpy's default), in units of the ground cost. Depends on nothing but
    the distances in the order they came, and `state` holds all of it. Raises DataError for a quantile outside of [0, 1]
    and a window that is not a whole number of at least 1.
    Source: this package's; the paper's section 4 leaves the threshold of D_OT open.
    """

    def __init__(self, quantile: float, window: int) -> None:
        if not (is_number(quantile) and 0.0 <= quantile <= 1.0):
            raise DataError(f"quantile is {quantile!r}, and should lie in [0, 1]")
        check_whole("window", window, 1)
        self.quantile = quantile
        self.window = window
        self._distances: deque[float] = deque(maxlen=window)

    def update(self, distances: Iterable[float]) -> None:
        """Takes in new distances, oldest first. Raises DataError, and takes none, if one is not finite."""
        values = as_floats("distances", list(distances))
        if values.ndim != 1 or not np.isfinite(values).all():
            raise DataError(f"transport distances must be finite numbers, got {values.tolist()}")
        self._distances.extend(values.tolist())

    @property
    def value(self) -> float:
        """The quantile; 0.0 before any distance, which calls every window a fork unless the two futures are equal."""
        return float(np.quantile(list(self._distances), self.quantile)) if self._distances else 0.0

    def state(self) -> dict[str, Any]:
        """All there is to know, ready for JSON."""
        return {"quantile": self.quantile, "window": self.window, "distances": list(self._distances)}


def cap_mask(
    positions_M: Values,
    distances_M: Values,
    threshold: float,
    mode: CapMode,
    num_tokens: int,
    rng: np.random.Generator,
) -> NDArray[np.bool_]:
    """[P], true where the paper's ablation caps a token's loss at its trajectory's median.

    `low_ot`: the candidates at or below the threshold. `matched_high_ot`: as many, drawn at random without replacement
    from those above it (all of them if there are fewer). `none`: nothing. Only `matched_high_ot` draws from `rng`.
    Raises DataError if positions and distances differ in number, a position is outside of the response, or the mode is
    none of these. Source: the paper's down-weighting ablation.
    """
    if mode not in get_args(CapMode):
        raise DataError(f"mode: found {mode!r}, want one of {', '.join(get_args(CapMode))}")
    check_whole("num_tokens", num_tokens, 0)
    positions = as_whole("positions_M", positions_M)
    divergent_M = classify(distances_M, threshold)
    if positions.shape != divergent_M.shape:
        raise DataError(f"positions_M: shape {positions.shape} for {divergent_M.shape} distances, want one each")
    if positions.size and (positions.min() < 0 or positions.max() >= num_tokens):
        raise DataError(f"positions_M: {positions.min()}..{positions.max()}, want 0 to {num_tokens - 1}")
    capped_P = np.zeros(num_tokens, np.bool_)
    if mode == "low_ot":
        capped_P[positions[~divergent_M]] = True
    elif mode == "matched_high_ot":
        forks = positions[divergent_M]
        num_capped = min(int((~divergent_M).sum()), forks.size)
        capped_P[rng.choice(forks, num_capped, replace=False) if num_capped else forks[:0]] = True
    return capped_P


def _check_windows(
    plan: Float64,
    ids: NDArray[Any],
    starts: Int64,
    num_tokens: int,
    student_lengths: Int64,
    teacher_lengths: Int64,
) -> None:
    ends = starts + student_lengths
    for m in np.flatnonzero((starts < 0) | (starts > num_tokens - student_lengths)):  # ends may overflow
        raise DataError(
            f"positions_M: the window at {starts[m]} ends at {ends[m]}, want it in the response's {num_tokens} tokens"
        )
    inside_MT = np.arange(ids.shape[1]) < teacher_lengths[:, None]
    own_ids = ids[inside_MT]
    if own_ids.size and (own_ids.min() < 0 or own_ids.max() > np.iinfo(np.int32).max):
        raise DataError(f"teacher_ids_MT: {own_ids.min()}..{own_ids.max()}, want token ids from 0 within int32")
    inside_MS = np.arange(plan.shape[1]) < student_lengths[:, None]
    ragged = not (inside_MS.all() and inside_MT.all())
    own = np.where(inside_MS[:, :, None] & inside_MT[:, None, :], plan, 0.0) if ragged else plan
    lowest = own.min(initial=0.0)
    if not lowest >= 0.0:
        raise DataError(f"plan_MST: holds {lowest}, want no negative entry")
    rows_MS = own.sum(2) * student_lengths[:, None]
    if not (np.abs(rows_MS - 1.0) <= MARGINAL_TOLERANCE)[inside_MS].all():
        raise DataError(
            f"plan_MST: rows times their window's S sum to {rows_MS[inside_MS].min():.6g}.."
            f"{rows_MS[inside_MS].max():.6g}, want 1: not a feasible [student, teacher] plan"
        )


def _merge(positions: Int64, token_ids: Int64, weights: Float64, entropy_P: Float64) -> SparseTargets:
    """Adds up the weights of equal (position, token) pairs into CSR rows, token ids ascending within a row."""
    num_ids = int(token_ids.max(initial=0)) + 1
    order = np.argsort(positions * num_ids + token_ids, kind="stable")
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
