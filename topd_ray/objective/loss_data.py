"""What goes into the loss and what comes out of it.

Axes: N response tokens of a micro-batch, laid end to end without padding; K top teacher tokens; Z nonzeros of the
guidance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from topd_ray.errors import DataError
from topd_ray.objective.checks import check_one_of, check_positive, check_whole, is_number
from topd_ray.objective.divergence import DivergenceKind, check_divergence
from topd_ray.types import Metric

DIVERGENCES = (*get_args(DivergenceKind), "sampled_pg")
METHODS = ("topd", "opd")
REDUCTIONS = ("mean", "sum")
KERNELS = ("torch", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """How the loss is put together; the fields are those of `objective`, `rollout` and `learner` in the config.

    Raises DataError for a value out of its range, with the field's name.
    """

    method: Literal["topd", "opd"] = "topd"
    divergence: Literal["reverse", "forward", "jsd", "sampled_pg"] = "reverse"
    jsd_beta: float = 0.5
    """weight of the teacher under `jsd`, inside (0, 1)"""
    importance_clip: float = 2.0
    """bound of the token's own p_S / p_behaviour under `sampled_pg`; `LossBatch.weight_N` comes with its own"""
    kl_discount: float = 0.0
    """of later tokens' advantages in that of a token under `sampled_pg` (`discounted_advantages`), in [0, 1)"""
    guidance_weight: float = 0.3
    """lambda"""
    guidance_reduction: Literal["mean", "sum"] = "mean"
    temperature: float = 1.0
    logit_softcap: float | None = None
    """cap in cap * tanh(logit / cap), applied before the temperature (Gemma 2)"""
    chunk_tokens: int | None = None
    """tokens whose logits exist at once; unset, a part of all, or what some bytes hold if that is more (`head`)"""
    kernel: Literal["torch", "triton"] = "torch"
    """what reads and writes a chunk's logits; triton needs the package and a GPU"""

    def __post_init__(self) -> None:
        check_one_of("method", self.method, METHODS)
        check_one_of("guidance_reduction", self.guidance_reduction, REDUCTIONS)
        check_one_of("kernel", self.kernel, KERNELS)
        check_one_of("divergence", self.divergence, DIVERGENCES)
        if self.divergence != "sampled_pg":
            check_divergence(self.divergence, self.jsd_beta)
        if not (is_number(self.kl_discount) and 0.0 <= self.kl_discount < 1.0):
            raise DataError(f"kl_discount is {self.kl_discount!r}, and should lie in [0, 1)")
        if self.kl_discount > 0.0 and self.divergence != "sampled_pg":
            raise DataError(
                f"kl_discount is {self.kl_discount!r} under {self.divergence}, and should be 0: it discounts the "
                "advantages of sampled_pg"
            )
        check_positive("temperature", self.temperature)
        check_positive("importance_clip", self.importance_clip)
        if self.logit_softcap is not None:
            check_positive("logit_softcap", self.logit_softcap)
        weight = self.guidance_weight
        if not (is_number(weight) and math.isfinite(weight) and weight >= 0.0):
            raise DataError(f"guidance_weight is {weight!r}, and should be finite and not negative")
        if self.chunk_tokens is not None:
            check_whole("chunk_tokens", self.chunk_tokens, 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossBatch:
    """What the teacher said about N response tokens; whole trajectories, unless medians for the caps are passed in.

    All on one device. Floats of any width: what is narrower than float32 is widened first. Values are looked at by
    `topd_loss`, not here.
    """

    sampled_ids: Tensor
    """[N] integer, the tokens of the response"""
    teacher_topk_ids: Tensor
    """[N, K] integer, in any order, each token once"""
    teacher_topk_logprobs: Tensor
    """[N, K] float, nats at the rollout's temperature; -inf marks padding, whatever its id"""
    teacher_sampled_logprobs: Tensor
    """[N] float, nats; -inf for a token that the teacher rules out"""
    behaviour_logprobs: Tensor
    """[N] float, nats, under the policy that wrote the tokens"""
    capped: Tensor
    """[N] bool"""
    segment_ids: Tensor
    """[N] integer, which trajectory a token belongs to"""
    target_indptr: Tensor
    """[N + 1] integer, row pointers into target_ids and target_weights, from 0 to Z"""
    target_ids: Tensor
    """[Z] integer, the tokens that the guidance teaches"""
    target_weights: Tensor
    """[Z] float, no unit; the weights of a row sum to the number of windows that cover it"""
    target_entropy: Tensor
    """[N] float, nats, the entropies of the soft targets of these windows, summed; 0 where none covers"""
    weight_N: Tensor | None = None
    """[N] float, no unit, what the losses of the position are multiplied by (`prefix_weights`); None: by 1"""
    advantage_N: Tensor | None = None
    """[N] float, nats, the advantages under `sampled_pg` with a `kl_discount`; None: they are computed"""

    def rows(self, start: int, stop: int) -> "LossBatch":
        """Tokens start .. stop - 1 as a batch of their own."""
        return self.split((start, stop))[0]

    def split(self, edges: Sequence[int]) -> list["LossBatch"]:
        """Tokens edges[i] .. edges[i + 1] - 1 as a batch for each i; one transfer from the device."""
        target_edges = self.target_indptr[list(edges)].tolist()
        return [
            LossBatch(
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
                weight_N=None if self.weight_N is None else self.weight_N[start:stop],
                advantage_N=None if self.advantage_N is None else self.advantage_N[start:stop],
            )
            for (start, stop), (first, last) in zip(pairwise(edges), pairwise(target_edges), strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossMetrics:
    """Figures of one micro-batch as (sum, count) pairs of detached scalars; they stay on the device until asked for.

    `token_loss` (after caps and weights), `token_divergence` (before both; the reverse KL under sampled_pg),
    `guidance_kl` per guided (window, position) pair (under `topd`; after weights), `student_entropy` (on the support),
    `mismatch` and `mismatch_abs` (student minus behaviour log-prob of the sampled token), `capped` (share of tokens
    whose loss a cap has lowered), `teacher_top1` (the student's likeliest token is the teacher's), `student_tail` and
    `teacher_tail` (mass outside of the support).
    """

    figures: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def total(cls, parts: Sequence["LossMetrics"]) -> "LossMetrics":
        """Figures of several micro-batches, at least one, added up in float64 on their device.

        A figure that some have not got is that of the others.
        """
        totals = {
            key: torch.stack([torch.stack(one.figures[key]) for one in parts if key in one.figures]).double().sum(0)
            for key in dict.fromkeys(key for one in parts for key in one.figures)
        }
        return cls(figures={key: (total_2[0], total_2[1]) for key, total_2 in totals.items()})

    def to_metrics(self, prefix: str = "") -> list[Metric]:
        """The figures as records, each key after `prefix`; one transfer from the device."""
        pairs = torch.stack([torch.stack(pair).double() for pair in self.figures.values()]).tolist()
        return [
            Metric(key=prefix + key, sum=total, count=count)
            for key, (total, count) in zip(self.figures, pairs, strict=True)
        ]
