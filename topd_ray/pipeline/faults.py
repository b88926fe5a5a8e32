"""Which failures are a task's own."""

from collections.abc import Sequence

from topd_ray.config.schema import FaultsConfig
from topd_ray.pipeline.tasks import Task

LONE_ATTEMPTS = 2
"""The last of `faults.max_attempts` are made with a task alone on a worker, so that no other is to blame."""


class Blame:
    """Counts the failures of workers that tasks were part of."""

    def __init__(self, config: FaultsConfig) -> None:
        self._max_attempts = config.max_attempts

    def is_lone(self, task: Task) -> bool:
        """Whether a worker that takes `task` may have nothing else."""
        return task.num_failures >= self._max_attempts - LONE_ATTEMPTS

    def put_on(self, tasks: Sequence[Task]) -> list[Task]:
        """A worker failed with `tasks`; returns those that have had all their attempts."""
        for task in tasks:
            task.num_failures += 1
        return [task for task in tasks if task.num_failures >= self._max_attempts]
