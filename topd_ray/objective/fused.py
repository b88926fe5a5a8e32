"""The loss and its gradients in one pass over chunks of tokens: logits become losses and then their own gradient.

The loss depends on the logits through few numbers: those of the support, the logsumexp of all others, and those of the
guidance's tokens. Autograd runs on these alone; a softmax spreads the gradient of the logsumexp over the vocabulary.

Axes: N tokens of a chunk or micro-batch, C = K + 1 tokens of the support, Z nonzeros of the guidance, P = N C + Z
picked logits, F figures.
"""

from typing import Any

import torch
from torch import Tensor

from topd_ray.objective.divergence import Support, divergence, policy_gradient_loss
from topd_ray.objective.head import Head, Picks
from topd_ray.objective.loss_data import LossBatch, LossSpec
from topd_ray.objective.triton_head import make_head

FIGURES = (
    "token_divergence",
    "capped",
    "student_entropy",
    "mismatch",
    "mismatch_abs",
    "teacher_top1",
    "student_tail",
    "teacher_tail",
)
"""What a chunk reports about each token, besides its two losses."""


class FusedLoss(torch.autograd.Function):
    """token_share * (sum of token losses) + guidance_share * (sum of guidance); token losses [N], guidance [N], FIGURES
    [N, F]. The gradients are ready when the forward pass ends, and handed out once: they have no copy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_weight_VD: Tensor,
        head_bias_V: Tensor | None,
        batch: LossBatch,
        spec: LossSpec,
        num_vocabulary: int,
        median_N: Tensor | None,
        shares: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head = make_head(
            hidden_ND,
            head_weight_VD,
            head_bias_V,
            spec,
            num_vocabulary=num_vocabulary,
            needs_grad=ctx.needs_input_grad[:3],
        )
        token_loss_N, guidance_N, figures_NF = all_chunks(head, batch, median_N, shares)
        loss = shares[0] * token_loss_N.sum() + shares[1] * guidance_N.sum()
        ctx.save_for_backward(*head.gradients())
        ctx.is_spent = False
        ctx.mark_non_differentiable(token_loss_N, guidance_N, figures_NF)
        return loss, token_loss_N, guidance_N, figures_NF

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("topd_loss has no second derivative: use create_graph=False")
        if ctx.is_spent:
            raise RuntimeError(
                "topd_loss makes its gradients once, and they have been taken: call it again for a second backward pass"
            )
        gradients, ctx.is_spent = ctx.saved_tensors, True
        # Neither is rounded to the gradient's dtype, as a scalar tensor would be; a GPU would be waited for by `item`.
        scale = grad.item() if grad.device.type == "cpu" else grad.reshape(1)
        if not isinstance(scale, float) or scale != 1.0:
            gradients = [one if one is None else one.mul_(scale) for one in gradients]
        return (*gradients, None, None, None, None, None)


def all_chunks(
    head: Head, batch: LossBatch, median_N: Tensor | None, shares: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses [N] after caps and guidance KL summed over the windows [N], both weighted; FIGURES [N, F]."""
    chunks = head.chunks()
    batches = batch.split([chunks[0].start, *(chunk.stop for chunk in chunks)])
    parts = []
    for rows, part in zip(chunks, batches, strict=True):
        parts.append(_chunk(head, rows, part, None if median_N is None else median_N[rows], shares))
    token_loss_N, guidance_N, figures_NF = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return token_loss_N, guidance_N, figures_NF


def _chunk(
    head: Head, rows: slice, batch: LossBatch, median_N: Tensor | None, shares: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    spec = head.spec
    support = Support.build(
        batch.teacher_topk_ids, batch.teacher_topk_logprobs, batch.sampled_ids, batch.teacher_sampled_logprobs
    )
    picks = _picks(support, batch, spec)
    picked_P, outside_peak_N, outside_N = head.forward(rows, picks)
    num_tokens, num_columns = support.ids.shape
    peak_N = torch.maximum(picked_P[: picks.num_excluded].view(num_tokens, num_columns).amax(1), outside_peak_N)
    # Shifting by the peak keeps differences exact.
    leaves = (picked_P - peak_N[picks.rows], outside_N.log() + (outside_peak_N - peak_N))
    with torch.set_grad_enabled(head.needs_grad):
        for leaf in leaves:
            leaf.requires_grad_(head.needs_grad)
        token_loss_N, guidance_N, figures_NF = _losses(*leaves, picks, support, batch, spec, median_N)
        if head.needs_grad:
            total = shares[0] * token_loss_N.sum() + shares[1] * guidance_N.sum()
            grad_P, grad_outside_N = torch.autograd.grad(total, leaves, materialize_grads=True)
    if head.needs_grad:
        head.backward(torch.where(outside_N > 0, grad_outside_N / outside_N, 0.0), grad_P)
    return token_loss_N.detach(), guidance_N.detach(), figures_NF


def _picks(support: Support, batch: LossBatch, spec: LossSpec) -> Picks:
    """The support, row by row, and the guidance's tokens."""
    num_tokens, num_columns = support.ids.shape
    token_N = torch.arange(num_tokens, device=support.ids.device)
    ids, rows = [support.ids.reshape(-1)], [token_N.repeat_interleave(num_columns)]
    if spec.method == "topd":
        ids.append(batch.target_ids.long())
        rows.append(token_N.repeat_interleave(batch.target_indptr.diff(), output_size=len(batch.target_ids)))
    return Picks(ids=torch.cat(ids), rows=torch.cat(rows), num_excluded=support.ids.numel())


def _losses(
    picked_P: Tensor,
    log_outside_N: Tensor,
    picks: Picks,
    support: Support,
    batch: LossBatch,
    spec: LossSpec,
    median_N: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_chunk` returns, from the picked logits and the logsumexp outside of the support."""
    picked_NC = picked_P[: picks.num_excluded].view(support.ids.shape)
    student_NC, log_normaliser_N = support.student_logp(picked_NC, log_outside_N)
    sampled_N = picked_NC[:, -1] - log_normaliser_N
    kind = "reverse" if spec.divergence == "sampled_pg" else spec.divergence
    divergence_N = divergence(student_NC, support.teacher_logp.to(student_NC), support.mask, kind, spec.jsd_beta)
    token_loss_N = divergence_N
    if spec.divergence == "sampled_pg":
        token_loss_N = policy_gradient_loss(
            sampled_N,
            batch.teacher_sampled_logprobs.to(sampled_N),
            batch.behaviour_logprobs.to(sampled_N),
            spec.importance_clip,
            None if batch.advantage_N is None else batch.advantage_N.to(sampled_N),
        )
    scale_N = torch.ones_like(sampled_N)
    if median_N is not None:
        scale_N = cap_scale(token_loss_N.detach(), median_N, batch.capped)
        token_loss_N = token_loss_N * scale_N
    guidance_N = torch.zeros_like(sampled_N)
    if spec.method == "topd":
        # sum_v w(v) (-log p_S(v)) - H: the KL of all windows that cover the token
        rows_Z = picks.rows[picks.num_excluded :]
        logp_Z = picked_P[picks.num_excluded :] - log_normaliser_N[rows_Z]
        guidance_N = guidance_N.index_add(0, rows_Z, -batch.target_weights.to(logp_Z) * logp_Z)
        guidance_N = guidance_N - batch.target_entropy.to(guidance_N)
    if batch.weight_N is not None:
        weight_N = batch.weight_N.to(sampled_N)
        token_loss_N, guidance_N = token_loss_N * weight_N, guidance_N * weight_N
    with torch.no_grad():
        mismatch_N = sampled_N - batch.behaviour_logprobs
        top1_N = torch.zeros_like(support.is_floored)
        if batch.teacher_topk_ids.shape[1]:
            best_N1 = batch.teacher_topk_logprobs.argmax(1, keepdim=True)
            # The largest logit has been shifted to 0.
            top1_N = ((picked_NC.gather(1, best_N1) >= 0.0) & support.mask.gather(1, best_N1)).squeeze(1)
        entropy_N = -(student_NC * student_NC.exp()).sum(1)
        tails = student_NC[:, -1].exp(), support.teacher_logp[:, -1].exp()
        columns = (divergence_N, scale_N < 1.0, entropy_N, mismatch_N, mismatch_N.abs(), top1_N, *tails)
        figures_NF = torch.stack([column.to(sampled_N) for column in columns], dim=1)
    return token_loss_N, guidance_N, figures_NF


def cap_scale(token_loss_N: Tensor, median_N: Tensor, capped_N: Tensor) -> Tensor:
    """[N], median / loss for capped tokens above the median, else 1."""
    is_lowered_N = capped_N & (token_loss_N > median_N)
    return torch.where(is_lowered_N, median_N.to(token_loss_N) / token_loss_N, 1.0)
