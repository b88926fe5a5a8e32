"""Which response positions the teacher looks ahead from (paper, section 4: high-loss candidates).

Axes: T response tokens of one trajectory, M candidates.
"""

from typing import Literal, get_args

import numpy as np

from topd_ray.errors import DataError
from topd_ray.objective.checks import MASS_SLACK, check_whole, is_number
from topd_ray.objective.transport import Values, as_floats
from topd_ray.types import Float32, Int32

Ranking = Literal["teacher_nll", "sampled_kl"]


def token_loss(sampled_teacher_logprobs: Float32, behaviour_logprobs: Float32, ranking: Ranking) -> Float32:
    """The loss that ranks the tokens of one trajectory, [T] (nats).

    `teacher_nll`: -log p_T(x_t). `sampled_kl`: log p_S(x_t) - log p_T(x_t), the one-sample estimate of the reverse KL.
    Both arguments are [T] (nats); `behaviour_logprobs` is not read by `teacher_nll`.
    Raises DataError if they are not vectors of one length, hold NaN or more than 0, or the ranking is neither; a
    teacher's -inf is a token that it rules out, of infinite loss. Source: the token losses of the paper's section 3.
    """
    if ranking not in get_args(Ranking):
        raise DataError(f"ranking: found {ranking!r}, want one of {', '.join(get_args(Ranking))}")
    teacher_T = _logprobs("sampled_teacher_logprobs", sampled_teacher_logprobs)
    if teacher_T.ndim != 1:
        raise DataError(f"sampled_teacher_logprobs: shape {teacher_T.shape}, want a vector, one a token")
    if ranking == "teacher_nll":
        return -teacher_T
    student_T = _logprobs("behaviour_logprobs", behaviour_logprobs)
    if student_T.shape != teacher_T.shape:
        raise DataError(f"behaviour_logprobs: shape {student_T.shape}, want one each of {teacher_T.shape}")
    if np.isneginf(student_T).any():
        where = int(np.isneginf(student_T).argmax())
        raise DataError(f"behaviour_logprobs: -inf at position {where}, want that of a token that was sampled")
    return student_T - teacher_T


def _logprobs(name: str, logprobs_T: Float32) -> Float32:
    values = as_floats(name, logprobs_T).astype(np.float32)
    is_bad = ~(values <= MASS_SLACK)  # true for NaN
    if is_bad.any():
        raise DataError(f"{name}: holds {values[is_bad][0]}, want log-probs: at most 0")
    return values


def select_candidates(losses_T: Values, fraction: float, min_distance: int = 1) -> Int32:
    """Positions of the highest losses, [M], ascending.

    M = max(1, fraction * T rounded half up). Taken greedily from the highest loss down, a position being passed over
    when a chosen one is nearer than `min_distance` tokens (M is then an upper bound). Of equal losses the earlier
    position goes first, so the choice is deterministic. Raises DataError on no losses, NaN, a fraction outside (0, 1]
    or a distance below 1. Source: the paper's 218 candidates in 9,688 tokens (fraction 0.0225).
    """
    losses_T = as_floats("losses_T", losses_T)
    if losses_T.ndim != 1 or losses_T.size == 0:
        raise DataError(f"losses_T: shape {losses_T.shape}, want a vector of at least one token's loss")
    if np.isnan(losses_T).any():
        raise DataError(f"losses_T: the loss at position {int(np.isnan(losses_T).argmax())} is NaN, want a number")
    if not (is_number(fraction) and 0.0 < fraction <= 1.0):
        raise DataError(f"fraction is {fraction!r}, and should lie in (0, 1]")
    check_whole("min_distance", min_distance, 1)
    num_wanted = max(1, int(np.floor(fraction * losses_T.size + 0.5)))
    by_loss_T = np.argsort(-losses_T, kind="stable")
    if min_distance == 1:
        return np.sort(by_loss_T[:num_wanted]).astype(np.int32)
    blocked_T = np.zeros(losses_T.size, np.bool_)
    chosen: list[int] = []
    for position in by_loss_T.tolist():
        if blocked_T[position]:
            continue
        chosen.append(position)
        if len(chosen) == num_wanted:
            break
        blocked_T[max(0, position - min_distance + 1) : position + min_distance] = True
    return np.array(sorted(chosen), np.int32)


def random_candidates(num_tokens: int, fraction: float, rng: np.random.Generator, min_distance: int = 1) -> Int32:
    """Positions drawn uniformly without replacement, [M], ascending: the control of `select_candidates`.

    As many as there, and no two nearer than `min_distance` tokens: positions are visited in random order, and passed
    over when a chosen one is nearer. Draws from `rng` once. Raises DataError for no tokens, and as `select_candidates`
    does. Source: this package's; what the paper's choice by loss is worth shows beside it.
    """
    check_whole("num_tokens", num_tokens, 1)
    return select_candidates(rng.permutation(num_tokens), fraction, min_distance)
