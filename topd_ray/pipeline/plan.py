"""What a run will do, settled before any engine loads: prompts, length, and the checkpoint to go on from."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from topd_ray.config.schema import TopdConfig
from topd_ray.data.prompts import load_prompts
from topd_ray.data.schedule import PromptSchedule
from topd_ray.data.tokenizer import check_same_vocabulary, load_tokenizer
from topd_ray.errors import ConfigError
from topd_ray.evaluation.grading import is_gradable
from topd_ray.objective import RunningQuantile
from topd_ray.pipeline.checkpoint import Checkpoints, RunState
from topd_ray.pipeline.identity import run_identity
from topd_ray.pipeline.manifest import Identity
from topd_ray.pipeline.tasks import Task, Tasks
from topd_ray.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a run needs besides its workers."""

    config: TopdConfig
    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    total_updates: int
    tasks: Tasks
    """what is drawn of the prompts"""
    reopened: tuple[Task, ...]
    """drawn before the checkpoint and not trained on by then"""
    distances: RunningQuantile
    """of recent transport distances"""
    state: RunState
    """where the run stands: at its start, or at its newest checkpoint"""
    learner_folder: Path | None
    """of that checkpoint; None at the start"""
    identity: Identity
    """what makes a checkpoint one of this run"""


def plan_run(config: TopdConfig, say: Say) -> Plan:
    """Read tokenizers, prompts and the newest checkpoint.

    Raises ConfigError, DataError or CheckpointError for whatever cannot work; nothing has been written by then.
    """
    check_same_vocabulary(config.student, config.teacher)
    tokenizer = load_tokenizer(config.student)
    identity = run_identity(config, tokenizer)
    found = _find_checkpoint(config, identity)
    begun = datetime.fromisoformat(found[0].begun) if found and found[0].begun else datetime.now()
    loaded = load_prompts(config.data.train, config.data, tokenizer, "train", begun)
    _say_skipped(loaded.num_skipped_overlong, config.data.train, config, say)
    schedule = PromptSchedule(
        prompt_ids=[prompt.prompt_id for prompt in loaded.prompts],
        prompts_per_step=config.rollout.prompts_per_step,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
    )
    distances = RunningQuantile(config.near_future.false_alarm_quantile, config.near_future.quantile_window)
    tasks = Tasks(schedule, loaded.prompts, config.rollout.samples_per_prompt, config.run.seed)
    reopened: list[Task] = []
    if found is not None:
        reopened = tasks.load_state(found[0].schedule)
        distances.update(found[0].quantile["distances"])
    state = found[0] if found else RunState(schedule=tasks.state(), quantile=distances.state())
    return Plan(
        config=config,
        train=loaded.prompts,
        heldout=load_heldout(config, tokenizer, say, begun),
        total_updates=_total_updates(config, len(loaded.prompts), tasks, state, say),
        tasks=tasks,
        reopened=tuple(reopened),
        distances=distances,
        state=replace(state, begun=begun.isoformat()),
        learner_folder=found[1] if found else None,
        identity=identity,
    )


def load_heldout(
    config: TopdConfig, tokenizer: "PreTrainedTokenizerBase", say: Say, now: datetime | None = None
) -> tuple[Prompt, ...]:
    """The prompts of an evaluation; none where data.heldout is unset.

    Raises ConfigError for a row whose answer is missing, or cannot be graded by evaluation.grader.
    """
    if config.data.heldout is None:
        return ()
    loaded = load_prompts(config.data.heldout, config.data, tokenizer, "heldout", now)
    _say_skipped(loaded.num_skipped_overlong, config.data.heldout, config, say)
    kind = config.evaluation.grader
    for number, prompt in enumerate(loaded.prompts, start=1):
        if not is_gradable(kind, prompt.answer):
            raise ConfigError(
                f"data.heldout={config.data.heldout}: prompt {number} has the answer {prompt.answer!r}, right would be "
                + ("an integer (evaluation.grader=arithmetic)" if kind == "arithmetic" else "one to grade against")
            )
    return loaded.prompts[: config.evaluation.num_prompts]


def _say_skipped(num_skipped: int, source: str, config: TopdConfig, say: Say) -> None:
    if num_skipped:
        say(f"{source}: skipped {num_skipped} prompts of more than {config.data.max_prompt_tokens} tokens")


def _total_updates(config: TopdConfig, num_prompts: int, tasks: Tasks, state: RunState, say: Say) -> int:
    """`run.steps`, or those of `run.epochs`.

    After a checkpoint that was written with updates of another size these are the ones made, those of what is open,
    and those of the prompts that the epochs have left.
    """
    if config.run.steps is not None:
        return config.run.steps
    if state.total_updates == num_prompts * config.run.epochs // config.rollout.prompts_per_step:
        return state.total_updates
    num_left = max(num_prompts * config.run.epochs - tasks.position, 0)
    steps, unused = divmod(num_left, config.rollout.prompts_per_step)
    total = state.step + math.ceil(len(tasks) / config.batch_size) + steps
    if total < 1:
        raise ConfigError(
            f"{num_prompts} training prompts do not fill one update of rollout.prompts_per_step="
            f"{config.rollout.prompts_per_step}"
        )
    if unused:
        say(f"the last {unused} prompts of the last epoch do not fill an update and are left out")
    return total


def _find_checkpoint(config: TopdConfig, identity: Identity) -> tuple[RunState, Path] | None:
    """The checkpoint `run.resume` asks for. Raises ConfigError where it contradicts the run folder."""
    folder = config.run.folder.absolute()
    if config.run.resume == "never":
        if (metrics := folder / "metrics.jsonl").exists() and metrics.stat().st_size > 0:
            raise ConfigError(f"{config.run.folder} is in use and run.resume=never: choose another run.name")
        return None
    found = Checkpoints(folder / "checkpoints", config.run.keep_checkpoints, identity).load()
    if config.run.resume == "must" and found is None:
        raise ConfigError(f"{config.run.folder} holds no checkpoint and run.resume=must")
    return found
