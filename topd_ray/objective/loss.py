"""The learner's loss, L_OPD + lambda * L_traj, from hidden states and the head's weight (paper, section 4).

The gradient is made together with the loss: chunk by chunk, logits become losses and then, in place, the gradient with
respect to them, which goes into those of hidden states and head. So there is one forward product, and no
[tokens, V] tensor larger than a chunk.

Axes: N response tokens of a micro-batch, laid end to end without padding; D hidden width; V rows of the student's head;
K top teacher tokens; C = K + 1 tokens of the support; Z nonzeros of the guidance. Log-probabilities in nats, at the
rollout's temperature.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    guidance_share = 0.0
    if spec.method == "topd":
        normaliser = num_guided if spec.guidance_reduction == "mean" else num_trajectories
        guidance_share = spec.guidance_weight / (normaliser or 1.0)
    scale_N = _cap_scale(hidden_ND, head_weight_VD, head_bias, batch, spec)
    if not torch.is_grad_enabled():  # an autograd function is not told, and would make gradients for nobody
        hidden_ND, head_weight_VD = hidden_ND.detach(), head_weight_VD.detach()
        head_bias = None if head_bias is None else head_bias.detach()
    loss, token_loss_N, guidance_N, figures_NF = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head_weight_VD, head_bias, batch, spec, scale_N / max(num_tokens, 1.0), guidance_share
    )
    return loss, _metrics(token_loss_N * scale_N, guidance_N, figures_NF, batch, spec)


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
    spec = LossSpec(temperature=temperature, logit_softcap=logit_softcap, chunk_tokens=chunk_tokens)
    head = _Head.of(hidden_ND, head_weight_VD, head_bias, spec, needs_grad=(False, False, False))
    parts = []
    for start in range(0, max(hidden_ND.shape[0], 1), chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, hidden_ND.shape[0]))
        logits_NV = head.logits(rows)
        logits_NV -= logits_NV.amax(1, keepdim=True)
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


class _FusedLoss(torch.autograd.Function):
    """Weighted sum of token losses and guidance; its gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_weight_VD: Tensor,
        head_bias_V: Tensor | None,
        batch: LossBatch,
        spec: LossSpec,
        token_share_N: Tensor,
        guidance_share: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head = _Head.of(hidden_ND, head_weight_VD, head_bias_V, spec, needs_grad=ctx.needs_input_grad[:3])
        token_loss_N, guidance_N, figures_NF = _all_chunks(head, batch, spec, token_share_N, guidance_share)
        loss = (token_loss_N * token_share_N).sum()
        if guidance_share:
            loss = loss + guidance_share * guidance_N.sum()
        ctx.save_for_backward(*head.gradients())
        ctx.mark_non_differentiable(token_loss_N, guidance_N, figures_NF)
        return loss, token_loss_N, guidance_N, figures_NF

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if grad.item() != 1.0:
            # In place: a second backward through the same graph is an error, which autograd raises by itself.
            gradients = [one if one is None else one.mul_(grad.to(one.dtype)) for one in gradients]
        return (*gradients, None, None, None, None)


class _Head:
    """The student's last layer: logits of a chunk, and the gradients that flow through it."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, spec: LossSpec) -> None:
        self._hidden_ND = hidden_ND
        self._weight_VD = weight_VD
        self._bias_V = bias_V
        self._spec = spec
        self._slope_NV: Tensor | None = None
        self.dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        self._hidden_grad_ND: Tensor | None = None
        self._weight_grad_VD: Tensor | None = None
        self._bias_grad_V: Tensor | None = None
        self._dtypes: tuple[torch.dtype | None, ...] = (None, None, None)
        size = min(spec.chunk_tokens, hidden_ND.shape[0]) * weight_VD.shape[0]
        self._products = hidden_ND.new_empty(size)
        """room for the product of a chunk, used again by every chunk"""

    @classmethod
    def of(
        cls,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        spec: LossSpec,
        *,
        needs_grad: tuple[bool, bool, bool],
    ) -> "_Head":
        """Under autocast the products run in its dtype, else in that of the hidden states."""
        dtype = hidden_ND.dtype
        if torch.is_autocast_enabled(hidden_ND.device.type):
            dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        head = cls(hidden_ND.to(dtype), weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype), spec)
        head._dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        if needs_grad[0]:
            head._hidden_grad_ND = torch.zeros_like(head._hidden_ND)
        if needs_grad[1]:
            head._weight_grad_VD = torch.zeros_like(head._weight_VD, dtype=head.dtype)
        if needs_grad[2] and bias_V is not None:
            head._bias_grad_V = torch.zeros_like(bias_V, dtype=head.dtype)
        return head

    @property
    def needs_grad(self) -> bool:
        return any(one is not None for one in (self._hidden_grad_ND, self._weight_grad_VD, self._bias_grad_V))

    def logits(self, rows: slice) -> Tensor:
        """Logits / temperature of these tokens, [rows, V], float32 or wider; overwritten by the next call."""
        hidden_ND = self._hidden_ND[rows]
        product_NV = self._products[: len(hidden_ND) * len(self._weight_VD)].view(len(hidden_ND), len(self._weight_VD))
        torch.mm(hidden_ND, self._weight_VD.T, out=product_NV)
        logits_NV = product_NV.to(self.dtype)
        if self._bias_V is not None:
            logits_NV += self._bias_V
        cap = self._spec.logit_softcap
        if cap is not None:
            logits_NV.div_(cap).tanh_()
            self._slope_NV = 1.0 - logits_NV.square() if self.needs_grad else None
            logits_NV.mul_(cap)
        return logits_NV if self._spec.temperature == 1.0 else logits_NV.div_(self._spec.temperature)

    def add_gradient(self, rows: slice, grad_NV: Tensor) -> None:
        """Take the loss's gradient with respect to the `logits` of these tokens."""
        if self._slope_NV is not None:
            grad_NV.mul_(self._slope_NV)
        if self._bias_grad_V is not None:
            self._bias_grad_V += grad_NV.sum(0)
        grad_NV = grad_NV.to(self._hidden_ND.dtype)
        if self._hidden_grad_ND is not None:
            torch.mm(grad_NV, self._weight_VD, out=self._hidden_grad_ND[rows])
        if self._weight_grad_VD is not None:
            _add_product(self._weight_grad_VD, grad_NV, self._hidden_ND[rows])

    def gradients(self) -> tuple[Tensor | None, ...]:
        """With respect to hidden states, weight and bias, in the dtypes these came in."""
        found = (self._hidden_grad_ND, self._weight_grad_VD, self._bias_grad_V)
        return tuple(one if one is None else one.to(dtype) for one, dtype in zip(found, self._dtypes, strict=True))


def _add_product(sum_VD: Tensor, grad_NV: Tensor, hidden_ND: Tensor) -> None:
    """sum += grad^T hidden; bfloat16 products are added up in float32, a block of the vocabulary at a time."""
    if sum_VD.dtype == grad_NV.dtype:
        sum_VD.addmm_(grad_NV.T, hidden_ND)
        return
    for start in range(0, len(sum_VD), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        sum_VD[block] += grad_NV[:, block].T @ hidden_ND


_BLOCK_ROWS = 16384


def _all_chunks(
    head: _Head, batch: LossBatch, spec: LossSpec, token_share_N: Tensor, guidance_share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_chunk` returns, for all N tokens."""
    num_rows = token_share_N.shape[0]
    parts = []
    for start in range(0, max(num_rows, 1), spec.chunk_tokens):
        rows = slice(start, min(start + spec.chunk_tokens, num_rows))
        parts.append(_chunk(head, rows, batch.rows(rows.start, rows.stop), spec, token_share_N, guidance_share))
    token_loss_N, guidance_N, figures_NF = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return token_loss_N, guidance_N, figures_NF


def _chunk(
    head: _Head, rows: slice, batch: LossBatch, spec: LossSpec, token_share_N: Tensor, guidance_share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses [N], guidance KL summed over the windows [N], and FIGURES [N, F] of one chunk.

    The loss depends on the logits through few numbers: those of the support, the logsumexp of all others, and those of
    the guidance's tokens. Autograd runs on these alone; a softmax spreads the gradient of the logsumexp.
    """
    logits_NV = head.logits(rows)
    support = Support.build(
        batch.teacher_topk_ids, batch.teacher_topk_logprobs, batch.sampled_ids, batch.teacher_sampled_logprobs
    )
    rows_Z = torch.repeat_interleave(batch.target_indptr.diff())
    ids_Z = batch.target_ids.long()
    picked_NC = logits_NV.gather(1, support.ids)
    target_Z = logits_NV[rows_Z, ids_Z]
    # From here on, in place: exp(logit - peak) of the tokens outside of the support, 0 inside.
    outside_NV = logits_NV.scatter_(1, support.ids, -torch.inf)
    outside_peak_N = outside_NV.amax(1).clamp(min=torch.finfo(outside_NV.dtype).min)
    outside_N = outside_NV.sub_(outside_peak_N.unsqueeze(1)).exp_().sum(1)
    peak_N = torch.maximum(picked_NC.amax(1), outside_peak_N)  # shifting by it keeps differences exact
    leaves = (
        picked_NC - peak_N.unsqueeze(1),
        outside_N.log() + (outside_peak_N - peak_N),
        target_Z - peak_N[rows_Z],
    )
    with torch.set_grad_enabled(head.needs_grad):
        for leaf in leaves:
            leaf.requires_grad_(head.needs_grad)
        token_loss_N, guidance_N, figures_NF = _losses(*leaves, support, rows_Z, batch, spec)
        if head.needs_grad:
            total = (token_loss_N * token_share_N[rows]).sum() + guidance_share * guidance_N.sum()
            grad_NC, grad_outside_N, grad_Z = torch.autograd.grad(total, leaves, materialize_grads=True)
    if head.needs_grad:
        per_mass_N = torch.where(outside_N > 0, grad_outside_N / outside_N, 0.0)
        grad_NV = outside_NV.mul_((per_mass_N / spec.temperature).unsqueeze(1))
        grad_NV.scatter_add_(1, support.ids, grad_NC / spec.temperature)
        grad_NV.index_put_((rows_Z, ids_Z), grad_Z / spec.temperature, accumulate=True)
        head.add_gradient(rows, grad_NV)
    return token_loss_N.detach(), guidance_N.detach(), figures_NF


def _losses(
    picked_NC: Tensor,
    log_outside_N: Tensor,
    target_Z: Tensor,
    support: Support,
    rows_Z: Tensor,
    batch: LossBatch,
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_chunk` returns, from the support's logits, the logsumexp outside of it, and the guidance's logits."""
    student_NC, log_normaliser_N = support.student_logp(picked_NC, log_outside_N)
    sampled_N = picked_NC[:, -1] - log_normaliser_N
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
    guidance_N = torch.zeros_like(sampled_N)
    if spec.method == "topd":
        # sum_v w(v) (-log p_S(v)) - H: the KL of all windows that cover the token
        logp_Z = target_Z - log_normaliser_N[rows_Z]
        guidance_N = guidance_N.index_add(0, rows_Z, -batch.target_weights.to(logp_Z) * logp_Z)
        guidance_N = guidance_N - batch.target_entropy.to(guidance_N)
    with torch.no_grad():
        mismatch_N = sampled_N - batch.behaviour_logprobs
        # The largest logit has been shifted to 0, the teacher's likeliest token is the first.
        top1_N = (picked_NC[:, 0] >= 0.0) & support.mask[:, 0] & bool(batch.teacher_topk_ids.shape[1])
        entropy_N = -(student_NC * student_NC.exp()).sum(1)
        tails = student_NC[:, -1].exp(), support.teacher_logp[:, -1].exp()
        columns = (divergence_N, entropy_N, mismatch_N, mismatch_N.abs(), top1_N, *tails)
        figures_NF = torch.stack([column.to(sampled_N) for column in columns], dim=1)
    return token_loss_N, guidance_N, figures_NF


@torch.no_grad()
def _cap_scale(
    hidden_ND: Tensor, head_weight_VD: Tensor, head_bias_V: Tensor | None, batch: LossBatch, spec: LossSpec
) -> Tensor:
    """[N], median / loss for capped tokens above the median of their trajectory's token losses, else 1.

    Where tokens are capped (the paper's ablations), the losses are computed once beforehand.
    """
    scale_N = hidden_ND.new_ones(hidden_ND.shape[0], dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
    segments = sorted(set(batch.segment_ids[batch.capped].tolist()))
    if not segments:
        return scale_N
    head = _Head.of(hidden_ND, head_weight_VD, head_bias_V, spec, needs_grad=(False, False, False))
    token_loss_N, _, _ = _all_chunks(head, batch, spec, scale_N, 0.0)
    for segment in segments:
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
