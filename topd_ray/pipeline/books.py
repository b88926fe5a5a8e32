"""What a run writes down after every update: figures, the ledger, and what was given up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topd_ray.metrics.sinks import Sinks
from topd_ray.metrics.step_lines import StepLines, read_lines
from topd_ray.pipeline.flow import Update
from topd_ray.pipeline.ledger import Ledger
from topd_ray.pipeline.plan import Plan
from topd_ray.pipeline.sinks import open_sinks
from topd_ray.pipeline.tasks import Task, Tasks


@dataclass(frozen=True, kw_only=True)
class Books:
    """The files of one session, cut back to where the session begins."""

    sinks: Sinks
    ledger: Ledger
    answers: StepLines
    """which answers of every evaluation were right"""
    answered: frozenset[str]
    """keys of the evaluations of earlier sessions"""
    quarantine: Path
    """written only where something is put into it"""

    @classmethod
    def open(cls, plan: Plan) -> "Books":
        folder, step = plan.config.run.folder, plan.state.step
        quarantine = folder / "quarantine.jsonl"
        if quarantine.exists():
            StepLines(quarantine, step).close()
        answers = StepLines(folder / "answers.jsonl", step)
        return cls(
            sinks=open_sinks(plan.config, resume_step=step),
            ledger=Ledger.open(
                folder / "ledger.jsonl",
                step,
                num_prompts=len(plan.train),
                samples_per_prompt=plan.config.rollout.samples_per_prompt,
            ),
            answers=answers,
            answered=frozenset(line["key"] for line in read_lines(folder / "answers.jsonl")),
            quarantine=quarantine,
        )

    def write_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.sinks.write(step, values)

    def write_answers(self, step: int, key: str, correct_PR: Sequence[Sequence[bool]]) -> None:
        """Marks by held-out prompt and run: a text of 0 and 1 a run, in the order of the prompts."""
        texts = ["".join(str(int(mark)) for mark in marks_P) for marks_P in zip(*correct_PR, strict=True)]
        self.answers.write(step, {"key": key, "correct": texts})

    def write_update(self, step: int, update: Update, tasks: Tasks) -> None:
        """Which trajectories an update was made of, and which were given up before it."""
        if update.quarantined:
            lines = StepLines(self.quarantine, step, synced=True)
            for task, reason in update.quarantined:
                lines.write(step, _given_up(task, reason))
            lines.close()
        self.ledger.write(
            step,
            policy_version=update.policy_version,
            trained=[
                (*_sample(task), item.policy_version) for task, item in zip(update.tasks, update.items, strict=True)
            ],
            quarantined=[_sample(task) for task, _ in update.quarantined],
            dropped=update.num_dropped,
            position=tasks.position,
            num_open=len(tasks),
        )

    def close(self) -> None:
        self.sinks.close()
        self.answers.close()
        self.ledger.close()


def _given_up(task: Task, reason: str) -> dict[str, Any]:
    epoch, prompt_id, sample = _sample(task)
    return {
        "prompt_id": prompt_id,
        "epoch": epoch,
        "sample_index": sample,
        "prompt_token_ids": list(task.request.prompt.token_ids),
        "num_failures": task.num_failures,
        "reason": reason,
    }


def _sample(task: Task) -> tuple[int, str, int]:
    return task.request.epoch, task.request.prompt.prompt_id, task.request.sample_index
