"""How far apart two windows are, and which teacher token each student token corresponds to (paper, section 4).

Axes: S student tokens and T teacher tokens of one window, V vocabulary, D embedding width. Everything is
[student, teacher], and S != T is normal. Marginals are uniform: a_i = 1/S, b_j = 1/T. All arithmetic is float64.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]

from topd_ray.errors import DataError

Float64 = NDArray[np.float64]
Method = Literal["exact", "entropic"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransportResult:
    """A coupling of two windows and what it costs."""

    plan_ST: Float64
    """[S, T], rows sum to 1/S, columns to 1/T"""
    distance: float
    """<plan, cost>, in units of the ground cost"""


def unit_embeddings(weight_VD: torch.Tensor) -> torch.Tensor:
    """Rows scaled to length 1, float32 [V, D]; a zero row stays zero. Done once per model."""
    return torch.nn.functional.normalize(weight_VD.detach().float(), dim=1, eps=1e-30)


def ground_cost(student_ids: ArrayLike, teacher_ids: ArrayLike, embedding_VD_unit: torch.Tensor) -> Float64:
    """cost[i, j] = 1 - cos(e(student_i), e(teacher_j)), [S, T], in [0, 2].

    A token costs exactly 0 against itself. A zero embedding costs 1 against every other token.
    `embedding_VD_unit` comes from `unit_embeddings`. Raises DataError on an empty window or an id without a row.
    Source: c(x^T, x^S) of the paper's section 4.
    """
    num_rows = embedding_VD_unit.shape[0]
    student_S = _token_ids(student_ids, num_rows, "student")
    teacher_T = _token_ids(teacher_ids, num_rows, "teacher")
    student_SD = embedding_VD_unit[torch.from_numpy(student_S)].double()
    teacher_TD = embedding_VD_unit[torch.from_numpy(teacher_T)].double()
    cost_ST: Float64 = (1.0 - student_SD @ teacher_TD.T).clamp(0.0, 2.0).cpu().numpy()
    cost_ST[student_S[:, None] == teacher_T[None, :]] = 0.0
    return cost_ST


def exact_transport(cost_ST: ArrayLike) -> TransportResult:
    """min over couplings of <plan, cost>, exactly.

    With S == T some permutation (divided by S) is optimal, so an assignment solver does; otherwise the network simplex
    of POT. Raises DataError on a cost that is empty, not finite or not a matrix. Source: D_OT, the paper's section 4.
    """
    cost_ST = _checked_cost(cost_ST)
    num_student, num_teacher = cost_ST.shape
    if num_student == num_teacher:
        plan_ST = np.zeros_like(cost_ST)
        plan_ST[linear_sum_assignment(cost_ST)] = 1.0 / num_student
    else:
        plan_ST = _network_simplex(cost_ST)
    return TransportResult(plan_ST=plan_ST, distance=float((plan_ST * cost_ST).sum()))


def entropic_transport(
    cost_ST: ArrayLike, epsilon: float, *, tolerance: float = 1e-6, max_iterations: int = 2000
) -> TransportResult:
    """Sinkhorn's plan argmin <plan, cost> - epsilon * H(plan), rounded to exact marginals.

    Log-domain iterations run until the marginals are off by at most `tolerance` in sum (or `max_iterations`); the
    rounding of Altschuler, Weed and Rigollet (2017, algorithm 2) then makes the plan feasible to 1e-12, so that an
    early stop costs optimality and never mass. `epsilon` is in units of the ground cost; `distance` is <plan, cost>,
    without the entropy, and so at least the exact distance. Raises DataError on a malformed cost or epsilon <= 0.
    """
    cost_ST = _checked_cost(cost_ST)
    if not epsilon > 0.0:
        raise DataError(f"the entropic regularisation must be positive, got epsilon={epsilon}")
    num_student, num_teacher = cost_ST.shape
    log_a, log_b = -np.log(num_student), -np.log(num_teacher)
    kernel_ST = -cost_ST / epsilon
    v_T = np.zeros(num_teacher)
    for _ in range(max_iterations):
        u_S = log_a - _logsumexp(kernel_ST + v_T, axis=1)
        column_T = _logsumexp(kernel_ST + u_S[:, None], axis=0)
        error = np.abs(np.exp(column_T + v_T) - 1.0 / num_teacher).sum()
        if error <= tolerance:
            break
        v_T = log_b - column_T
    plan_ST = _round_to_marginals(np.exp(kernel_ST + u_S[:, None] + v_T))
    return TransportResult(plan_ST=plan_ST, distance=float((plan_ST * cost_ST).sum()))


def solve_windows(
    costs: Sequence[ArrayLike] | Iterable[ArrayLike], method: Method, epsilon: float = 0.05
) -> list[TransportResult]:
    """One transport problem per window, in order; `epsilon` is read by `entropic` only. Raises DataError as they do."""
    if method == "exact":
        return [exact_transport(cost_ST) for cost_ST in costs]
    return [entropic_transport(cost_ST, epsilon) for cost_ST in costs]


def _network_simplex(cost_ST: Float64) -> Float64:
    # POT probes every array library it knows when imported (seconds): only who solves S != T pays for it.
    import ot  # type: ignore[import-untyped,unused-ignore]

    num_student, num_teacher = cost_ST.shape
    a_S = np.full(num_student, 1.0 / num_student)
    b_T = np.full(num_teacher, 1.0 / num_teacher)
    plan_ST, log = ot.emd(a_S, b_T, cost_ST, numItermax=1_000_000, log=True)
    if log["warning"] is not None:
        raise DataError(f"no optimal transport plan for a cost of shape {cost_ST.shape}: {log['warning']}")
    feasible_ST: Float64 = np.maximum(plan_ST, 0.0)
    return feasible_ST


def _round_to_marginals(plan_ST: Float64) -> Float64:
    """The nearest-mass feasible plan: shrink rows, then columns, that hold too much, and spread what is missing."""
    num_student, num_teacher = plan_ST.shape
    plan_ST = plan_ST * np.minimum(1.0, 1.0 / num_student / np.maximum(plan_ST.sum(1), 1e-300))[:, None]
    plan_ST = plan_ST * np.minimum(1.0, 1.0 / num_teacher / np.maximum(plan_ST.sum(0), 1e-300))
    missing_S = np.maximum(1.0 / num_student - plan_ST.sum(1), 0.0)
    missing_T = np.maximum(1.0 / num_teacher - plan_ST.sum(0), 0.0)
    if missing_S.sum() > 0.0:
        plan_ST = plan_ST + missing_S[:, None] * missing_T / missing_S.sum()
    return plan_ST


def _logsumexp(values: Float64, axis: int) -> Float64:
    peak = values.max(axis=axis, keepdims=True)
    result: Float64 = np.log(np.exp(values - peak).sum(axis=axis)) + peak.squeeze(axis)
    return result


def _checked_cost(cost_ST: ArrayLike) -> Float64:
    checked_ST = np.asarray(cost_ST, np.float64)
    if checked_ST.ndim != 2 or checked_ST.size == 0:
        raise DataError(f"a ground cost must be a non-empty [student, teacher] matrix, got shape {checked_ST.shape}")
    if not np.isfinite(checked_ST).all():
        raise DataError("the ground cost holds NaN or infinity: embeddings must be finite")
    return checked_ST


def _token_ids(token_ids: ArrayLike, num_rows: int, side: str) -> NDArray[np.int64]:
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or ids.size == 0:
        raise DataError(f"the {side} window must hold at least one token, got shape {ids.shape}")
    if ids.min() < 0 or ids.max() >= num_rows:
        raise DataError(f"the {side} window holds ids {ids.min()}..{ids.max()}, the embedding has {num_rows} rows")
    return ids.astype(np.int64)
