"""Ctrl-C and SIGTERM: the run stops at the next safe moment, with a checkpoint."""

import signal
import threading
from types import FrameType, TracebackType

from topd_ray.errors import RunInterrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While entered, remembers the first signal; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal() returned

    def check(self) -> None:
        """Raise RunInterrupted if a signal has come."""
        if self.signal is not None:
            raise RunInterrupted(f"stopped by {self.signal.name}")

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for one in SIGNALS:
            signal.signal(one, signal.SIG_DFL)
