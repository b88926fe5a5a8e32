"""What the sleeping engines have to do, how long it takes them, and the best that any driver could make of it.

Lengths are log-normal, cut at a cap, and bound to the trajectory's seed: a run draws the same ones whatever its order.
A rollout engine is continuous batching without its grain: with n sequences running, a step takes
`step_seconds + sequence_seconds * n` and gives each of them one token. A teacher call takes `call_seconds` and
`score_seconds` a token, one call after the other; an update `update_seconds` and `train_seconds` a token, and the
packing of the new weights another `pack_seconds` of the learner. A bundle reaches a rollout worker after
`fetch_seconds` (times 0.5 to 1.5, drawn for each), and stops its engine for `swap_seconds`.
"""

import math
import random
from dataclasses import dataclass, replace
from statistics import mean
from typing import Literal

from topd_ray.config.schema import (
    BufferConfig,
    DataConfig,
    LearnerConfig,
    PipelineConfig,
    RolloutConfig,
    StudentConfig,
    TeacherConfig,
    TopdConfig,
)
from topd_ray.data.schedule import PromptSchedule
from topd_ray.pipeline.tasks import Tasks
from topd_ray.types import Prompt, RolloutRequest

OnNewWeights = Literal["finish", "interrupt"]
WINDOWS_PER_TOKEN = 0.0225
"""The paper's 218 of 9,688: as many distances come with a guided trajectory."""
BYTES_PER_TOKEN = 800
"""About a response token with 64 teacher tokens and its sparse target; only counted, never allocated."""
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sizes, lengths (tokens) and times (seconds)."""

    name: str
    num_rollouts: int = 256
    num_slots: int = 3
    """sequences that a rollout engine runs at once"""
    num_teachers: int = 8
    prompts_per_step: int = 384
    samples_per_prompt: int = 2
    median_length: float = 400.0
    sigma: float = 0.6
    """of the logarithm of the length"""
    longest: int = 2000
    step_seconds: float
    sequence_seconds: float
    call_seconds: float = 0.002
    score_seconds: float
    update_seconds: float = 0.02
    train_seconds: float
    pack_seconds: float = 0.01
    fetch_seconds: float = 0.03
    swap_seconds: float = 0.005
    max_bytes: int = 2 * 1024**3

    @property
    def batch_size(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    def length(self, request: RolloutRequest) -> int:
        drawn = random.Random(request.seed).lognormvariate(math.log(self.median_length), self.sigma)
        return max(1, min(round(drawn), self.longest))

    def config(self, max_staleness: int, on_new_weights: OnNewWeights) -> TopdConfig:
        return TopdConfig(
            student=StudentConfig(model="sleeps"),
            teacher=TeacherConfig(model="sleeps", num_workers=self.num_teachers),
            data=DataConfig(max_prompt_tokens=1, heldout=None),
            rollout=RolloutConfig(
                prompts_per_step=self.prompts_per_step,
                samples_per_prompt=self.samples_per_prompt,
                max_new_tokens=self.longest,
                num_workers=self.num_rollouts,
                max_num_seqs=self.num_slots,
            ),
            learner=LearnerConfig(max_tokens_per_micro_batch="one_trajectory"),
            buffer=BufferConfig(max_bytes=self.max_bytes),
            pipeline=PipelineConfig(max_staleness=max_staleness, on_new_weights=on_new_weights),
        )

    def tasks(self, num_updates: int) -> Tasks:
        """Prompts enough for `num_updates` in one epoch."""
        prompts = [
            Prompt(prompt_id=f"prompt-{index}", token_ids=(index,))
            for index in range(num_updates * self.prompts_per_step)
        ]
        schedule = PromptSchedule([one.prompt_id for one in prompts], self.prompts_per_step, SEED, shuffle=True)
        return Tasks(schedule, prompts, self.samples_per_prompt, SEED)

    def bounds(self, skip: int, num_updates: int, on_new_weights: OnNewWeights) -> dict[str, float]:
        """Trajectories/s that each stage could do at most, of the batches drawn after the first `skip`.

        A stage's bound is the batch over the seconds that its mean work takes with every slot and every worker busy
        all the time: no driver can beat the smallest. Rollout: tokens x time of a step with all slots taken / slots /
        workers, and the swap of the weights where it interrupts. Teacher: tokens x score_seconds / teachers, calls at
        no cost. Learner: update_seconds + tokens x train_seconds + pack_seconds.
        """
        tasks = self.tasks(skip + num_updates)
        batches = [tasks.draw() for _ in range(skip + num_updates)][skip:]
        tokens = mean(sum(self.length(task.request) for task in batch) for batch in batches)
        step = self.step_seconds + self.sequence_seconds * self.num_slots
        swap = self.swap_seconds if on_new_weights == "interrupt" else 0.0
        seconds = {
            "rollout": tokens * step / self.num_slots / self.num_rollouts + swap,
            "teacher": tokens * self.score_seconds / self.num_teachers,
            "learner": self.update_seconds + tokens * self.train_seconds + self.pack_seconds,
        }
        return {stage: self.batch_size / spent for stage, spent in seconds.items()}

    def scaled(self, factor: float) -> "Workload":
        """Everything takes `factor` times as long."""
        names = [name for name in self.__dataclass_fields__ if name.endswith("_seconds")]
        return replace(self, **{name: factor * getattr(self, name) for name in names})
