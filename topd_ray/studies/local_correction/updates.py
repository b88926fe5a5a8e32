"""A few updates of the student on one window, and what it then writes after the same prefix.

Plain torch in this process: the model, the objective and AdamW are those of the learner, but a DeepSpeed engine for
each point would take longer than all of its updates. All float32. A copy of the weights is kept beside the model's own,
so a student of P parameters needs 20 P bytes: weights, their originals, gradients and AdamW's two moments.

Axes: N continuations of one prefix, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from topd_ray.config.schema import TopdConfig
from topd_ray.data.tokenizer import read_vocabulary
from topd_ray.engines.collate import branch_rows, collate
from topd_ray.engines.optimisation import adamw, parameter_groups
from topd_ray.engines.student_model import BatchTotals, StudentWithLoss, load_student, loss_spec
from topd_ray.errors import NonFiniteLossError
from topd_ray.types import Float32, GuidedTrajectory, Int32

Method = Literal["opd", "topd"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Continuation:
    """Tokens the student wrote after a prefix."""

    token_ids: Int32
    """at most as many as asked for; an end-of-sequence token is the last one"""
    logprobs: Float32
    """of these, under the policy that wrote them (nats)"""


class Student:
    """The config's student, which can be updated and put back."""

    def __init__(self, config: TopdConfig) -> None:
        one_each = {"dtype": "float32", "max_tokens_per_micro_batch": "one_trajectory"}
        self._learner = config.learner.model_copy(update=one_each)
        self._temperature, self._top_p = config.rollout.temperature, config.rollout.top_p
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._vocabulary = read_vocabulary(config.student)
        self._model = load_student(config.student, self._learner, self._device)
        self._modules = {method: self._with_loss(config, method) for method in ("opd", "topd")}
        self._originals = [parameter.detach().clone() for parameter in self._model.parameters()]

    @property
    def model(self) -> Any:
        """The Hugging Face model, as it now is."""
        return self._model

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Whatever happens in the block, the weights are bitwise the checkpoint's after it."""
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, original in zip(self._model.parameters(), self._originals, strict=True):
                    parameter.copy_(original)
                    parameter.grad = None

    def update(
        self, window_at: Callable[[int], GuidedTrajectory], method: Method, learning_rate: float, num_updates: int
    ) -> list[float]:
        """Update on window_at(0), window_at(1), ... with an AdamW of its own; the loss before each (nats a token).

        One update's loss is the mean divergence of the window's tokens and, under `topd`, guidance_weight times the
        guidance of the window's targets and its branches', reduced as in training. The rest of AdamW, and clipping, are
        the learner's.
        Raises NonFiniteLossError for a loss that is NaN or infinite.
        """
        module = self._modules[method]
        optimizer = adamw(parameter_groups(module, self._learner), self._learner)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        losses = []
        for index in range(num_updates):
            window = window_at(index)
            totals = BatchTotals(
                num_tokens=window.trajectory.num_response_tokens,
                num_guided=window.num_guided,
                num_trajectories=1,
            )
            batches = [collate([window], self._device)]
            if branches := list(branch_rows(window)):
                batches.append(collate(branches, self._device, is_of_branches=True))
            loss = torch.stack([module(batch, totals)[0] for batch in batches]).sum()
            losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]):
                raise NonFiniteLossError(
                    f"update {index} at {window.trajectory.trajectory_id}: the {method} loss is {losses[-1]} at "
                    f"learning rate {learning_rate:g}; right would be a smaller rate"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if self._learner.gradient_clipping:
                torch.nn.utils.clip_grad_norm_(module.parameters(), self._learner.gradient_clipping)
            optimizer.step()
        return losses

    @torch.no_grad()
    def draw(
        self, prefix_ids: Int32, num_tokens: int, *, num_samples: int, seed: int, greedy: bool = False
    ) -> list[Continuation]:
        """`num_samples` continuations of at most `num_tokens` tokens, drawn as rollouts are; and then the greedy one.

        The same seed gives every policy the same random numbers (a Gumbel variable for each token that could come
        next): policies that differ little write alike, and what differs is not the draw.
        """
        generator = torch.Generator().manual_seed(seed)
        num_rows = num_samples + greedy
        ids_N1 = torch.tensor(prefix_ids.tolist(), device=self._device)[None]
        out = self._model(input_ids=ids_N1, use_cache=True, logits_to_keep=1)
        cache, logits_NV = out.past_key_values, out.logits[:, -1].expand(num_rows, -1)
        cache.batch_repeat_interleave(num_rows)
        chosen, logprobs = [], []
        is_done_N = torch.zeros(num_rows, dtype=torch.bool)
        for _ in range(num_tokens):
            logp_NV = self._distribution(logits_NV)
            noise_NV = -torch.empty(num_samples, logp_NV.shape[1]).exponential_(generator=generator).log()
            noisy_NV = logp_NV + torch.cat([noise_NV, torch.zeros(int(greedy), logp_NV.shape[1])])
            ids_N = noisy_NV.argmax(1)
            chosen.append(ids_N)
            logprobs.append(logp_NV.gather(1, ids_N[:, None])[:, 0])
            is_done_N |= torch.isin(ids_N, torch.tensor(self._vocabulary.eos_ids))
            if bool(is_done_N.all()) or len(chosen) == num_tokens:
                break
            out = self._model(input_ids=ids_N[:, None].to(self._device), past_key_values=cache, use_cache=True)
            cache, logits_NV = out.past_key_values, out.logits[:, -1]
        rows = zip(torch.stack(chosen, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True)
        return [self._up_to_end(*row) for row in rows]

    def _distribution(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """Log-probs of the policy that writes rollouts, on the CPU: over the tokenizer's tokens, cut to the nucleus."""
        logits_NV = logits_NV[:, : self._vocabulary.size].float().cpu() / self._temperature
        if self._top_p < 1.0:
            from transformers import TopPLogitsWarper

            logits_NV = TopPLogitsWarper(self._top_p)(None, logits_NV)
        return logits_NV.log_softmax(1)

    def _up_to_end(self, token_ids: list[int], logprobs: list[float]) -> Continuation:
        ends = [index for index, token_id in enumerate(token_ids) if token_id in self._vocabulary.eos_ids]
        length = ends[0] + 1 if ends else len(token_ids)
        return Continuation(
            token_ids=np.asarray(token_ids[:length], np.int32), logprobs=np.asarray(logprobs[:length], np.float32)
        )

    def _with_loss(self, config: TopdConfig, method: Method) -> StudentWithLoss:
        objective = config.objective.model_copy(update={"method": method})
        return StudentWithLoss(
            self._model,
            loss_spec(self._model, objective, self._learner, self._temperature),
            num_tokens=self._vocabulary.size,
            importance_horizon=objective.importance_horizon,
        )
