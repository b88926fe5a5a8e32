"""Losses after which all workers start again: how many are too many, and which batch they happen to."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence

from topd_ray.actors.restarts import RestartBudget
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import WorkerLostError
from topd_ray.pipeline.checkpoint import write_whole
from topd_ray.pipeline.tasks import Task

NAMED = 8
"""Trajectories of a batch that a message names."""


class Setbacks:
    """Of all sessions of one process. Only an update that none of them has made before is progress."""

    def __init__(self, config: TopdConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = RestartBudget(config.faults, clock)
        self._folder = config.run.folder.absolute() / "failed_batch"
        self._newest = 0
        self._num_losses: Counter[int] = Counter()
        """by the update that the learner was making"""

    def made(self, update: int) -> None:
        """An update is complete."""
        if update > self._newest:
            self._newest = update
            self.budget.progressed()

    def while_making(self, update: int, batch: Sequence[Task], error: WorkerLostError) -> WorkerLostError:
        """`error`, with the update that the learner was making of `batch`, which is listed if that was one too many."""
        self._num_losses[update] += 1
        names = ", ".join([*(task.trajectory_id for task in batch[:NAMED]), *(["..."] if len(batch) > NAMED else [])])
        listed = "" if self.budget.has_room else f"; {self._list(update, batch)}"
        return WorkerLostError(
            f"{error}; it was loss {self._num_losses[update]} while the learner made update {update} of {len(batch)} "
            f"trajectories (prompt/epoch/sample): {names}{listed}"
        )

    def _list(self, update: int, batch: Sequence[Task]) -> str:
        """Write a line for each trajectory, and say where."""
        path = self._folder / f"update-{update:06d}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(json.dumps(_entry(task)) + "\n" for task in batch))
        except OSError as reason:  # a full disk must not hide the loss
            return f"they could not be listed: {reason}"
        return f"all are listed in {path}"


def _entry(task: Task) -> dict[str, object]:
    request = task.request
    return {
        "trajectory_id": task.trajectory_id,
        "prompt_id": request.prompt.prompt_id,
        "epoch": request.epoch,
        "sample_index": request.sample_index,
        "prompt_token_ids": list(request.prompt.token_ids),
    }
