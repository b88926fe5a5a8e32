"""A true KL between student and teacher from the teacher's top-k tokens (design, decision 2).

The vocabulary is coarse-grained: every column of the support is one token, and one tail column holds the mass of all
other tokens, on both sides. By the data-processing inequality each divergence here is a lower bound of the one over the
full vocabulary and equals it when the support is the whole vocabulary; none is ever negative. (The teacher's tail is
1 - sum of rounded probabilities, known to a few 1e-7 in float32: the bound holds up to that over the tail.)

Axes: N tokens, V vocabulary, K top teacher tokens, C = K + 2 columns (top-k, sampled token, tail). All values in nats.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from topd_ray.errors import DataError
from topd_ray.objective.checks import (
    check_device,
    check_dtype,
    check_one_of,
    check_positive,
    check_shape,
    is_number,
    not_a_teacher,
    not_logprobs,
    not_normalisable,
    raise_first,
)

DivergenceKind = Literal["reverse", "forward", "jsd"]

# Stands in for log 0 where a token or the tail cannot be reached, so that products and gradients stay finite.
MIN_LOGPROB = -100.0
# Sums of teacher probabilities are wrong by some roundings of 1: a tail below this many is told from none by nothing.
TAIL_ROUNDINGS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """The columns on which student and teacher are compared, and the teacher's side of them."""

    ids: Tensor
    """[N, K + 1] int64, top-k and sampled token; a masked column repeats the sampled token"""
    mask: Tensor
    """[N, C], true where the column counts (the tail always does)"""
    teacher_logp: Tensor
    """[N, C], finite; the tail is floored, masked columns hold 0"""
    is_floored: Tensor
    """[N] bool, true where the teacher's tail stands on its floor"""

    @classmethod
    def build(cls, topk_ids: Tensor, topk_logprobs: Tensor, sampled_ids: Tensor, sampled_logprobs: Tensor) -> "Support":
        """The support of N tokens, from top-k ids and log-probs [N, K] and the sampled token's [N]; K = 0 will do.

        Top-k columns of log-prob -inf (padding, whatever their id) are masked, and so is the sampled token where it is
        one of the top-k. The teacher's tail is log(1 - sum of the columns), floored at `TAIL_ROUNDINGS` roundings of
        its dtype; what is narrower than float32 is widened first. Raises DataError if the shapes do not fit; does not
        look at values.
        """
        check_shape("sampled_ids", sampled_ids, "N")
        num_tokens = sampled_ids.shape[0]
        check_shape("sampled_logprobs", sampled_logprobs, num_tokens)
        check_shape("topk_ids", topk_ids, num_tokens, "K")
        check_shape("topk_logprobs", topk_logprobs, *topk_ids.shape)
        topk_logprobs, sampled_logprobs = _wide(topk_logprobs), _wide(sampled_logprobs)
        sampled_N1 = sampled_ids.long().unsqueeze(1)
        in_topk_NK = topk_logprobs != -torch.inf
        is_new_N1 = ~((topk_ids == sampled_N1) & in_topk_NK).any(1, keepdim=True)
        mask_NC = torch.cat([in_topk_NK, is_new_N1, is_new_N1.new_ones(num_tokens, 1)], dim=1)
        token_logp = torch.cat([topk_logprobs, _reachable(sampled_logprobs).unsqueeze(1)], dim=1)
        total_N1 = token_logp.masked_fill(~mask_NC[:, :-1], -torch.inf).logsumexp(1, keepdim=True)
        tail_N1 = -torch.expm1(total_N1)
        floor = TAIL_ROUNDINGS * torch.finfo(token_logp.dtype).eps
        return cls(
            ids=torch.cat([torch.where(in_topk_NK, topk_ids.long(), sampled_N1), sampled_N1], dim=1),
            mask=mask_NC,
            teacher_logp=torch.cat([token_logp, tail_N1.clamp(min=floor).log()], dim=1).masked_fill(~mask_NC, 0.0),
            is_floored=tail_N1.squeeze(1) <= floor,
        )

    def split(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """What `student_logp` reads of logits: those of `ids`, [N, K + 1], and the logsumexp of all others, [N]."""
        outside_NV = logits_NV.scatter(1, self.ids, torch.finfo(logits_NV.dtype).min / 2)
        return logits_NV.gather(1, self.ids), outside_NV.logsumexp(1)

    def student_logp(self, picked_logits: Tensor, log_outside_N: Tensor) -> tuple[Tensor, Tensor]:
        """The student's log-probs on the support, [N, C] (masked columns 0), and its log-normaliser, [N].

        The tail is the logsumexp of the logits outside of the support: no 1 - sum, so value and gradient are right down
        to the smallest tail, and no tail (k = V, a logsumexp of -inf or nearly) gives no NaN. Only where the teacher's
        tail stands on its floor is the student's floored as well: both tails are then equal, cost nothing, and teach
        nothing.
        """
        log_inside_N = picked_logits.masked_fill(~self.mask[:, :-1], -torch.inf).logsumexp(1)
        log_normaliser_N = torch.logaddexp(log_inside_N, log_outside_N)
        log_tail_N = log_outside_N - log_normaliser_N
        teacher_tail_N = self.teacher_logp[:, -1].to(log_tail_N)
        log_tail_N = torch.where(self.is_floored, torch.maximum(log_tail_N, teacher_tail_N), log_tail_N)
        logp_NC = torch.cat([picked_logits - log_normaliser_N.unsqueeze(1), log_tail_N.unsqueeze(1)], dim=1)
        return _reachable(logp_NC).masked_fill(~self.mask, 0.0), log_normaliser_N


def divergence(
    student_logp_NC: Tensor,
    teacher_logp_NC: Tensor,
    mask_NC: Tensor | None = None,
    kind: DivergenceKind = "reverse",
    jsd_beta: float = 0.5,
) -> Tensor:
    """D per token, [N] (nats), from log-probs [N, C] on the same C columns; differentiable in the student only.

    With p the student, q the teacher, b = `jsd_beta`:
    reverse: sum_c p log(p / q).  forward: sum_c q log(q / p).
    jsd: b * KL(q || m) + (1 - b) * KL(p || m) with m = b * q + (1 - b) * p, so b weights the teacher (TRL's beta).

    Columns that are false in `mask_NC` count for nothing, whatever they hold; the others are finite, and on both sides
    of mass 1. Each column is summed as p log(p / q) - p + q >= 0: with both sides normalised the sum is the same, no
    cancellation makes it negative, at p = q the gradient is exactly 0. Raises DataError on shapes that do not fit, an
    unknown kind, and a `jsd_beta` outside of (0, 1); does not look at values, as `full_divergence` and
    `topk_divergence` do.
    Source: the per-token loss of the paper's section 3 (reverse); generalised JSD as in GKD (arXiv 2306.13649).
    """
    check_divergence(kind, jsd_beta)
    check_shape("student_logp_NC", student_logp_NC, "N", "C")
    check_shape("teacher_logp_NC", teacher_logp_NC, *student_logp_NC.shape)
    student_NC, teacher_NC = student_logp_NC, teacher_logp_NC.detach()
    if mask_NC is not None:
        check_shape("mask_NC", mask_NC, *student_logp_NC.shape)
        check_dtype("mask_NC", mask_NC, "bool")
        student_NC = student_NC.masked_fill(~mask_NC, 0.0)
        teacher_NC = teacher_NC.masked_fill(~mask_NC, 0.0)
    p_NC, q_NC = student_NC.exp(), teacher_NC.exp()
    if kind == "reverse":
        terms_NC = p_NC * (student_NC - teacher_NC) - p_NC + q_NC
    elif kind == "forward":
        terms_NC = q_NC * (teacher_NC - student_NC) - q_NC + p_NC
    else:
        share_q, share_p = teacher_NC.new_tensor([jsd_beta, 1.0 - jsd_beta]).unbind()
        mixture_NC = torch.logaddexp(teacher_NC + share_q.log(), student_NC + share_p.log())
        terms_NC = share_q * q_NC * (teacher_NC - mixture_NC) + share_p * p_NC * (student_NC - mixture_NC)
    value_N = (terms_NC if mask_NC is None else terms_NC.masked_fill(~mask_NC, 0.0)).sum(1)
    # Roundings may leave -1e-8: the value is clamped, the gradient is not.
    return value_N + (value_N.clamp(min=0.0) - value_N).detach()


def full_divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    kind: DivergenceKind = "reverse",
    jsd_beta: float = 0.5,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """D per token over the whole vocabulary, [N] (nats), from both sides' logits (or log-probs), [N, V].

    `divergence` of the softmax of both at `temperature`, in float32 or wider; the gradient goes to the student. A logit
    of -inf is a token that cannot be reached; where only one side rules it out it counts as log-probability -100.
    Raises DataError on shapes or devices that do not fit, NaN or +inf, an unknown kind, a `jsd_beta` outside of (0, 1),
    and a temperature that is not above 0. It makes [N, V] tensors: `topd_loss` does not.
    Source: the per-token loss of the paper's section 3.
    """
    check_positive("temperature", temperature)
    _check_logits("student_logits_NV", student_logits_NV)
    _check_logits("teacher_logits_NV", teacher_logits_NV)
    check_shape("teacher_logits_NV", teacher_logits_NV, *student_logits_NV.shape)
    check_device("teacher_logits_NV", teacher_logits_NV, student_logits_NV.device)
    student_NV = _wide(student_logits_NV) / temperature
    teacher_NV = _wide(teacher_logits_NV).to(student_NV.dtype).detach() / temperature
    normalisers = student_NV.logsumexp(1, keepdim=True), teacher_NV.logsumexp(1, keepdim=True)
    raise_first(
        [
            not_normalisable("student_logits_NV", normalisers[0].detach().squeeze(1)),
            not_normalisable("teacher_logits_NV", normalisers[1].squeeze(1)),
        ]
    )
    return divergence(
        _reachable(student_NV - normalisers[0]), _reachable(teacher_NV - normalisers[1]), None, kind, jsd_beta
    )


def topk_divergence(
    student_logits_NV: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    kind: DivergenceKind = "reverse",
    jsd_beta: float = 0.5,
    *,
    sampled_ids: Tensor | None = None,
    sampled_logprobs: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """D per token on the teacher's top-k, the sampled token if given, and one tail, [N] (nats): the loss's own.

    From the student's logits [N, V], the teacher's ids and log-probs [N, K] (at the same temperature; -inf is padding,
    whatever its id), and those of the sampled token, [N]. At most `full_divergence`, equal to it at K = V, never
    negative; 0 for a row of nothing but padding. The gradient goes to the student. Raises DataError on shapes, dtypes
    or devices that do not fit, ids out of the vocabulary or twice in a row, log-probs that are NaN, above 0 or of a
    mass above 1, logits that are NaN or +inf, and as `full_divergence` does.
    Source: the per-token loss of the paper's section 3, coarse-grained as this module's head says.
    """
    check_divergence(kind, jsd_beta)
    check_positive("temperature", temperature)
    _check_logits("student_logits_NV", student_logits_NV)
    num_tokens, num_vocabulary = student_logits_NV.shape
    check_shape("topk_ids", topk_ids, num_tokens, "K")
    check_shape("topk_logprobs", topk_logprobs, *topk_ids.shape)
    if (sampled_ids is None) != (sampled_logprobs is None):
        raise DataError("sampled_ids and sampled_logprobs: one is given, and should be both or none")
    is_topk_only = sampled_ids is None
    if sampled_ids is None or sampled_logprobs is None:
        if topk_ids.shape[1] == 0:
            raise DataError(
                f"topk_ids has shape {list(topk_ids.shape)}, and K should be at least 1 without sampled_ids"
            )
        # Stands for the sampled token: the likeliest of the top-k, or any token where all of them are padding.
        best_N1 = topk_logprobs.argmax(1, keepdim=True)
        sampled_logprobs = topk_logprobs.gather(1, best_N1).squeeze(1)
        sampled_ids = topk_ids.gather(1, best_N1).squeeze(1).masked_fill(sampled_logprobs == -torch.inf, 0)
    check_shape("sampled_ids", sampled_ids, num_tokens)
    teacher = {
        "integer": {"topk_ids": topk_ids, "sampled_ids": sampled_ids},
        "float": {"topk_logprobs": topk_logprobs, "sampled_logprobs": sampled_logprobs},
    }
    for kind_of_dtype, tensors in teacher.items():
        for name, tensor in tensors.items():
            check_dtype(name, tensor, kind_of_dtype)
            check_device(name, tensor, student_logits_NV.device)
    logits_NV = _wide(student_logits_NV) / temperature
    topk_logprobs, sampled_logprobs = topk_logprobs.detach(), sampled_logprobs.detach()
    support = Support.build(
        topk_ids, topk_logprobs.to(logits_NV.dtype), sampled_ids, sampled_logprobs.to(logits_NV.dtype)
    )
    if is_topk_only:
        mask_NC = support.mask.clone()
        mask_NC[:, -2] = False
        support = replace(support, mask=mask_NC, teacher_logp=support.teacher_logp.masked_fill(~mask_NC, 0.0))
    raise_first(not_a_teacher(topk_ids, topk_logprobs, sampled_ids, sampled_logprobs, num_vocabulary))
    student_NC, log_normaliser_N = support.student_logp(*support.split(logits_NV))
    raise_first([not_normalisable("student_logits_NV", log_normaliser_N.detach())])
    return divergence(student_NC, support.teacher_logp, support.mask, kind, jsd_beta)


def sampled_divergence(
    student_logp_N: Tensor, teacher_logp_N: Tensor, kind: DivergenceKind = "reverse", jsd_beta: float = 0.5
) -> Tensor:
    """D per token on two columns, the sampled token and all others, [N] (nats), from its log-probs alone.

    `topk_divergence` at K = 0, for teachers that score sampled tokens only: a lower bound of `full_divergence` without
    sampling noise. (`sampled_policy_gradient` is the unbiased estimate, with noise.) Tails of fewer than
    `TAIL_ROUNDINGS` roundings of 1 count as that many. Raises DataError on shapes that do not fit, log-probs that are
    NaN or above 0, and as `divergence` does. The gradient goes to the student.
    Source: the per-token loss of the paper's section 3, coarse-grained as this module's head says.
    """
    check_shape("student_logp_N", student_logp_N, "N")
    check_shape("teacher_logp_N", teacher_logp_N, *student_logp_N.shape)
    check_dtype("student_logp_N", student_logp_N, "float")
    check_dtype("teacher_logp_N", teacher_logp_N, "float")
    raise_first([not_logprobs("student_logp_N", student_logp_N), not_logprobs("teacher_logp_N", teacher_logp_N)])

    def columns(logp_N: Tensor) -> Tensor:
        logp_N = _wide(logp_N)
        floor = TAIL_ROUNDINGS * torch.finfo(logp_N.dtype).eps
        return torch.stack([_reachable(logp_N), (-torch.expm1(logp_N)).clamp(min=floor).log()], dim=1)

    return divergence(columns(student_logp_N), columns(teacher_logp_N.detach()), None, kind, jsd_beta)


def check_divergence(kind: str, jsd_beta: float) -> None:
    """Raise DataError unless these name a divergence."""
    check_one_of("kind", kind, get_args(DivergenceKind))
    if kind == "jsd" and not (is_number(jsd_beta) and 0.0 < jsd_beta < 1.0):
        raise DataError(f"jsd_beta is {jsd_beta!r}, and should lie inside (0, 1): at its ends use reverse or forward")


def sampled_policy_gradient(
    student_logp_N: Tensor,
    teacher_logp_N: Tensor,
    behaviour_logp_N: Tensor,
    importance_clip: float,
    advantage_N: Tensor | None = None,
) -> Tensor:
    """A per-token loss, [N], whose gradient is the sampled-token estimate of the reverse KL's; its value means nothing.

    -(w * A).detach() * log p_S(x), advantage A = log p_T(x) - log p_S(x), truncated importance weight
    w = min(p_S(x) / p_behaviour(x), importance_clip). Its mean gradient over x ~ behaviour is that of KL(p_S || p_T)
    wherever nothing is truncated. The weight is of the token alone: that of its prefix (`prefix_weights`) multiplies
    the loss. `advantage_N` takes the place of A (`discounted_advantages`). All [N], in nats; the gradient goes to the
    student's log-prob. Raises DataError on shapes that do not fit, log-probs that are NaN or above 0, and a clip that
    is not above 0.
    Source: the on-policy estimate of the reverse KL of the paper's section 3; truncated weights as in IMPALA's V-trace
    (arXiv 1802.01561).
    """
    check_shape("student_logp_N", student_logp_N, "N")
    check_shape("teacher_logp_N", teacher_logp_N, *student_logp_N.shape)
    check_shape("behaviour_logp_N", behaviour_logp_N, *student_logp_N.shape)
    check_positive("importance_clip", importance_clip)
    sides = {
        "student_logp_N": student_logp_N.detach(),
        "teacher_logp_N": teacher_logp_N,
        "behaviour_logp_N": behaviour_logp_N,
    }
    for name, logp_N in sides.items():
        check_dtype(name, logp_N, "float")
        check_device(name, logp_N, student_logp_N.device)
    if advantage_N is not None:
        check_shape("advantage_N", advantage_N, *student_logp_N.shape)
        check_dtype("advantage_N", advantage_N, "float")
        check_device("advantage_N", advantage_N, student_logp_N.device)
    raise_first([not_logprobs(name, logp_N) for name, logp_N in sides.items()])
    return policy_gradient_loss(student_logp_N, teacher_logp_N, behaviour_logp_N, importance_clip, advantage_N)


def policy_gradient_loss(
    student_logp_N: Tensor,
    teacher_logp_N: Tensor,
    behaviour_logp_N: Tensor,
    importance_clip: float,
    advantage_N: Tensor | None = None,
) -> Tensor:
    """`sampled_policy_gradient` of what has been checked before."""
    frozen_N = student_logp_N.detach()
    weight_N = (frozen_N - behaviour_logp_N.detach()).exp().clamp(max=importance_clip)
    if advantage_N is None:
        advantage_N = _reachable(teacher_logp_N.detach()) - frozen_N
    return -(weight_N * advantage_N.detach()) * student_logp_N


@torch.no_grad()
def discounted_advantages(
    student_logp_N: Tensor, teacher_logp_N: Tensor, segment_ids: Tensor, discount: float
) -> Tensor:
    """Advantage of each token with its discounted future, [N] (nats), for `sampled_policy_gradient`.

    D_t = sum_{k >= 0} discount^k A_{t+k} to the end of t's own trajectory, A = log p_T(x) - log p_S(x); in float64, and
    returned in the student's dtype. Both log-probs are of the sampled tokens, [N] (nats), -inf counting as -100; tokens
    of one trajectory stand side by side, `segment_ids`, [N] integers, telling where another begins. NaN stays within
    its trajectory. With a discount of 1 (and all tokens drawn from the student) the gradient is that of the reverse
    KL of whole trajectories; 0 is the token's own.

    A part of a trajectory lacks what comes after it: under context parallelism, gather the arguments from all ranks
    first, and keep the own tokens of the result.
    Raises DataError on shapes, dtypes or devices that do not fit, log-probs above 0, and a discount outside of [0, 1].
    Source: reverse-KL rewards with a discount factor, as the on-policy distillation of the tinker-cookbook offers them.
    """
    check_shape("student_logp_N", student_logp_N, "N")
    for name, tensor, kind in (
        ("student_logp_N", student_logp_N, "float"),
        ("teacher_logp_N", teacher_logp_N, "float"),
        ("segment_ids", segment_ids, "integer"),
    ):
        check_shape(name, tensor, len(student_logp_N))
        check_dtype(name, tensor, kind)
        check_device(name, tensor, student_logp_N.device)
    if not (is_number(discount) and 0.0 <= discount <= 1.0):
        raise DataError(f"discount is {discount!r}, and should lie in [0, 1]")
    sides = {"student_logp_N": student_logp_N, "teacher_logp_N": teacher_logp_N}
    raise_first([not_logprobs(name, logp_N, allow_nan=True) for name, logp_N in sides.items()])
    advantage_N = _reachable(teacher_logp_N.double()) - _reachable(student_logp_N.double())
    begins_N = segment_ids.new_zeros(len(segment_ids), dtype=torch.long)
    begins_N[1:] = (segment_ids.diff() != 0).long()
    trajectory_N = begins_N.cumsum(0)
    # Sums over `reach` tokens become sums over twice as many: log2 of the longest trajectory passes in all.
    reach, factor = 1, discount
    while factor > 0.0 and bool((is_same := trajectory_N[reach:] == trajectory_N[:-reach]).any()):
        advantage_N[:-reach] += torch.where(is_same, factor * advantage_N[reach:], 0.0)
        reach, factor = 2 * reach, factor * factor
    return advantage_N.to(torch.promote_types(student_logp_N.dtype, torch.float32))


def _check_logits(name: str, logits_NV: Tensor) -> None:
    check_shape(name, logits_NV, "N", "V")
    check_dtype(name, logits_NV, "float")
    if logits_NV.shape[1] == 0:
        raise DataError(f"{name} has shape {list(logits_NV.shape)}, and should have at least one column")


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _reachable(logp: Tensor) -> Tensor:
    """-inf (and what stands in for it) becomes a constant without gradient; NaN stays."""
    return logp.masked_fill(logp < torch.finfo(logp.dtype).min / 8, MIN_LOGPROB)
