"""What divergences and loss refuse. Questions about values go to the device together, and are answered by one transfer.

Axes: N tokens, K top teacher tokens.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from topd_ray.errors import DataError

Finding = tuple[Tensor, Callable[[], str]]
"""a scalar, true where something is wrong, and what to say then"""

# Log-probs are rounded, and those of a lower precision more: this much above all the probability is no error.
MASS_SLACK = 1e-3


def raise_first(findings: Sequence[Finding]) -> None:
    """Raise DataError for the first finding that is true."""
    if not findings:
        return
    for is_wrong, (_, message) in zip(torch.stack([flag for flag, _ in findings]).tolist(), findings, strict=True):
        if is_wrong:
            raise DataError(message())


def check_shape(name: str, tensor: Tensor, *shape: int | str) -> None:
    """Raise DataError unless `tensor` has this shape; a text stands for any length."""
    if not isinstance(tensor, Tensor):
        raise DataError(f"{name} is a {type(tensor).__name__}, and should be a tensor")
    fits = tensor.ndim == len(shape) and all(
        isinstance(wanted, str) or found == wanted for found, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise DataError(f"{name} has shape {list(tensor.shape)}, and should have [{', '.join(map(str, shape))}]")


def check_dtype(name: str, tensor: Tensor, kind: str) -> None:
    """Raise DataError unless `tensor` holds what `kind` says: float, integer or bool."""
    is_bool = tensor.dtype == torch.bool
    found = "bool" if is_bool else "float" if tensor.is_floating_point() else "integer"
    if found != kind or tensor.is_complex():
        raise DataError(f"{name} is of {tensor.dtype}, and should be of a {kind} dtype")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise DataError unless `tensor` is on `device`."""
    if tensor.device != device:
        raise DataError(f"{name} is on {tensor.device}, and should be on {device} like the first argument")


def is_number(value: Any) -> bool:
    """True for what Python and numpy call a real number, NaN too; false for a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_positive(name: str, value: float) -> None:
    if not (is_number(value) and math.isfinite(value) and value > 0.0):
        raise DataError(f"{name} is {value!r}, and should be finite and above 0")


def check_whole(name: str, value: int, at_least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:
        raise DataError(f"{name} is {value!r}, and should be a whole number of at least {at_least}")


def check_one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise DataError(f"{name} is {value!r}, and should be one of {', '.join(allowed)}")


def outside_vocabulary(name: str, ids: Tensor, num_vocabulary: int, mask: Tensor | None = None) -> Finding:
    is_bad = (ids < 0) | (ids >= num_vocabulary)
    if mask is not None:
        is_bad &= mask
    return (
        is_bad.any(),
        lambda: f"{name} holds the id {int(ids[is_bad][0])}, and should hold 0..{num_vocabulary - 1}, the vocabulary's",
    )


def not_logprobs(name: str, logprobs: Tensor, *, allow_nan: bool = False) -> Finding:
    """Above 0, or NaN."""
    slack = _mass_slack(logprobs)
    is_bad = logprobs > slack if allow_nan else ~(logprobs <= slack)
    return is_bad.any(), lambda: f"{name} holds {float(logprobs[is_bad][0])}, and should hold log-probs: at most 0"


def not_normalisable(name: str, log_normaliser_N: Tensor) -> Finding:
    """A row of logits with NaN or +inf in it, or nothing above -inf, has no finite logsumexp."""
    is_bad_N = ~log_normaliser_N.isfinite()
    return (
        is_bad_N.any(),
        lambda: (
            f"{name}: row {int(is_bad_N.nonzero()[0])} has the logsumexp {float(log_normaliser_N[is_bad_N][0])}, so it "
            "holds NaN or +inf, or no finite logit at all"
        ),
    )


def not_a_teacher(
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    sampled_ids: Tensor,
    sampled_logprobs: Tensor,
    num_vocabulary: int,
    *,
    prefix: str = "",
    allow_nan: bool = False,
) -> list[Finding]:
    """What is wrong with a teacher's top-k [N, K] (-inf: padding) and log-probs of the sampled tokens [N].

    `prefix` is what the caller's names of all but `sampled_ids` begin with.
    """
    name_ids, name_logprobs, name_sampled = f"{prefix}topk_ids", f"{prefix}topk_logprobs", f"{prefix}sampled_logprobs"
    in_topk_NK = topk_logprobs != -torch.inf
    is_new_N1 = ~((topk_ids == sampled_ids.unsqueeze(1)) & in_topk_NK).any(1, keepdim=True)
    sampled_N1 = sampled_logprobs.to(topk_logprobs).unsqueeze(1).masked_fill(~is_new_N1, -torch.inf)
    logp = torch.cat([topk_logprobs, sampled_N1], dim=1)
    mass_N = logp.to(torch.promote_types(logp.dtype, torch.float32)).exp().sum(1)
    is_heavy_N = mass_N > 1.0 + _mass_slack(topk_logprobs)
    num_columns = topk_ids.shape[1]
    padding_K = torch.arange(-num_columns, 0, device=topk_ids.device, dtype=torch.int32)
    ordered_NK = torch.where(in_topk_NK, topk_ids, padding_K).int().sort(1).values
    is_double_N = (ordered_NK[:, 1:] == ordered_NK[:, :-1]).any(1)
    return [
        outside_vocabulary(name_ids, topk_ids, num_vocabulary, in_topk_NK),
        outside_vocabulary("sampled_ids", sampled_ids, num_vocabulary),
        not_logprobs(name_logprobs, topk_logprobs, allow_nan=allow_nan),
        not_logprobs(name_sampled, sampled_logprobs, allow_nan=allow_nan),
        (
            is_heavy_N.any(),
            lambda: (
                f"{name_logprobs}: with the sampled token, row {int(is_heavy_N.nonzero()[0])} holds the "
                f"probability {float(mass_N[is_heavy_N][0]):.6g}, and should hold at most 1"
            ),
        ),
        (
            is_double_N.any(),
            lambda: f"{name_ids}: row {int(is_double_N.nonzero()[0])} holds a token twice, and should hold each once",
        ),
    ]


def _mass_slack(logprobs: Tensor) -> float:
    return max(MASS_SLACK, 4.0 * torch.finfo(logprobs.dtype).eps)
