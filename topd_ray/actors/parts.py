"""Which part of the config each worker gets."""

from pathlib import Path
from typing import Any

from topd_ray.config.schema import TopdConfig


def threads(config: TopdConfig, role: str) -> int:
    """CPU threads of a worker of `role` (rollout, teacher or learner).

    Deterministic runs use one thread everywhere: the order of a parallel sum depends on the number of threads.
    """
    chosen: int = getattr(config.resources, f"threads_per_{role}")
    return 1 if config.run.deterministic else chosen


def rollout_part(config: TopdConfig) -> dict[str, Any]:
    """Arguments of a RolloutWorker, the store excepted."""
    return {
        "student": config.student,
        "rollout": config.rollout,
        "weights": config.weights,
        "evaluation": config.evaluation,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "window": config.near_future.window if config.resamples else 0,
        "threads": threads(config, "rollout"),
        "seed": config.run.seed,
    }


def teacher_part(config: TopdConfig) -> dict[str, Any]:
    """Arguments of a TeacherWorker, the store excepted."""
    return {
        "teacher": config.teacher,
        "student": config.student,
        "near_future": config.near_future,
        "objective": config.objective,
        "evaluation": config.evaluation,
        "temperature": config.rollout.temperature,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "max_new_tokens": config.rollout.max_new_tokens,
        "threads": threads(config, "teacher"),
        "seed": config.run.seed,
    }


def learner_part(config: TopdConfig, *, rank: int, total_updates: int) -> dict[str, Any]:
    """Arguments of a LearnerWorker, the store excepted."""
    return {
        "student": config.student,
        "learner": config.learner,
        "weights": config.weights,
        "num_rollout_workers": config.rollout.num_workers,
        "objective": config.objective,
        "temperature": config.rollout.temperature,
        "total_updates": total_updates,
        "rank": rank,
        "timeout_seconds": max(config.faults.stall_seconds, config.faults.replace_seconds),
        "threads": threads(config, "learner"),
        "seed": config.run.seed,
        "deterministic": config.run.deterministic,
        "failed_batch_folder": Path(config.run.folder).absolute() / "failed_batch",
    }
