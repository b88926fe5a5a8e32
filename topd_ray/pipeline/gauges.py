"""What a flow measures between two updates."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from topd_ray.actors.messages import GuidedItem
from topd_ray.metrics.timing import IdleTime, Stopwatch
from topd_ray.types import Metric


class Gauges:
    """Metrics of workers as they come in, and the driver's own: stages, waiting times, ages, restarts."""

    def __init__(self, num_rollouts: int, num_teachers: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.watch = Stopwatch(clock)
        numbers = {"rollout": num_rollouts, "teacher": num_teachers, "learner": 1}
        self._idle = {role: IdleTime(number, clock) for role, number in numbers.items()}
        self._tokens = {"rollout/tokens": 0, "teacher/tokens": 0}
        self._restarts = {"faults/restarts_rollout": 0, "faults/restarts_teacher": 0}
        self._metrics: list[Metric] = []

    def add(self, metrics: Iterable[Metric]) -> None:
        """What workers report."""
        self._metrics += metrics

    def busy(self, role: str, worker: int) -> None:
        self._idle[role].busy(worker)

    def idle(self, role: str, worker: int) -> None:
        self._idle[role].idle(worker)

    def pause(self) -> None:
        """Nobody waits from now on: workers evaluate or save, or stand by while others do."""
        for idle in self._idle.values():
            idle.pause()

    def go_on(self) -> None:
        """Leave out the time since the last `pause` or `take`."""
        for idle in self._idle.values():
            idle.go_on()

    def count_tokens(self, role: str, number: int) -> None:
        """Response tokens that a worker of `role` is done with."""
        self._tokens[f"{role}/tokens"] += number

    def count_restart(self, role: str) -> None:
        self._restarts[f"faults/restarts_{role}"] += 1

    def trained(self, items: Sequence[GuidedItem], version: int) -> None:
        """How many updates the policies of `items` were behind the learner's `version`."""
        ages = [version - item.policy_version for item in items]
        self._metrics.append(Metric(key="staleness/mean", sum=sum(ages), count=len(ages)))
        self._metrics.append(Metric(key="staleness/max", sum=max(ages)))

    def take(self, figures: Mapping[str, float]) -> tuple[Metric, ...]:
        """`figures`, and everything since the last call; restarts of all time."""
        waiting = {f"waiting/{role}": idle.take() for role, idle in self._idle.items()}
        own = {**figures, **self._tokens, **self._restarts, **waiting}
        metrics = (*self._metrics, *self.watch.take(), *(Metric(key=key, sum=value) for key, value in own.items()))
        self._metrics = []
        self._tokens = dict.fromkeys(self._tokens, 0)
        return metrics
