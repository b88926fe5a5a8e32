"""Importance weights of positions whose prefix was written by an older policy than the one that learns.

Axes: N response tokens of some trajectories, laid end to end; T tokens of one of them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from topd_ray.errors import DataError
from topd_ray.objective.checks import (
    Finding,
    check_device,
    check_dtype,
    check_shape,
    check_whole,
    is_number,
    not_logprobs,
    raise_first,
)


@torch.no_grad()
def prefix_weights(
    logprob_N: Tensor,
    behaviour_logprob_N: Tensor,
    lengths: Sequence[int],
    *,
    clip: float,
    horizon: int,
    check_finite: bool = True,
) -> Tensor:
    """Truncated importance weight of every position's prefix, [N], without gradient: `LossBatch.weight_N`.

    w_t = min(clip, exp(sum_{i = max(0, t - horizon)}^{t - 1} (log p_S(x_i) - log b(x_i)))), with the learner's policy
    p_S, the policy b that wrote the trajectory, and t counted within its trajectory. Log-probs of the sampled tokens
    under either policy, [N] (nats); `lengths`, how many of the N tokens each trajectory has. Sums in float64, each
    trajectory on its own; the weights come in the first argument's dtype, float32 at least.

    Why the prefix: the objective sums a term of position t over prefixes x_<t that p_S writes, and where b wrote them,
    E_b[p_S(x_<t) / b(x_<t) f_t(x_<t)] = E_{p_S}[f_t(x_<t)]. The token's own ratio is not in it: a divergence over the
    vocabulary depends on x_<t alone, and x_t has been summed out. A term that does depend on x_t needs it besides:
    `sampled_policy_gradient` brings that ratio along, truncated on its own, so that none counts twice and a token's
    whole weight is at most clip^2. Soft targets of the guidance are taken as given: that the later tokens of a window
    had a part in them is left uncorrected.

    With a horizon of at least the longest trajectory and an infinite clip this is the textbook's unbiased weight. Its
    variance grows exponentially with the length of the product, so both are bounded, at the price of a bias: the clip
    as in truncated importance sampling (Ionides, 2008, J. Comput. Graph. Stat. 17(2)) and in the truncated products of
    V-trace (Espeholt et al., 2018, arXiv 1802.01561), the horizon to the ratios of the nearest tokens. With a horizon
    of 0 the product is empty.

    Raises DataError on shapes, dtypes or devices that do not fit, lengths that do not sum to N, log-probs that are not
    finite or above 0, and a clip or a horizon out of range. With `check_finite` off, values of `logprob_N` and NaN are
    left to the caller: NaN comes back in the weights of the rest of its trajectory, and of no other.
    """
    _check(logprob_N, behaviour_logprob_N, lengths, clip, horizon, check_finite)
    log_ratio_N = logprob_N.double() - behaviour_logprob_N.double()
    parts = [_sums_before(ratio_T, horizon) for ratio_T in torch.split(log_ratio_N, list(lengths))]
    log_weight_N = torch.cat([log_ratio_N.new_zeros(0), *parts])
    return log_weight_N.exp().clamp(max=clip).to(torch.promote_types(logprob_N.dtype, torch.float32))


def _sums_before(values_T: Tensor, horizon: int) -> Tensor:
    """[T], the sum of the `horizon` values before each, of fewer at the start."""
    before_T = torch.cat([values_T.new_zeros(1), values_T.cumsum(0)])[: len(values_T)]
    sums_T = before_T.clone()
    sums_T[horizon:] -= before_T[: max(len(values_T) - horizon, 0)]
    return sums_T


def _check(
    logprob_N: Tensor,
    behaviour_logprob_N: Tensor,
    lengths: Sequence[int],
    clip: float,
    horizon: int,
    check_finite: bool,
) -> None:
    check_shape("logprob_N", logprob_N, "N")
    check_dtype("logprob_N", logprob_N, "float")
    check_shape("behaviour_logprob_N", behaviour_logprob_N, len(logprob_N))
    check_dtype("behaviour_logprob_N", behaviour_logprob_N, "float")
    check_device("behaviour_logprob_N", behaviour_logprob_N, logprob_N.device)
    for length in lengths:
        check_whole("lengths", length, 0)
    if sum(lengths) != len(logprob_N):
        raise DataError(f"lengths sum to {sum(lengths)}, and should sum to {len(logprob_N)}, the tokens of logprob_N")
    if not (is_number(clip) and clip > 0.0):
        raise DataError(f"clip is {clip!r}, and should be above 0; {math.inf} clips nothing")
    check_whole("horizon", horizon, 0)
    findings = _findings("behaviour_logprob_N", behaviour_logprob_N, allow_nan=not check_finite)
    if check_finite:
        findings += _findings("logprob_N", logprob_N, allow_nan=False)
    raise_first(findings)


def _findings(name: str, logprob_N: Tensor, *, allow_nan: bool) -> list[Finding]:
    is_ruled_out_N = logprob_N == -torch.inf
    return [
        not_logprobs(name, logprob_N, allow_nan=allow_nan),
        (
            is_ruled_out_N.any(),
            lambda: (
                f"{name} holds -inf in row {int(is_ruled_out_N.nonzero()[0])}, and should be finite: the token was "
                "sampled"
            ),
        ),
    ]
