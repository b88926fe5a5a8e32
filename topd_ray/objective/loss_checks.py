"""What the loss refuses.

Axes: N response tokens, K top teacher tokens, D hidden width, V rows of the student's head, Z nonzeros of the guidance.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from topd_ray.errors import DataError, NonFiniteLossError
from topd_ray.objective.checks import (
    Finding,
    check_device,
    check_dtype,
    check_shape,
    is_number,
    not_a_teacher,
    not_logprobs,
    outside_vocabulary,
    raise_first,
)
from topd_ray.objective.loss_data import LossBatch, LossSpec

# A row of the guidance's weights is a sum over up to some hundred windows, each in float32.
WINDOW_SLACK = 1e-3
ROUNDING = 1e-6


def check_head(hidden_ND: Tensor, head_weight_VD: Tensor, head_bias: Tensor | None, num_vocabulary: int | None) -> int:
    """Raise DataError unless hidden states and head fit each other; return the number of rows that take part."""
    check_shape("hidden_ND", hidden_ND, "N", "D")
    check_dtype("hidden_ND", hidden_ND, "float")
    check_shape("head_weight_VD", head_weight_VD, "V", hidden_ND.shape[1])
    check_dtype("head_weight_VD", head_weight_VD, "float")
    check_device("head_weight_VD", head_weight_VD, hidden_ND.device)
    num_rows = head_weight_VD.shape[0]
    if head_bias is not None:
        check_shape("head_bias", head_bias, num_rows)
        check_dtype("head_bias", head_bias, "float")
        check_device("head_bias", head_bias, hidden_ND.device)
    if num_vocabulary is None:
        num_vocabulary = num_rows
    if not is_number(num_vocabulary) or num_vocabulary not in range(1, num_rows + 1):
        raise DataError(f"num_vocabulary is {num_vocabulary}, and should be 1..{num_rows}, the rows of head_weight_VD")
    return num_vocabulary


def check_token_ids(token_ids: Tensor, hidden_ND: Tensor, num_vocabulary: int) -> None:
    check_shape("token_ids", token_ids, len(hidden_ND))
    check_device("token_ids", token_ids, hidden_ND.device)
    check_dtype("token_ids", token_ids, "integer")
    raise_first([outside_vocabulary("token_ids", token_ids, num_vocabulary)])


def check_batch(
    batch: LossBatch,
    spec: LossSpec,
    hidden_ND: Tensor,
    num_vocabulary: int,
    median_N: Tensor | None = None,
    *,
    allow_nan: bool = False,
) -> bool:
    """Raise DataError for a batch that is not one of these hidden states; return whether any token is capped."""
    _check_tensors(batch, hidden_ND, median_N)
    if batch.advantage_N is not None and spec.kl_discount == 0.0:
        raise DataError("advantage_N is given, and should be None: kl_discount is 0")
    if batch.weight_N is not None and spec.kl_discount > 0.0:
        raise DataError(
            f"weight_N is given, and should be None: kl_discount is {spec.kl_discount}, and what an older policy wrote "
            "later is in no weight of a prefix"
        )
    any_capped = batch.capped.any()
    findings = [
        *not_a_teacher(
            batch.teacher_topk_ids,
            batch.teacher_topk_logprobs,
            batch.sampled_ids,
            batch.teacher_sampled_logprobs,
            num_vocabulary,
            prefix="teacher_",
            allow_nan=allow_nan,
        ),
        not_logprobs("behaviour_logprobs", batch.behaviour_logprobs, allow_nan=allow_nan),
        *_guidance_findings(batch, num_vocabulary, allow_nan),
    ]
    for name, values_N in (("median_N", median_N), ("weight_N", batch.weight_N)):
        if values_N is not None:
            findings.append(_negative(name, values_N, allow_nan))
    # One transfer for the answer to all of them, and to the caller's own question.
    flags = torch.stack([flag for flag, _ in findings]).any()
    is_wrong, is_capped = torch.stack([flags, any_capped]).tolist()
    if is_wrong:
        raise_first(findings)
    if is_capped and spec.divergence == "sampled_pg":
        raise DataError("capped: tokens are capped, but sampled_pg has no token loss to cap: use a divergence")
    return bool(is_capped)


def _check_tensors(batch: LossBatch, hidden_ND: Tensor, median_N: Tensor | None) -> None:
    """Shapes, dtypes and devices."""
    num_tokens = len(hidden_ND)
    check_shape("teacher_topk_ids", batch.teacher_topk_ids, num_tokens, "K")
    num_columns = batch.teacher_topk_ids.shape[1]
    wanted: dict[str, dict[str, tuple[int | str, ...]]] = {
        "integer": {
            "sampled_ids": (num_tokens,),
            "teacher_topk_ids": (num_tokens, num_columns),
            "segment_ids": (num_tokens,),
            "target_indptr": (num_tokens + 1,),
            "target_ids": ("Z",),
        },
        "float": {
            "teacher_topk_logprobs": (num_tokens, num_columns),
            "teacher_sampled_logprobs": (num_tokens,),
            "behaviour_logprobs": (num_tokens,),
            "target_weights": tuple(batch.target_ids.shape),
            "target_entropy": (num_tokens,),
        },
        "bool": {"capped": (num_tokens,)},
    }
    for kind, shapes in wanted.items():
        for name, shape in shapes.items():
            check_shape(name, getattr(batch, name), *shape)
            check_dtype(name, getattr(batch, name), kind)
            check_device(name, getattr(batch, name), hidden_ND.device)
    optional = (("median_N", median_N), ("weight_N", batch.weight_N), ("advantage_N", batch.advantage_N))
    for name, values_N in optional:
        if values_N is not None:
            check_shape(name, values_N, num_tokens)
            check_dtype(name, values_N, "float")
            check_device(name, values_N, hidden_ND.device)


def _guidance_findings(batch: LossBatch, num_vocabulary: int, allow_nan: bool) -> list[Finding]:
    indptr, weights_Z = batch.target_indptr, batch.target_weights
    num_targets = len(weights_Z)
    is_broken = (indptr.diff() < 0).any() | (indptr[0] != 0) | (indptr[-1] != num_targets)
    # Sums of the rows from a running sum: exact in float64, and no sparse operation.
    running = torch.cat([weights_Z.new_zeros(1, dtype=torch.float64), weights_Z.double().cumsum(0)])
    sums_N = running[indptr.clamp(0, num_targets).long()].diff()
    is_odd_N = (sums_N - sums_N.round()).abs() > WINDOW_SLACK * sums_N.clamp(min=1.0)
    is_orphan_N = (batch.target_entropy > ROUNDING) & (sums_N <= WINDOW_SLACK)
    return [
        (
            is_broken,
            lambda: (
                f"target_indptr goes from {int(indptr[0])} to {int(indptr[-1])}, and should rise from 0 to "
                f"{num_targets}, the length of target_ids"
            ),
        ),
        outside_vocabulary("target_ids", batch.target_ids, num_vocabulary),
        _negative("target_weights", weights_Z, allow_nan),
        (
            is_odd_N.any(),
            lambda: (
                f"target_weights of row {int(is_odd_N.nonzero()[0])} sum to {float(sums_N[is_odd_N][0]):.6g}, and "
                "should sum to the number of windows that cover it: the targets of each are a distribution"
            ),
        ),
        _negative("target_entropy", batch.target_entropy, allow_nan),
        (
            is_orphan_N.any(),
            lambda: (
                f"target_entropy of row {int(is_orphan_N.nonzero()[0])} is "
                f"{float(batch.target_entropy[is_orphan_N][0])}, and should be 0: the row has no target_weights"
            ),
        ),
    ]


def _negative(name: str, values: Tensor, allow_nan: bool) -> Finding:
    """Below 0 by more than rounding, infinite, or NaN."""
    is_bad = (values < -ROUNDING) | values.isinf()
    if not allow_nan:
        is_bad |= values.isnan()
    return is_bad.any(), lambda: f"{name} holds {float(values[is_bad][0])}, and should be finite and not negative"


def check_counts(spec: LossSpec, counts: Mapping[str, float | None]) -> None:
    """Raise DataError unless the totals of the batch can be divided by."""
    for name, count in counts.items():
        if count is None and name == "num_trajectories":
            continue
        is_one = is_number(count) or (isinstance(count, Tensor) and count.numel() == 1)
        if count is None or not (is_one and math.isfinite(count) and count >= 0.0):
            raise DataError(f"{name} is {count!r}, and should be finite and not negative")
    if spec.guidance_reduction == "sum" and counts["num_trajectories"] is None:
        raise DataError("num_trajectories is None, and should be given: guidance_reduction=sum divides by it")


def raise_non_finite(loss: Tensor, token_loss_N: Tensor, inputs: Mapping[str, Tensor | None]) -> None:
    """Raise NonFiniteLossError, naming the input that is to blame."""
    found = [
        f"{name} holds {num_bad} values that are NaN or infinite, of {tensor.numel()}"
        for name, tensor in inputs.items()
        if tensor is not None and (num_bad := int((~tensor.isfinite()).sum()))
    ]
    where = (~token_loss_N.isfinite()).nonzero().flatten().tolist()
    reason = "; ".join(found) or "all inputs are finite, so their product has overflowed"
    raise NonFiniteLossError(f"the loss is {loss.item()} ({len(where)} tokens, the first {where[:1]}): {reason}")
