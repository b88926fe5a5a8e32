"""How far apart windows are, and which teacher token each student token corresponds to (paper, section 4).

Axes: M windows, S student and T teacher tokens of a window, padded to the longest, V vocabulary, D embedding width.
Everything is [student, teacher], and S != T is normal. Window m holds `student_lengths_M[m]` and `teacher_lengths_M[m]`
tokens; None means that all are full. What lies past a length is never read, and is 0 in what comes back. Marginals are
uniform over a window's own tokens: a_i = 1/S_m, b_j = 1/T_m. All arithmetic is float64 and nothing has a gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from topd_ray.errors import DataError
from topd_ray.objective.checks import check_dtype, check_shape, check_whole, is_number
from topd_ray.types import Int64

Method = Literal["exact", "entropic"]
Values = ArrayLike | Tensor

# Sums of costs must stay finite.
LARGEST_COST = 1e100
# Embeddings are float32. Costs on this grid add up without rounding, so ties stay ties whatever the products' order.
COST_GRID = 2.0**24
# Sinkhorn's iterations between two looks at the marginals: each look makes a GPU wait for the host.
CHECK_EVERY = 16
# Up to this many times the pairs asked for, all distinct pairs of tokens in one product are measured to be the faster:
# the windows' own rows would have to be copied first.
DISTINCT_PAIRS = 2
# How far the length of a row may be from 1: that of a unit row that was rounded to bfloat16 is not further.
LENGTH_TOLERANCE = 1e-2
# All of them would take as long as their product.
ROWS_LOOKED_AT = 512


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransportResult:
    """Couplings of M pairs of windows and what they cost; float64, on the device of the ground cost."""

    plan_MST: Tensor
    """[M, S, T], rows sum to 1/S_m, columns to 1/T_m (to 1e-12)"""
    distance_M: Tensor
    """[M], <plan, cost>, in units of the ground cost"""
    residual_M: Tensor
    """[M], sum of |column sum - 1/T_m| before the plan was rounded to its marginals; 0 for exact plans"""


def unit_embeddings(weight_VD: Tensor) -> Tensor:
    """Rows of [V, D] scaled to length 1, float32, whatever their magnitude; a zero row stays zero. Once per model.

    e / |e|, on the weight's device, without gradient. Raises DataError on a weight that is not a [vocabulary, width]
    matrix or holds NaN or infinity. Source: the embeddings whose cosine is the ground cost of the paper's section 4.
    """
    check_shape("weight_VD", weight_VD, "V", "D")
    if weight_VD.shape[1] == 0:
        raise DataError(f"weight_VD has shape {list(weight_VD.shape)}, and should have at least one column")
    wide_VD = weight_VD.detach().to(torch.promote_types(weight_VD.dtype, torch.float32))
    # By a power of two near its largest entry, a row is divided without rounding, and squares stay in range.
    peak_V1 = wide_VD.abs().amax(1, keepdim=True)
    power_V1 = torch.where(peak_V1 == 0.0, 1.0, peak_V1 / (2.0 * torch.frexp(peak_V1).mantissa))
    unit_VD = torch.nn.functional.normalize((wide_VD / power_V1).float(), dim=1)
    if not bool(unit_VD.isfinite().all()):
        raise DataError("weight_VD: holds NaN or infinity, want finite embeddings")
    return unit_VD


def pad_windows(windows: Sequence[ArrayLike], width: int | None = None) -> tuple[Int64, Int64]:
    """M windows of token ids as one array: ids [M, width], filled up with 0, and lengths [M].

    `width` is the longest window unless given. Raises DataError on an empty window, one that is not a vector of whole
    numbers, or one longer than `width`.
    """
    if width is not None:
        check_whole("width", width, 0)
    rows = [as_whole(f"windows[{m}]", window) for m, window in enumerate(windows)]
    for m, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0:
            raise DataError(f"windows[{m}]: shape {row.shape}, want a vector of at least one token id")
    lengths_M = np.array([row.size for row in rows], np.int64)
    longest = int(lengths_M.max(initial=0))
    width = longest if width is None else width
    if longest > width:
        raise DataError(f"windows[{int(lengths_M.argmax())}]: {longest} tokens, want at most width={width}")
    ids_MK = np.zeros((len(rows), width), np.int64)
    if rows:
        ids_MK[np.arange(width) < lengths_M[:, None]] = np.concatenate(rows)
    return ids_MK, lengths_M


@torch.no_grad()
def ground_cost(
    student_ids_MS: Values,
    teacher_ids_MT: Values,
    embedding_VD_unit: Tensor,
    student_lengths_M: Values | None = None,
    teacher_lengths_M: Values | None = None,
) -> Tensor:
    """cost[m, i, j] = 1 - cos(e(student_mi), e(teacher_mj)), float64 [M, S, T] in [0, 2], on the embedding's device.

    A token costs exactly 0 against itself. A zero embedding costs 1 against every other token. Costs are rounded to
    multiples of 2**-24. `embedding_VD_unit` comes from `unit_embeddings`. One product serves all windows: of all
    distinct tokens, or of the windows' rows where they repeat little. Raises DataError on ids or lengths that do not
    fit, an embedding that is no matrix of floats, and a row of it that is read (512 are looked at) and not of length 1
    or 0.
    Source: c(x^T, x^S) of the paper's section 4.
    """
    check_shape("embedding_VD_unit", embedding_VD_unit, "V", "D")
    check_dtype("embedding_VD_unit", embedding_VD_unit, "float")
    num_rows, device = embedding_VD_unit.shape[0], embedding_VD_unit.device
    student, student_lengths = _windows(student_ids_MS, student_lengths_M, num_rows, "student")
    teacher, teacher_lengths = _windows(teacher_ids_MT, teacher_lengths_M, num_rows, "teacher")
    if len(student) != len(teacher):
        raise DataError(f"teacher_ids: {len(teacher)} windows for {len(student)} student windows, want one each")
    shape = len(student), student.shape[1], teacher.shape[1]
    rows_U, row_MS = _distinct(student, num_rows)
    columns_U, column_MT = _distinct(teacher, num_rows)
    _check_lengths(embedding_VD_unit, np.concatenate([rows_U, columns_U]))
    if rows_U.size * columns_U.size <= DISTINCT_PAIRS * max(1, math.prod(shape)):
        pairs_UU = _cosine(embedding_VD_unit, rows_U, columns_U)
        cosine_MST = pairs_UU.flatten()[_on(row_MS[:, :, None] * columns_U.size + column_MT[:, None, :], device)]
    else:
        cosine_MST = torch.stack([_cosine(embedding_VD_unit, *pair) for pair in zip(student, teacher, strict=True)])
    cost_MST = ((1.0 - cosine_MST).clamp_(0.0, 2.0) * COST_GRID).round_() / COST_GRID
    same_MST = student[:, :, None] == teacher[:, None, :]
    outside_MST = ~_inside(student_lengths, teacher_lengths, shape)
    return cost_MST.masked_fill_(_on(same_MST | outside_MST, device), 0.0)


def exact_transport(
    cost_MST: Values, student_lengths_M: Values | None = None, teacher_lengths_M: Values | None = None
) -> TransportResult:
    """min over couplings of <plan, cost>, exactly, for each window, from costs [M, S, T] and lengths [M].

    On one CPU core, without holding the interpreter's lock; of several optimal plans always the same one is taken. The
    first call in a process loads the solver (0.5 s) and the first on a machine compiles it (some seconds).
    The distance is in the cost's units, plans are float64 [M, S, T]. Raises DataError on costs or lengths that do not
    fit, and on costs that are NaN, infinite or beyond 1e100. Source: D_OT of the paper's section 4.
    """
    from topd_ray.objective.exact_solver import solve  # numba: only who solves pays for its import

    cost, student_lengths, teacher_lengths = _problem(cost_MST, student_lengths_M, teacher_lengths_M)
    plan_MST, distance_M = np.zeros(tuple(cost.shape)), np.zeros(len(cost))
    solve(
        np.require(cost.cpu().numpy(), np.float64, ["C", "W"]), student_lengths, teacher_lengths, plan_MST, distance_M
    )
    return TransportResult(
        plan_MST=_on(plan_MST, cost.device),
        distance_M=_on(distance_M, cost.device),
        residual_M=torch.zeros(len(cost), dtype=torch.float64, device=cost.device),
    )


@torch.no_grad()
def entropic_transport(
    cost_MST: Values,
    student_lengths_M: Values | None = None,
    teacher_lengths_M: Values | None = None,
    *,
    epsilon: float,
    tolerance: float = 1e-6,
    max_iterations: int = 2000,
) -> TransportResult:
    """Sinkhorn's plans argmin <plan, cost> - epsilon * H(plan), rounded to exact marginals. Shapes: `exact_transport`.

    All windows at once, in the log domain, on the cost's device. A window is done when its column sums are off by at
    most `tolerance` in sum (looked at every 16 iterations; rows are exact), or after `max_iterations`; `residual_M`
    tells which. The rounding of Altschuler, Weed and Rigollet (2017, algorithm 2) then makes the plan feasible, so that
    an early stop costs optimality and never mass. `epsilon` is in units of the ground cost.

    Bias: exact <= distance <= exact + epsilon * log(min(S, T)) + 4 * residual * max|cost|. For couplings P_eps, optimal
    with entropy, and P*, optimal without, <P_eps, C> - <P*, C> <= epsilon * (H(P_eps) - H(P*)), where H(P_eps) <=
    log S + log T and H(P*) >= log max(S, T); the last term is what the stop and the rounding can add.
    Raises DataError on costs or lengths that do not fit, costs that are not finite, and parameters out of range.
    Source: D_OT of the paper's section 4, with the entropy of Cuturi (2013).
    """
    if not (is_number(epsilon) and 0.0 < epsilon < np.inf):
        raise DataError(f"epsilon: found {epsilon!r}, want a positive number")
    if not (is_number(tolerance) and tolerance >= 0.0):
        raise DataError(f"tolerance: found {tolerance!r}, want a number of at least 0")
    check_whole("max_iterations", max_iterations, 1)
    cost, student_lengths, teacher_lengths = _problem(cost_MST, student_lengths_M, teacher_lengths_M)
    inside_MST = _on(_inside(student_lengths, teacher_lengths, tuple(cost.shape)), cost.device)
    a_MS = _marginal(student_lengths, cost.shape[1], cost.device)
    b_MT = _marginal(teacher_lengths, cost.shape[2], cost.device)
    cost = cost.masked_fill(~inside_MST, 0.0)
    kernel_MST = (cost / -epsilon).masked_fill_(~inside_MST, -torch.inf)
    plan_MST, residual_M = _sinkhorn(kernel_MST, a_MS, b_MT, tolerance, max_iterations)
    plan_MST = _round_to_marginals(plan_MST, a_MS, b_MT)
    return TransportResult(plan_MST=plan_MST, distance_M=(plan_MST * cost).sum((1, 2)), residual_M=residual_M)


def solve_windows(
    cost_MST: Values,
    student_lengths_M: Values | None = None,
    teacher_lengths_M: Values | None = None,
    *,
    method: Method = "exact",
    epsilon: float = 0.05,
) -> TransportResult:
    """`exact_transport` or `entropic_transport`; `epsilon` is read by the latter only. Raises DataError as they do."""
    if method == "exact":
        return exact_transport(cost_MST, student_lengths_M, teacher_lengths_M)
    if method == "entropic":
        return entropic_transport(cost_MST, student_lengths_M, teacher_lengths_M, epsilon=epsilon)
    raise DataError(f"method: found {method!r}, want exact or entropic")


def _sinkhorn(
    kernel_MST: Tensor, a_MS: Tensor, b_MT: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """Plans with exact rows, and how far their columns are off. A window that is done takes no more iterations."""
    plan_MST, residual_M = torch.zeros_like(kernel_MST), kernel_MST.new_zeros(len(kernel_MST))
    log_a_MS, log_b_MT = a_MS.log(), b_MT.log()
    outside_MS, outside_MT = a_MS == 0.0, b_MT == 0.0  # their potential is -inf, and not the NaN of -inf + inf
    u_MS = (log_a_MS - torch.logsumexp(kernel_MST, 2)).masked_fill_(outside_MS, -torch.inf)
    todo = torch.arange(len(kernel_MST), device=kernel_MST.device)
    left = max_iterations
    while todo.numel():
        for _ in range(min(CHECK_EVERY, left)):
            v_MT = log_b_MT - torch.logsumexp(kernel_MST + u_MS.unsqueeze(2), 1)
            v_MT.masked_fill_(outside_MT, -torch.inf)
            u_MS = log_a_MS - torch.logsumexp(kernel_MST + v_MT.unsqueeze(1), 2)
            u_MS.masked_fill_(outside_MS, -torch.inf)
        left -= min(CHECK_EVERY, left)
        part_MST = (kernel_MST + u_MS.unsqueeze(2) + v_MT.unsqueeze(1)).exp_()
        off_M = (part_MST.sum(1) - b_MT).abs().sum(1)
        done_M = off_M <= tolerance if left else torch.ones_like(off_M, dtype=torch.bool)
        plan_MST[todo[done_M]], residual_M[todo[done_M]] = part_MST[done_M], off_M[done_M]
        more_M = ~done_M
        todo, kernel_MST, u_MS, v_MT = todo[more_M], kernel_MST[more_M], u_MS[more_M], v_MT[more_M]
        log_a_MS, log_b_MT, b_MT = log_a_MS[more_M], log_b_MT[more_M], b_MT[more_M]
        outside_MS, outside_MT = outside_MS[more_M], outside_MT[more_M]
    return plan_MST, residual_M


def _round_to_marginals(plan_MST: Tensor, a_MS: Tensor, b_MT: Tensor) -> Tensor:
    """Shrinks rows, then columns, that hold too much, and spreads what is then missing (a rank-one term)."""
    plan_MST = plan_MST * (a_MS / plan_MST.sum(2).clamp_(min=1e-300)).clamp_(max=1.0).unsqueeze(2)
    plan_MST = plan_MST * (b_MT / plan_MST.sum(1).clamp_(min=1e-300)).clamp_(max=1.0).unsqueeze(1)
    missing_MS = (a_MS - plan_MST.sum(2)).clamp_(min=0.0)
    missing_MT = (b_MT - plan_MST.sum(1)).clamp_(min=0.0)
    share_MT = missing_MT / missing_MS.sum(1, keepdim=True).clamp_(min=1e-300)
    return plan_MST + missing_MS.unsqueeze(2) * share_MT.unsqueeze(1)


def _distinct(ids: Int64, num_rows: int) -> tuple[Int64, Int64]:
    """The distinct ids, ascending, and where each of `ids` is among them: numpy.unique by counting, without a sort."""
    seen_V = np.zeros(num_rows, np.bool_)
    seen_V[ids] = True
    distinct_U = np.flatnonzero(seen_V)
    rank_V = np.zeros(num_rows, np.int64)
    rank_V[distinct_U] = np.arange(distinct_U.size)
    return distinct_U, rank_V[ids]


def _check_lengths(embedding_VD_unit: Tensor, rows_U: Int64) -> None:
    """Of up to `ROWS_LOOKED_AT` of these rows: who forgot to scale them has scaled none."""
    rows_U = rows_U[:: -(-rows_U.size // ROWS_LOOKED_AT) or 1]
    rows = embedding_VD_unit[_on(rows_U, embedding_VD_unit.device)]
    length_U = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
    is_fine_U = ((length_U - 1.0).abs() <= LENGTH_TOLERANCE) | (length_U == 0.0)  # false for NaN
    if not bool(is_fine_U.all()):
        at = int((~is_fine_U).nonzero()[0])
        raise DataError(
            f"embedding_VD_unit: row {rows_U[at]} is of length {float(length_U[at]):.6g}, want 1 or 0, as from "
            "unit_embeddings"
        )


def _cosine(embedding_VD_unit: Tensor, rows: Int64, columns: Int64) -> Tensor:
    device = embedding_VD_unit.device
    return embedding_VD_unit[_on(rows, device)].double() @ embedding_VD_unit[_on(columns, device)].double().T


def _problem(
    cost_MST: Values, student_lengths_M: Values | None, teacher_lengths_M: Values | None
) -> tuple[Tensor, Int64, Int64]:
    """The cost as a float64 tensor and both lengths, checked."""
    if isinstance(cost_MST, Tensor):
        cost = cost_MST.detach().double()
    else:
        cost = torch.from_numpy(np.require(as_floats("cost_MST", cost_MST), np.float64, ["C", "W"]))
    if cost.ndim != 3 or (len(cost) and not cost.numel()):
        raise DataError(f"cost_MST: shape {tuple(cost.shape)}, want [windows, student, teacher] with no empty window")
    num, num_student, num_teacher = cost.shape
    student_lengths = checked_lengths(student_lengths_M, num, num_student, "student_lengths_M")
    teacher_lengths = checked_lengths(teacher_lengths_M, num, num_teacher, "teacher_lengths_M")
    fine_MST = cost.abs() <= LARGEST_COST  # false for NaN
    if not bool(fine_MST.all()):
        wrong = ~fine_MST.cpu().numpy() & _inside(student_lengths, teacher_lengths, tuple(cost.shape))
        if wrong.any():
            where = tuple(int(axis[0]) for axis in np.nonzero(wrong))
            raise DataError(f"cost_MST: {cost[where].item()} at {list(where)}, want finite costs up to {LARGEST_COST}")
    return cost, student_lengths, teacher_lengths


def checked_lengths(lengths_M: Values | None, num_windows: int, width: int, name: str) -> Int64:
    """Lengths as int64 [M], all `width` for None. Raises DataError, naming `name`, unless each is 1 to `width`."""
    if lengths_M is None:
        return np.full(num_windows, width, np.int64)
    lengths = _array(name, lengths_M)
    if lengths.shape != (num_windows,) or not (np.issubdtype(lengths.dtype, np.integer) or not lengths.size):
        raise DataError(f"{name}: {lengths.dtype} of shape {lengths.shape}, want {num_windows} whole numbers")
    if lengths.size and (lengths.min() < 1 or lengths.max() > width):
        raise DataError(f"{name}: {lengths.min()}..{lengths.max()}, want 1 to the padded width {width}")
    return np.require(lengths, np.int64, ["C", "W"])


def _windows(ids: Values, lengths_M: Values | None, num_rows: int, side: str) -> tuple[Int64, Int64]:
    """Token ids, 0 past the lengths, and the lengths, checked."""
    ids_MK = _array(f"{side}_ids", ids)
    if ids_MK.ndim != 2 or (len(ids_MK) and not ids_MK.size):
        raise DataError(f"{side}_ids: shape {ids_MK.shape}, want [windows, tokens] with no empty window")
    if ids_MK.size and not np.issubdtype(ids_MK.dtype, np.integer):
        raise DataError(f"{side}_ids: {ids_MK.dtype}, want whole numbers")
    lengths = checked_lengths(lengths_M, len(ids_MK), ids_MK.shape[1], f"{side}_lengths_M")
    ids_MK = np.where(np.arange(ids_MK.shape[1]) < lengths[:, None], ids_MK, 0).astype(np.int64)
    if ids_MK.size and (ids_MK.min() < 0 or ids_MK.max() >= num_rows):
        raise DataError(f"{side}_ids: {ids_MK.min()}..{ids_MK.max()}, want ids of the embedding's {num_rows} rows")
    return ids_MK, lengths


def _inside(student_lengths_M: Int64, teacher_lengths_M: Int64, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """[M, S, T], true where both tokens are there."""
    student_MS = np.arange(shape[1]) < student_lengths_M[:, None]
    teacher_MT = np.arange(shape[2]) < teacher_lengths_M[:, None]
    inside_MST: NDArray[np.bool_] = student_MS[:, :, None] & teacher_MT[:, None, :]
    return inside_MST


def _marginal(lengths_M: Int64, width: int, device: torch.device) -> Tensor:
    """[M, width], 1/length at each token, 0 past the end."""
    return _on(np.where(np.arange(width) < lengths_M[:, None], 1.0 / np.maximum(lengths_M, 1)[:, None], 0.0), device)


def as_numpy(values: Values) -> NDArray[Any]:
    """An array of a tensor on any device, or of whatever numpy takes."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _array(name: str, values: Values) -> NDArray[Any]:
    try:
        return as_numpy(values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: {error}, want an array") from error


def as_floats(name: str, values: Values) -> NDArray[np.float64]:
    """Numbers as float64. Raises DataError, naming `name`, on what holds anything else."""
    found = _array(name, values)
    if found.size and found.dtype.kind not in "fiub":
        raise DataError(f"{name}: {found.dtype}, want numbers")
    return found.astype(np.float64, copy=False)


def as_whole(name: str, values: Values) -> Int64:
    """Whole numbers as int64. Raises DataError, naming `name`, on what is of another dtype or beyond int64."""
    found = _array(name, values)
    if found.size and found.dtype.kind not in "iu":
        raise DataError(f"{name}: {found.dtype}, want whole numbers")
    if found.dtype == np.uint64 and found.size and found.max() > np.iinfo(np.int64).max:
        raise DataError(f"{name}: holds {found.max()}, want whole numbers within int64")
    return found.astype(np.int64, copy=False)


def _on(values: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
