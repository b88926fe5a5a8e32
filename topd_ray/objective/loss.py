"""The learner's loss, L_OPD + lambda * L_traj, from hidden states and the head's weight (paper, section 4).

`fused` makes loss and gradients in one pass over chunks of tokens, `head` holds the products with the output layer,
`triton_head` those of a GPU, and `loss_checks` what is refused.

Axes: N response tokens of a micro-batch, laid end to end without padding; D hidden width; V rows of the student's head.
Log-probabilities in nats, at the rollout's temperature.
"""

from dataclasses import replace

import torch
from torch import Tensor

from topd_ray.objective.checks import check_device, check_dtype, check_shape, raise_first
from topd_ray.objective.divergence import discounted_advantages
from topd_ray.objective.fused import FIGURES, FusedLoss, all_chunks
from topd_ray.objective.head import Head, Picks
from topd_ray.objective.loss_checks import (
    check_batch,
    check_counts,
    check_head,
    check_token_ids,
    raise_non_finite,
)
from topd_ray.objective.loss_data import LossBatch, LossMetrics, LossSpec
from topd_ray.objective.triton_head import make_head

__all__ = [
    "LossBatch",
    "LossMetrics",
    "LossSpec",
    "student_logprobs",
    "token_losses",
    "topd_loss",
    "trajectory_medians",
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
    num_vocabulary: int | None = None,
    median_N: Tensor | None = None,
    check_finite: bool = True,
) -> tuple[Tensor, LossMetrics]:
    """One micro-batch's share of the batch loss (scalar, nats), and its figures.

    loss = (1 / num_tokens) sum_t l_t + guidance_weight * G. l_t is the divergence of token t, scaled (by a constant) to
    the median of its trajectory where it is capped and above. G = sum_p [sum_v w_p(v) (-log p_S(v)) - H_p], the KL
    of every (window, position) pair, divided by `num_guided` (reduction `mean`) or by `num_trajectories` (`sum`).
    Where the batch has a `weight_N`, l_t (after its cap) and the summand of position p are multiplied by its entries,
    as constants; the counts stay what they are.
    The three counts are those of the whole batch, over all micro-batches and ranks, so that the losses of the
    micro-batches add up to the batch loss; a count of 0 makes its part 0.

    `hidden_ND` and `head_weight_VD` may be of any float dtype, but float16 if it needs a gradient: the product runs in
    it (under autocast, in its dtype), the rest in float32 (float64 for float64). Rows of the head from `num_vocabulary`
    on pad it: they get no probability, and no gradient. N = 0 gives a zero that is connected to the graph.

    A batch may hold a part of a trajectory (context parallelism): the losses of the parts add up. Only caps and a
    `kl_discount` need the whole: pass `median_N`, [N], the median of each token's whole trajectory (`token_losses`,
    `trajectory_medians`), and the batch's `advantage_N` (`student_logprobs`, `discounted_advantages`). Without them,
    both are taken over the tokens of `batch`, after a product with the head of their own.

    Gradients are made with the loss, and handed out once, without a copy: a second backward pass through the same loss
    raises RuntimeError, and so does one with `create_graph`.

    Raises DataError on shapes, dtypes or devices that do not fit, token ids outside of the vocabulary, log-probs that
    are NaN or of more than all the probability, weights that are negative or (those of targets) do not sum to a number
    of windows, an entropy without weights, caps under `sampled_pg`, a `weight_N` with a `kl_discount` (later tokens'
    ratios are in no weight of their prefix), and counts that are negative or missing;
    NonFiniteLossError if the loss is not finite, naming the argument to blame.
    With `check_finite` off, NaN in the batch and the loss are left to the caller, who reads the loss: ranks that train
    together must find out together.
    Source: L_TOPD, the paper's section 4; the cap, its down-weighting ablation.
    """
    num_vocabulary = check_head(hidden_ND, head_weight_VD, head_bias, num_vocabulary)
    check_counts(spec, {"num_tokens": num_tokens, "num_guided": num_guided, "num_trajectories": num_trajectories})
    any_capped = check_batch(batch, spec, hidden_ND, num_vocabulary, median_N, allow_nan=not check_finite)
    token_share, guidance_share = 1.0 / num_tokens if num_tokens else 0.0, 0.0
    normaliser = num_guided if spec.guidance_reduction == "mean" else num_trajectories
    if spec.method == "topd" and normaliser:
        guidance_share = spec.guidance_weight / normaliser
    if any_capped and median_N is None:
        head = make_head(hidden_ND, head_weight_VD, head_bias, spec, num_vocabulary=num_vocabulary)
        median_N = _medians(_token_losses(head, batch), batch.segment_ids)
    if spec.kl_discount > 0.0 and batch.advantage_N is None:
        batch = replace(
            batch, advantage_N=_advantages(hidden_ND, head_weight_VD, batch, spec, head_bias, num_vocabulary)
        )
    if not torch.is_grad_enabled():  # an autograd function is not told, and would make gradients for nobody
        hidden_ND, head_weight_VD = hidden_ND.detach(), head_weight_VD.detach()
        head_bias = None if head_bias is None else head_bias.detach()
    shares = (token_share, guidance_share)
    loss, token_loss_N, guidance_N, figures_NF = FusedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head_weight_VD, head_bias, batch, spec, num_vocabulary, median_N if any_capped else None, shares
    )
    if check_finite and not bool(loss.isfinite()):
        weight = head_weight_VD[:num_vocabulary]
        raise_non_finite(loss, token_loss_N, {"hidden_ND": hidden_ND, "head_weight_VD": weight, "head_bias": head_bias})
    return loss, _metrics(token_loss_N, guidance_N, figures_NF, batch, spec)


@torch.no_grad()
def token_losses(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    batch: LossBatch,
    spec: LossSpec,
    *,
    head_bias: Tensor | None = None,
    num_vocabulary: int | None = None,
    check_finite: bool = True,
) -> Tensor:
    """l_t of every token before caps and weights, [N] (nats), without gradient: what medians of caps are taken of.

    Arguments, dtypes and errors (DataError, NonFiniteLossError) as those of `topd_loss`; with `check_finite` off, NaN
    is left to the caller. Under `sampled_pg` values mean nothing, and there is nothing to cap.
    Source: the token loss of the paper's section 3.
    """
    num_vocabulary = check_head(hidden_ND, head_weight_VD, head_bias, num_vocabulary)
    check_batch(batch, spec, hidden_ND, num_vocabulary, allow_nan=not check_finite)
    head = make_head(hidden_ND, head_weight_VD, head_bias, spec, num_vocabulary=num_vocabulary)
    token_loss_N = _token_losses(head, batch)
    if check_finite:
        loss = token_loss_N.sum()
        if not bool(loss.isfinite()):
            weight = head_weight_VD[:num_vocabulary]
            inputs = {"hidden_ND": hidden_ND, "head_weight_VD": weight, "head_bias": head_bias}
            raise_non_finite(loss, token_loss_N, inputs)
    return token_loss_N


def trajectory_medians(token_loss_N: Tensor, segment_ids: Tensor) -> Tensor:
    """The median of the losses of each token's own segment, [N]; that of an even number is the mean of the middle two.

    Losses are floats [N] (nats), segments integers [N], in any order. Under context parallelism, gather both arguments
    from all ranks first, and keep the own tokens of the result. Raises DataError on shapes or dtypes that do not fit,
    and on NaN. Source: the sample median of the paper's down-weighting ablation.
    """
    check_shape("token_loss_N", token_loss_N, "N")
    check_dtype("token_loss_N", token_loss_N, "float")
    check_shape("segment_ids", segment_ids, len(token_loss_N))
    check_dtype("segment_ids", segment_ids, "integer")
    check_device("segment_ids", segment_ids, token_loss_N.device)
    is_nan_N = token_loss_N.isnan()
    raise_first(
        [
            (
                is_nan_N.any(),
                lambda: f"token_loss_N holds NaN in row {int(is_nan_N.nonzero()[0])}, and should hold numbers",
            )
        ]
    )
    return _medians(token_loss_N, segment_ids)


def _medians(token_loss_N: Tensor, segment_ids: Tensor) -> Tensor:
    _, segment_N, counts = torch.unique(segment_ids, return_inverse=True, return_counts=True)
    order_N = token_loss_N.argsort()
    order_N = order_N[segment_N[order_N].argsort(stable=True)]
    ordered_N, starts = token_loss_N[order_N], counts.cumsum(0) - counts
    medians = (ordered_N[starts + (counts - 1) // 2] + ordered_N[starts + counts // 2]) / 2
    return medians[segment_N]


@torch.no_grad()
def student_logprobs(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    token_ids: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    *,
    logit_softcap: float | None = None,
    head_bias: Tensor | None = None,
    num_vocabulary: int | None = None,
) -> Tensor:
    """log p_S of one given token per row, [N] (nats), without gradient: the pre-flight check of scoring paths.

    From hidden states [N, D], the head's weight [V, D] (and bias [V]) and token ids [N], integers; the arguments after
    them are those of `LossSpec` and `topd_loss`, and so is the arithmetic. NaN gives NaN: the ranks have to find out
    together. Raises DataError on shapes, dtypes or devices that do not fit, ids outside of the vocabulary, and settings
    out of range. Source: log p_S of the paper's section 3.
    """
    spec = LossSpec(temperature=temperature, logit_softcap=logit_softcap, chunk_tokens=chunk_tokens)
    num_vocabulary = check_head(hidden_ND, head_weight_VD, head_bias, num_vocabulary)
    check_token_ids(token_ids, hidden_ND, num_vocabulary)
    return _logprobs(make_head(hidden_ND, head_weight_VD, head_bias, spec, num_vocabulary=num_vocabulary), token_ids)


def _logprobs(head: Head, token_ids: Tensor) -> Tensor:
    parts = []
    for rows in head.chunks():
        ids_N = token_ids[rows].long()
        picks = Picks(ids=ids_N, rows=torch.arange(len(ids_N), device=ids_N.device), num_excluded=0)
        logits_N, peak_N, sum_N = head.forward(rows, picks)
        parts.append(logits_N - peak_N - sum_N.log())
    return torch.cat(parts)


@torch.no_grad()
def _advantages(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    batch: LossBatch,
    spec: LossSpec,
    head_bias: Tensor | None,
    num_vocabulary: int,
) -> Tensor:
    head = make_head(hidden_ND, head_weight_VD, head_bias, spec, num_vocabulary=num_vocabulary)
    logp_N = _logprobs(head, batch.sampled_ids).clamp(max=0.0)  # a rounding above 0 is none
    return discounted_advantages(logp_N, batch.teacher_sampled_logprobs, batch.segment_ids, spec.kl_discount)


@torch.no_grad()
def _token_losses(head: Head, batch: LossBatch) -> Tensor:
    return all_chunks(head, replace(batch, weight_N=None), None, (1.0, 0.0))[0]


def _metrics(
    token_loss_N: Tensor, guidance_N: Tensor, figures_NF: Tensor, batch: LossBatch, spec: LossSpec
) -> LossMetrics:
    num_rows = token_loss_N.new_tensor(float(token_loss_N.shape[0]))
    figures = {"token_loss": (token_loss_N.sum(), num_rows)}
    if spec.method == "topd":
        figures["guidance_kl"] = (guidance_N.sum(), batch.target_weights.sum().to(num_rows))
    for name, total in zip(FIGURES, figures_NF.sum(0).unbind(), strict=True):
        figures[name] = (total, num_rows)
    return LossMetrics(figures=figures)
