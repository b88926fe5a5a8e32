"""What an update reports, and under which keys."""

from dataclasses import replace

import torch

from topd_ray.engines.collate import MicroBatch
from topd_ray.objective.loss import LossMetrics
from topd_ray.types import Metric

METRIC_KEYS = {
    "token_loss": "loss/opd",
    "guidance_kl": "loss/guidance",
    "token_divergence": "loss/divergence",
    "capped": "loss/capped",
    "student_entropy": "student/entropy",
    "student_tail": "student/tail",
    "teacher_tail": "teacher/tail",
    "teacher_top1": "student/agrees_with_teacher",
    "mismatch": "mismatch/logprob",
    "mismatch_abs": "mismatch/abs_logprob",
    "importance_weight": "staleness/importance_weight",
    "importance_clipped": "staleness/importance_clipped",
}
"""Key of each of the loss's figures (`LossMetrics` says what they are; those of importance weights are means over the
tokens of stale trajectories, and absent without any: the weight, and the share at the clip). `learn` adds
`loss/total` (L_OPD + lambda L_traj), `learner/grad_norm` (before clipping), `learner/learning_rate`, `learner/tokens`
(response tokens of the update), `learner/micro_batches` (of a rank) and `learner/padding` (share of the positions
computed for nothing: rows are not padded, but a rank out of work gets stand-ins)."""


class Tally:
    """Losses and figures of the micro-batches of one update; tensors stay on the device until all are in."""

    def __init__(self, world_size: int) -> None:
        self.losses: list[torch.Tensor] = []
        self.trajectory_ids: list[tuple[str, ...]] = []
        self._world_size = world_size
        self._figures: list[LossMetrics] = []
        self._num_tokens = 0
        self._num_positions = 0
        self._num_computed = 0

    def add(self, micro_batch: MicroBatch, loss: torch.Tensor, figures: LossMetrics) -> None:
        tokens = micro_batch.tokens
        self.losses.append(loss * micro_batch.weight)
        self.trajectory_ids.append(tokens.trajectory_ids)
        self._num_computed += len(tokens.input_ids_P)
        if micro_batch.weight > 0.0:
            self._figures.append(figures)
            self._num_tokens += 0 if micro_batch.is_of_branches else len(tokens.sampled_ids_N)
            self._num_positions += len(tokens.input_ids_P)

    def metrics(self) -> list[Metric]:
        """Ranks add up: a total of the whole batch has count 1 over all of them. Means of nothing are left out."""
        whole = 1.0 / self._world_size
        figures = LossMetrics.total(self._figures).to_metrics() if self._figures else []
        return [
            Metric(key="loss/total", sum=float(torch.stack(self.losses).double().sum()), count=whole),
            *(replace(one, key=METRIC_KEYS[one.key]) for one in figures if one.count > 0.0),
            Metric(key="learner/tokens", sum=self._num_tokens, count=whole),
            Metric(key="learner/micro_batches", sum=len(self.losses)),
            Metric(key="learner/padding", sum=self._num_computed - self._num_positions, count=self._num_computed),
        ]
