"""The learner's loss, L_OPD + lambda * L_traj, from hidden states and the head's weight (paper, section 4).

Logits exist for one chunk of tokens at a time, in the forward and in the backward pass: each chunk is checkpointed.

Axes: N response tokens of a micro-batch, laid end to end without padding; D hidden width; V rows of the student's head;
K top teacher tokens; Z nonzeros of the guidance. Log-probabilities in nats, at the rollout's temperature.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from topd_ray.errors import DataError
from topd_ray.objective.divergence import Support, divergence, sampled_policy_gradient
from topd_ray.types import Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """How the loss is put together; the fields are those of `objective`, `rollout` and `learner` in the config."""

    method: Literal["topd", "opd"] = "topd"
    divergence: Literal["reverse", "forward", "jsd", "sampled_pg"] = "reverse"
    jsd_beta: float = 0.5
    importance_clip: float = 2.0
    guidance_weight: float = 0.3
    guidance_reduction: Literal["mean", "sum"] = "mean"
    temperature: float = 1.0
    logit_softcap: float | None = None
    chunk_tokens: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossBatch:
    """What the teacher said about N response tokens; whole trajectories, so that a median sees all of its tokens."""

    sampled_ids: Tensor
    """[N]"""
    teacher_topk_ids: Tensor
    """[N, K]"""
    teacher_topk_logprobs: Tensor
    """[N, K]; -inf marks padding"""
    teacher_sampled_logprobs: Tensor
    """[N]"""
    behaviour_logprobs: Tensor
    """[N], under the policy that wrote the tokens"""
    capped: Tensor
    """[N] bool"""
    segment_ids: Tensor
    """[N], which trajectory a token belongs to"""
    target_indptr: Tensor
    """[N + 1], row pointers into target_ids and target_weights"""
    target_ids: Tensor
    """[Z]"""
    target_weights: Tensor
    """[Z]; the weights of a row sum to the windows that cover it"""
    target_entropy: Tensor
    """[N]"""

    def rows(self, start: int, stop: int) -> "LossBatch":
        """Tokens start .. stop - 1 as a batch of their own."""
        first, last = self.target_indptr[[start, stop]].tolist()
        return LossBatch(
            sampled_ids=self.sampled_ids[start:stop],
            teacher_topk_ids=self.teacher_topk_ids[start:stop],
            teacher_topk_logprobs=self.teacher_topk_logprobs[start:stop],
            teacher_sampled_logprobs=self.teacher_sampled_logprobs[start:stop],
            behaviour_logprobs=self.behaviour_logprobs[start:stop],
            capped=self.capped[start:stop],
            segment_ids=self.segment_ids[start:stop],
            target_indptr=self.target_indptr[start : stop + 1] - first,
            target_ids=self.target_ids[first:last],
            target_weights=self.target_weights[first:last],
            target_entropy=self.target_entropy[start:stop],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossMetrics:
    """Figures of one micro-batch as (sum, count) pairs of detached scalars; they stay on the device until asked for.

    `token_loss` (after caps), `token_divergence` (before; the reverse KL under sampled_pg), `guidance_kl` per guided
    (window, position) pair (under `topd`), `student_entropy` (on the support), `mismatch` and `mismatch_abs` (student
    minus behaviour log-prob of the sampled token), `capped` (share of tokens), `teacher_top1` (the student's likeliest
    token is the teacher's), `student_tail` and `teacher_tail` (mass outside of the support).
    """

    figures: Mapping[str, tuple[Tensor, Tensor]]

    def to_metrics(self, prefix: str = "") -> list[Metric]:
        """The figures as records, each key after `prefix`; one transfer from the device."""
        pairs = torch.stack([torch.stack(pair).double() for pair in self.figures.values()]).tolist()
        return [
            Metric(key=prefix + key, sum=total, count=count)
            for key, (total, count) in zip(self.figures, pairs, strict=True)
        ]


def topd_loss(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    batch: LossBatch,
    spec: LossSpec,
    *,
    num_tokens: float,
    num_guided: float,
    num_trajectories: float | None = None,
    head_bias: Tensor | None = None,
) -> tuple[Tensor, LossMetrics]:
    """One micro-batch's share of the batch loss (scalar, nats), and its figures.

    loss = (1 / num_tokens) sum_t l_t + guidance_weight * G. l_t is the divergence of token t, scaled (by a constant) to
    the median of its trajectory where it is capped and above. G = sum_p [sum_v w_p(v) (-log p_S(v)) - H_p], the KL
    of every (window, position) pair, divided by `num_guided` (reduction `mean`) or by `num_trajectories` (`sum`).
    The three counts are those of the whole batch, over all micro-batches and ranks, so that the losses of the
    micro-batches add up to the batch loss; a count of 0 makes its part 0.

    `hidden_ND` and `head_weight_VD` may be of any float dtype: the product runs in it, the rest in float32 (or float64
    for float64). N = 0 gives a zero that is connected to the graph. Raises DataError on token ids outside of V, on
    shapes that do not fit, on caps under `sampled_pg`, and on `sum` without `num_trajectories`. Does not look for NaN.
    Source: L_TOPD, the paper's section 4; the cap, its down-weighting ablation.
    """
    _check(hidden_ND, head_weight_VD, batch, spec, num_trajectories)
    num_rows = hidden_ND.shape[0]
    chunks = []
    for start in range(0, max(num_rows, 1), spec.chunk_tokens):
        stop = min(start + spec.chunk_tokens, num_rows)
        chunks.append(
            checkpoint(
                _chunk,
                hidden_ND[start:stop],
                head_weight_VD,
                head_bias,
                batch.rows(start, stop),
                spec,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    token_loss_N, guidance_N, figures_NF = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    scaled_loss_N = token_loss_N * _cap_scale(token_loss_N.detach(), batch)
    loss = scaled_loss_N.sum() / max(num_tokens, 1.0)
    if spec.method == "topd":
        normaliser = num_guided if spec.guidance_reduction == "mean" else num_trajectories
        loss = loss + spec.guidance_weight * guidance_N.sum() / (normaliser or 1.0)
    return loss, _metrics(scaled_loss_N.detach(), guidance_N.detach(), figures_NF, batch, spec)


@torch.no_grad()
def student_logprobs(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    token_ids: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    *,
    logit_softcap: float | None = None,
    head_bias: Tensor | None = None,
) -> Tensor:
    """log p_S of one given token per row, [N] (nats), without gradient: the pre-flight check of scoring paths."""
    spec = LossSpec(temperature=temperature, logit_softcap=logit_softcap)
    parts = []
    for start in range(0, max(hidden_ND.shape[0], 1), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits_NV, _ = _logits(hidden_ND[rows], head_weight_VD, head_bias, spec)
        parts.append(logits_NV.gather(1, token_ids[rows].long().unsqueeze(1)).squeeze(1) - logits_NV.logsumexp(1))
    return torch.cat(parts)


# What a chunk reports about each token, besides its two losses.
FIGURES = (
    "token_divergence",
    "student_entropy",
    "mismatch",
    "mismatch_abs",
    "teacher_top1",
    "student_tail",
    "teacher_tail",
)


def _chunk(
    hidden_ND: Tensor, head_weight_VD: Tensor, head_bias: Tensor | None, batch: LossBatch, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses [N], guidance KL summed over the windows [N], and detached FIGURES [N, F] of one chunk."""
    logits_NV, argmax_N = _logits(hidden_ND, head_weight_VD, head_bias, spec)
    support = Support.build(
        batch.teacher_topk_ids, batch.teacher_topk_logprobs, batch.sampled_ids, batch.teacher_sampled_logprobs
    )
    student_NC, log_normaliser_N = support.student_logp(logits_NV)
    sampled_N = logits_NV.gather(1, batch.sampled_ids.long().unsqueeze(1)).squeeze(1) - log_normaliser_N
    kind = "reverse" if spec.divergence == "sampled_pg" else spec.divergence
    divergence_N = divergence(student_NC, support.teacher_logp.to(student_NC), support.mask, kind, spec.jsd_beta)
    token_loss_N = divergence_N
    if spec.divergence == "sampled_pg":
        token_loss_N = sampled_policy_gradient(
            sampled_N,
            batch.teacher_sampled_logprobs.to(sampled_N),
            batch.behaviour_logprobs.to(sampled_N),
            spec.importance_clip,
        )
    guidance_N = _guidance(logits_NV, log_normaliser_N, batch) if spec.method == "topd" else torch.zeros_like(sampled_N)
    with torch.no_grad():
        mismatch_N = sampled_N - batch.behaviour_logprobs
        top1_N = (batch.teacher_topk_ids[:, :1] == argmax_N.unsqueeze(1)).any(1)
        entropy_N = -(student_NC * student_NC.exp()).sum(1)
        tails = student_NC[:, -1].exp(), support.teacher_logp[:, -1].exp()
        columns = (divergence_N, entropy_N, mismatch_N, mismatch_N.abs(), top1_N, *tails)
        figures_NF = torch.stack([column.to(sampled_N) for column in columns], dim=1)
    return token_loss_N, guidance_N, figures_NF


def _logits(
    hidden_ND: Tensor, head_weight_VD: Tensor, head_bias: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """Logits / temperature, shifted so that the largest of each row is 0 (for precision), [N, V]; argmax, [N]."""
    logits_NV = torch.nn.functional.linear(hidden_ND, head_weight_VD, head_bias)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if spec.logit_softcap is not None:
        logits_NV = spec.logit_softcap * torch.tanh(logits_NV / spec.logit_softcap)
    logits_NV = logits_NV / spec.temperature
    peak_N, argmax_N = logits_NV.detach().max(1)
    return logits_NV - peak_N.unsqueeze(1), argmax_N


def _guidance(logits_NV: Tensor, log_normaliser_N: Tensor, batch: LossBatch) -> Tensor:
    """sum_v w(v) (-log p_S(v)) - H per token, [N]: the KL of all windows that cover it."""
    rows_Z = torch.repeat_interleave(batch.target_indptr.diff())
    logp_Z = logits_NV[rows_Z, batch.target_ids.long()] - log_normaliser_N[rows_Z]
    cross_entropy_N = torch.zeros_like(log_normaliser_N).index_add(0, rows_Z, -batch.target_weights.to(logp_Z) * logp_Z)
    return cross_entropy_N - batch.target_entropy


def _cap_scale(token_loss_N: Tensor, batch: LossBatch) -> Tensor:
    """[N], median / loss for capped tokens above the median of their trajectory's token losses, else 1."""
    scale_N = torch.ones_like(token_loss_N)
    for segment in sorted(set(batch.segment_ids[batch.capped].tolist())):
        is_own_N = batch.segment_ids == segment
        median = token_loss_N[is_own_N].quantile(0.5)
        scale_N = torch.where(is_own_N & batch.capped & (token_loss_N > median), median / token_loss_N, scale_N)
    return scale_N


def _metrics(
    token_loss_N: Tensor, guidance_N: Tensor, figures_NF: Tensor, batch: LossBatch, spec: LossSpec
) -> LossMetrics:
    num_rows = token_loss_N.new_tensor(float(token_loss_N.shape[0]))
    figures = {
        "token_loss": (token_loss_N.sum(), num_rows),
        "capped": (batch.capped.sum().to(num_rows), num_rows),
    }
    if spec.method == "topd":
        figures["guidance_kl"] = (guidance_N.sum(), batch.target_weights.sum().to(num_rows))
    for name, total in zip(FIGURES, figures_NF.sum(0).unbind(), strict=True):
        figures[name] = (total, num_rows)
    return LossMetrics(figures=figures)


def _check(
    hidden_ND: Tensor, head_weight_VD: Tensor, batch: LossBatch, spec: LossSpec, num_trajectories: float | None
) -> None:
    num_rows, vocabulary = hidden_ND.shape[0], head_weight_VD.shape[0]
    counts = {
        "sampled_ids": batch.sampled_ids.shape[0],
        "teacher_topk_ids": batch.teacher_topk_ids.shape[0],
        "segment_ids": batch.segment_ids.shape[0],
        "target_indptr - 1": batch.target_indptr.shape[0] - 1,
    }
    for name, count in counts.items():
        if count != num_rows:
            raise DataError(f"{name} holds {count} tokens for {num_rows} hidden states")
    in_topk_NK = batch.teacher_topk_logprobs != -torch.inf
    for name, ids in {
        "sampled_ids": batch.sampled_ids,
        "teacher_topk_ids": batch.teacher_topk_ids[in_topk_NK],
        "target_ids": batch.target_ids,
    }.items():
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
            raise DataError(
                f"{name} holds ids {int(ids.min())}..{int(ids.max())}, the student's head has {vocabulary} rows"
            )
    if spec.divergence == "sampled_pg" and bool(batch.capped.any()):
        raise DataError("tokens are capped, but sampled_pg has no token loss to cap: use a divergence")
    if spec.guidance_reduction == "sum" and num_trajectories is None:
        raise DataError("guidance_reduction=sum divides by the trajectories of the batch: pass num_trajectories")
