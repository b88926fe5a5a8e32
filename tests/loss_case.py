"""A loss small enough to be computed the naive way: over the full vocabulary, window by window, in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topd_ray.objective import LossBatch, LossSpec, topd_loss

N, D, V = 24, 11, 41
SEGMENTS = (9, 7, 8)
NUM_GUIDED = 21.0
COUNTS: dict[str, Any] = {"num_tokens": N, "num_guided": NUM_GUIDED, "num_trajectories": len(SEGMENTS)}
SPEC = LossSpec(chunk_tokens=7, temperature=0.8)


class Case:
    """Three trajectories with windows, teacher log-probs [N, V], and the head that the student ends in."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        self.head = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        self.teacher = (1.5 * torch.randn(N, V, generator=generator, dtype=torch.float64)).log_softmax(1)
        self.sampled = torch.randint(0, V, (N,), generator=generator)
        self.behaviour = -3.0 + 0.5 * torch.randn(N, generator=generator, dtype=torch.float64)
        self.bias: Tensor | None = None
        self.windows = [self._windows(seed, length) for length in SEGMENTS]
        """of each trajectory: (position, soft targets of that position and those after it, [S, V])"""

    @staticmethod
    def _windows(seed: int, length: int) -> list[tuple[int, Tensor]]:
        rng = np.random.default_rng([seed, length])
        windows = []
        for position, num_student, num_teacher in ((0, 3, 4), (2, 3, 3), (length - 1, 1, 5)):
            targets_SV = np.zeros((num_student, V))
            ids = rng.integers(0, V, num_teacher)
            for row in targets_SV:
                np.add.at(row, ids, rng.dirichlet(np.ones(num_teacher)))
            windows.append((position, torch.from_numpy(targets_SV)))
        return windows

    def batch(self, top_k: int = V, capped: Tensor | None = None, weight: Tensor | None = None) -> LossBatch:
        logprobs, ids = self.teacher.topk(top_k, 1)
        weights, entropy = torch.zeros(N, V, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
        for start, windows in zip(np.cumsum([0, *SEGMENTS]).tolist(), self.windows, strict=False):
            for position, targets in windows:
                rows = slice(start + position, start + position + len(targets))
                weights[rows] += targets
                entropy[rows] -= torch.special.xlogy(targets, targets).sum(1)
        counts = (weights > 0).sum(1)
        return LossBatch(
            sampled_ids=self.sampled.int(),
            teacher_topk_ids=ids.int(),
            teacher_topk_logprobs=logprobs,
            teacher_sampled_logprobs=self.teacher.gather(1, self.sampled[:, None]).squeeze(1),
            behaviour_logprobs=self.behaviour,
            capped=torch.zeros(N, dtype=torch.bool) if capped is None else capped,
            segment_ids=torch.repeat_interleave(torch.tensor(SEGMENTS)),
            target_indptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            target_ids=weights.nonzero()[:, 1].int(),
            target_weights=weights[weights > 0],
            target_entropy=entropy,
            weight_N=weight,
        )

    def student(self, spec: LossSpec = SPEC) -> Tensor:
        logits = self.hidden.double() @ self.head.double().T + (0.0 if self.bias is None else self.bias.double())
        if spec.logit_softcap is not None:
            logits = spec.logit_softcap * torch.tanh(logits / spec.logit_softcap)
        return (logits / spec.temperature).log_softmax(1)

    def naive(self, spec: LossSpec = SPEC, capped: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """L_OPD + lambda L_traj over the full vocabulary, one window at a time."""
        student = self.student(spec)
        weight = torch.ones(N, dtype=torch.float64) if weight is None else weight
        token_loss = full_divergence(student, self.teacher, spec)
        if capped is not None:
            scales = []
            for part, mask in zip(token_loss.split(SEGMENTS), capped.split(SEGMENTS), strict=True):
                ratio = float(np.median(part.detach().numpy())) / part.detach()
                scales.append(torch.where(mask, ratio.clamp(max=1.0), torch.ones_like(part)))
            token_loss = token_loss * torch.cat(scales)
        guidance = student.new_zeros(())
        for part, weights, windows in zip(student.split(SEGMENTS), weight.split(SEGMENTS), self.windows, strict=True):
            for position, targets in windows:
                rows = slice(position, position + len(targets))
                pair_kl = (torch.special.xlogy(targets, targets) - targets * part[rows]).sum(1)
                guidance = guidance + (weights[rows] * pair_kl).sum()
        count = NUM_GUIDED if spec.guidance_reduction == "mean" else len(SEGMENTS)
        return (weight * token_loss).sum() / N + (
            spec.guidance_weight * guidance / count if spec.method == "topd" else 0.0
        )

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        leaves = [self.hidden, self.head, *([] if self.bias is None else [self.bias])]
        return torch.autograd.grad(loss, leaves)


def full_divergence(student: Tensor, teacher: Tensor, spec: LossSpec) -> Tensor:
    if spec.divergence == "reverse":
        return (student.exp() * (student - teacher)).sum(1)
    if spec.divergence == "forward":
        return (teacher.exp() * (teacher - student)).sum(1)
    mixture = (spec.jsd_beta * teacher.exp() + (1 - spec.jsd_beta) * student.exp()).log()
    of_teacher = (teacher.exp() * (teacher - mixture)).sum(1)
    return spec.jsd_beta * of_teacher + (1 - spec.jsd_beta) * (student.exp() * (student - mixture)).sum(1)


def ours(case: Case, batch: LossBatch, spec: LossSpec = SPEC, **arguments: Any) -> Tensor:
    return topd_loss(case.hidden, case.head, batch, spec, **{**COUNTS, "head_bias": case.bias, **arguments})[0]


def assert_gradient(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...], step: float = 1e-6) -> None:
    """The gradient along three random directions is a central difference of the loss.

    `gradcheck` would ask for the gradients of one loss twice, and there are none the second time.
    """
    gradients = torch.autograd.grad(loss(*inputs), inputs)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        ways = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs]
        moved = [[x.detach() + size * way for x, way in zip(inputs, ways, strict=True)] for size in (step, -step)]
        above, below = (float(loss(*arguments)) for arguments in moved)
        found = sum(float((gradient * way).sum()) for gradient, way in zip(gradients, ways, strict=True))
        torch.testing.assert_close(found, (above - below) / (2.0 * step), atol=1e-7, rtol=1e-6)


def figures(case: Case, batch: LossBatch, spec: LossSpec = SPEC) -> dict[str, float]:
    metrics = topd_loss(case.hidden, case.head, batch, spec, num_tokens=N, num_guided=NUM_GUIDED)[1].to_metrics()
    return {metric.key: metric.sum / metric.count for metric in metrics}
