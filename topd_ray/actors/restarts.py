"""How many restarts are too many."""

import math
import time
from collections import deque
from collections.abc import Callable

from topd_ray.config.schema import FaultsConfig


class RestartBudget:
    """At most `faults.max_restarts`: each is forgotten after `faults.window_seconds`, or once an input is given up that
    may have been the reason; but only if there was progress since."""

    def __init__(self, config: FaultsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._restarts: deque[float] = deque()
        self._progressed_at = self._excused_at = -math.inf
        self.num_spent = 0
        """restarts of all time"""

    def progressed(self) -> None:
        """What was restarted has done some of its work."""
        self._progressed_at = self._clock()

    def excuse(self) -> None:
        """An input is given up, for which what is restarted may have failed so far."""
        self._excused_at = self._clock()

    @property
    def has_room(self) -> bool:
        """Whether there may be another restart now."""
        forgotten = min(max(self._window_start, self._excused_at), self._progressed_at)
        while self._restarts and self._restarts[0] <= forgotten:
            self._restarts.popleft()
        return len(self._restarts) < self._config.max_restarts

    def spend(self) -> bool:
        """Count a restart; false if it is one too many."""
        has_room = self.has_room
        self._restarts.append(self._clock())
        self.num_spent += 1
        return has_room

    @property
    def _window_start(self) -> float:
        return self._clock() - self._config.window_seconds

    def __str__(self) -> str:
        start = self._window_start
        is_slow = any(restart <= start for restart in self._restarts)  # and remembered for the lack of progress
        reason = "without progress" if is_slow else f"within faults.window_seconds={self._config.window_seconds:g}"
        return f"more than faults.max_restarts={self._config.max_restarts} times {reason}"
