"""Which failures are a task's own, and who tries it alone."""

from collections.abc import Collection, Iterator, Sequence

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


def take_idle(load: dict[int, int], alone: Collection[object]) -> Iterator[int]:
    """Take a worker out of `load` for each of `alone` while there are idle ones, and one more that is to become idle.

    The caller takes one out of `alone` for each worker it gets. Without the one more, workers that always get
    something new would never be idle.
    """
    while alone and load:
        worker = min(load, key=load.__getitem__)
        if load.pop(worker) > 0:
            return
        yield worker
