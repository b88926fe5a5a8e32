"""Wall time of the stages of a step, and of workers that have nothing to do."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from topd_ray.types import Metric


class Stopwatch:
    """Seconds spent in named stages, as metrics `seconds/<stage>`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._started: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        self.start(stage)
        try:
            yield
        finally:
            self.stop(stage)

    def start(self, stage: str) -> None:
        """Begin a stage; one that runs already goes on."""
        self._started.setdefault(stage, self._clock())

    def stop(self, stage: str) -> None:
        """End a stage; one that does not run stays as it is."""
        if stage in self._started:
            elapsed = self._clock() - self._started.pop(stage)
            self._seconds[stage] = self._seconds.get(stage, 0.0) + elapsed

    def metrics(self) -> list[Metric]:
        """Of all stages that have ended."""
        return [Metric(key=f"seconds/{stage}", sum=seconds) for stage, seconds in self._seconds.items()]

    def take(self) -> list[Metric]:
        """`metrics`, and forget them."""
        taken = self.metrics()
        self._seconds.clear()
        return taken


class IdleTime:
    """Seconds that workers of a kind have nothing to do; at first none has."""

    def __init__(self, num_workers: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._idle_since: dict[int, float] = dict.fromkeys(range(num_workers), clock())
        self._num_workers = num_workers
        self._seconds = 0.0

    def busy(self, worker: int) -> None:
        if worker in self._idle_since:
            self._seconds += self._clock() - self._idle_since.pop(worker)

    def idle(self, worker: int) -> None:
        self._idle_since.setdefault(worker, self._clock())

    def pause(self) -> None:
        """Leave out what comes from now on, until `go_on`."""
        now = self._clock()
        self._seconds += sum(now - since for since in self._idle_since.values())
        self._idle_since = dict.fromkeys(self._idle_since, now)

    def go_on(self) -> None:
        """Leave out what came since the last `pause` or `take`, or since the beginning."""
        self._idle_since = dict.fromkeys(self._idle_since, self._clock())

    def take(self) -> float:
        """Mean over the workers since the last call (seconds)."""
        self.pause()
        seconds, self._seconds = self._seconds, 0.0
        return seconds / self._num_workers
