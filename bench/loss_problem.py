"""The inputs that every loss of the measurements gets, the naive loss, and the floor under all of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from topd_ray.objective import LossBatch, LossSpec, Support, divergence, topd_loss

SPEC = LossSpec()
TOP_K = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one measurement."""

    tokens: int
    vocabulary: int
    width: int

    @property
    def floor_operations(self) -> int:
        """Three products: logits, and their gradient back into hidden states and weight."""
        return 6 * self.tokens * self.vocabulary * self.width


class Problem:
    """Random hidden states and head, a random teacher, guidance at every tenth token."""

    def __init__(self, shape: Shape, device: str = "cpu") -> None:
        self.shape, self.device = shape, torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        num, vocabulary, width = shape.tokens, shape.vocabulary, shape.width
        self.hidden = torch.randn(num, width, device=self.device).to(dtype).requires_grad_()
        self.head = (torch.randn(vocabulary, width, device=self.device) * width**-0.5).to(dtype).requires_grad_()
        stride = vocabulary // TOP_K  # one token out of each stretch of the vocabulary: none comes twice
        ids = torch.arange(TOP_K, device=self.device) * stride
        ids = ids + torch.randint(0, stride, (num, TOP_K), device=self.device)
        logprobs = torch.randn(num, TOP_K, device=self.device).log_softmax(1) - 0.1
        guided = torch.zeros(num, dtype=torch.long, device=self.device)
        guided[::10] = 2
        num_targets = int(guided.sum())
        self.counts: dict[str, Any] = {"num_tokens": float(num), "num_guided": num_targets / 2}
        self.batch = LossBatch(
            sampled_ids=ids[:, 0],
            teacher_topk_ids=ids,
            teacher_topk_logprobs=logprobs,
            teacher_sampled_logprobs=logprobs[:, 0],
            behaviour_logprobs=logprobs[:, 0],
            capped=torch.zeros(num, dtype=torch.bool, device=self.device),
            segment_ids=torch.zeros(num, dtype=torch.long, device=self.device),
            target_indptr=torch.cat([guided.new_zeros(1), guided.cumsum(0)]),
            target_ids=torch.randint(0, vocabulary, (num_targets,), device=self.device),
            target_weights=torch.full((num_targets,), 0.5, device=self.device),
            target_entropy=torch.zeros(num, device=self.device),
        )

    def ours(self, spec: LossSpec = SPEC) -> Tensor:
        return topd_loss(self.hidden, self.head, self.batch, spec, **self.counts)[0]

    def step(self, loss: Tensor) -> float:
        """Make the gradients of a loss that has been computed, and drop them; the loss's value."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.hidden.grad = self.head.grad = None
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def floor(self) -> None:
        """The three products that no loss can do without, as [vocabulary, tokens]: the faster way on a CPU."""
        with torch.no_grad():
            logits_VN = self.head @ self.hidden.T
            _ = logits_VN.T @ self.head, logits_VN @ self.hidden
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def naive(hidden: Tensor, head: Tensor, batch: LossBatch, num_tokens: float, num_guided: float) -> Tensor:
    """The TOPD loss (reverse, temperature 1, lambda 0.3) over all logits at once, in float32, the rest by autograd."""
    support = Support.build(
        batch.teacher_topk_ids, batch.teacher_topk_logprobs, batch.sampled_ids, batch.teacher_sampled_logprobs
    )
    logp_NV = linear(hidden, head).float().log_softmax(1)
    picked_NC = logp_NV.gather(1, support.ids)
    inside_N = picked_NC.exp().masked_fill(~support.mask[:, :-1], 0.0).sum(1)
    tail_N = (1.0 - inside_N).clamp(min=1e-6).log()
    student_NC = torch.cat([picked_NC, tail_N.unsqueeze(1)], dim=1).masked_fill(~support.mask, 0.0)
    loss = divergence(student_NC, support.teacher_logp, support.mask, "reverse").sum() / num_tokens
    rows_Z = torch.repeat_interleave(batch.target_indptr.diff(), output_size=batch.target_ids.shape[0])
    guidance = -(batch.target_weights * logp_NV[rows_Z, batch.target_ids]).sum() - batch.target_entropy.sum()
    return loss + 0.3 * guidance / num_guided
