"""Wall time of the stages of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from topd_ray.types import Metric


class Stopwatch:
    """Seconds spent in named stages, as metrics `seconds/<stage>`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - started

    def metrics(self) -> list[Metric]:
        return [Metric(key=f"seconds/{stage}", sum=seconds) for stage, seconds in self._seconds.items()]
