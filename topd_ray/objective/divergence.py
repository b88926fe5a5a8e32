"""A true KL between student and teacher from the teacher's top-k tokens (design, decision 2).

The vocabulary is coarse-grained: every column of the support is one token, and one tail column holds the mass of all
other tokens, on both sides. By the data-processing inequality each divergence here is a lower bound of the one over the
full vocabulary and equals it when the support is the whole vocabulary; none is ever negative. (The teacher's tail is
1 - sum of rounded probabilities, known to a few 1e-7 in float32: the bound holds up to that over the tail.)

Axes: N tokens, V vocabulary, K top teacher tokens, C = K + 2 columns (top-k, sampled token, tail). All values in nats.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from topd_ray.errors import DataError

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
        its dtype. Raises DataError if the shapes do not fit.
        """
        num_tokens = sampled_ids.shape[0]
        if topk_ids.shape != topk_logprobs.shape or sampled_logprobs.shape != sampled_ids.shape:
            raise DataError(f"ids {tuple(topk_ids.shape)} and {tuple(sampled_ids.shape)} lack log-probs of equal shape")
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
    student_logp_NC: Tensor, teacher_logp_NC: Tensor, mask_NC: Tensor, kind: DivergenceKind, jsd_beta: float = 0.5
) -> Tensor:
    """D per token, [N], differentiable in the student, where p is the student, q the teacher, b = `jsd_beta`.

    reverse: sum_c p log(p / q).  forward: sum_c q log(q / p).
    jsd: b * KL(q || m) + (1 - b) * KL(p || m) with m = b * q + (1 - b) * p, so b weights the teacher (TRL's beta).

    Masked columns count for nothing, whatever they hold. Each column is summed as p log(p / q) - p + q >= 0: with
    both sides normalised the sum is the same, no cancellation makes it negative, at p = q the gradient is exactly 0.
    Source: the per-token loss of the paper's section 3 (reverse); generalised JSD as in GKD (arXiv 2306.13649).
    """
    student_NC = student_logp_NC.masked_fill(~mask_NC, 0.0)
    teacher_NC = teacher_logp_NC.masked_fill(~mask_NC, 0.0)
    p_NC, q_NC = student_NC.exp(), teacher_NC.exp()
    if kind == "reverse":
        terms_NC = p_NC * (student_NC - teacher_NC) - p_NC + q_NC
    elif kind == "forward":
        terms_NC = q_NC * (teacher_NC - student_NC) - q_NC + p_NC
    else:
        share_q, share_p = teacher_NC.new_tensor([jsd_beta, 1.0 - jsd_beta]).unbind()
        mixture_NC = torch.logaddexp(teacher_NC + share_q.log(), student_NC + share_p.log())
        terms_NC = share_q * q_NC * (teacher_NC - mixture_NC) + share_p * p_NC * (student_NC - mixture_NC)
    value_N = terms_NC.masked_fill(~mask_NC, 0.0).sum(1)
    # Roundings may leave -1e-8: the value is clamped, the gradient is not.
    return value_N + (value_N.clamp(min=0.0) - value_N).detach()


def sampled_policy_gradient(
    student_logp_N: Tensor, teacher_logp_N: Tensor, behaviour_logp_N: Tensor, importance_clip: float
) -> Tensor:
    """A per-token loss, [N], whose gradient is the sampled-token estimate of the reverse KL's; its value means nothing.

    -(w * A).detach() * log p_S(x), advantage A = log p_T(x) - log p_S(x), truncated importance weight
    w = min(p_S(x) / p_behaviour(x), importance_clip). Its mean gradient over x ~ behaviour is that of KL(p_S || p_T)
    wherever nothing is truncated.
    """
    frozen_N = student_logp_N.detach()
    weight_N = (frozen_N - behaviour_logp_N).exp().clamp(max=importance_clip)
    return -(weight_N * (_reachable(teacher_logp_N) - frozen_N)) * student_logp_N


def _reachable(logp: Tensor) -> Tensor:
    """-inf (and what stands in for it) becomes a constant without gradient; NaN stays."""
    return logp.masked_fill(logp < torch.finfo(logp.dtype).min / 8, MIN_LOGPROB)
