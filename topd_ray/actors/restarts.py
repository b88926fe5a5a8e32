"""How many restarts are too many."""

import time
from collections import deque
from collections.abc import Callable

from topd_ray.config.schema import FaultsConfig


class RestartBudget:
    """At most `faults.max_restarts` within `faults.window_seconds`."""

    def __init__(self, config: FaultsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._restarts: deque[float] = deque()
        self.num_spent = 0
        """restarts of all time"""

    @property
    def has_room(self) -> bool:
        """Whether there may be another restart now."""
        oldest = self._clock() - self._config.window_seconds
        while self._restarts and self._restarts[0] <= oldest:
            self._restarts.popleft()
        return len(self._restarts) < self._config.max_restarts

    def spend(self) -> bool:
        """Count a restart; false if it is one too many."""
        has_room = self.has_room
        self._restarts.append(self._clock())
        self.num_spent += 1
        return has_room

    def __str__(self) -> str:
        return (
            f"more than faults.max_restarts={self._config.max_restarts} times within "
            f"faults.window_seconds={self._config.window_seconds:g}"
        )
