"""Who trains when: the parent lets one side make some updates, while the others wait."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection


@dataclass(slots=True, kw_only=True)
class Turn:
    """What a side did in one turn."""

    seconds: float = 0.0
    num_tokens: int = 0
    """response tokens that got a loss"""
    stages: dict[str, float] = field(default_factory=dict)
    """seconds by stage"""
    num_cut: int = 0
    """responses that the cap ended"""
    lengths: list[int] = field(default_factory=list)
    """of the responses (tokens), where the side knows them"""


class Turns:
    """A side's end; `descriptor` is that of the pipe to the parent."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._connection = Connection(descriptor)
        self._left = 0

    def start(self) -> None:
        """Say that everything is loaded and the first update could start, and wait for the first turn."""
        self._connection.send("ready")
        self._wait()

    def after_update(
        self, *, num_tokens: int, num_cut: int, stages: dict[str, float], lengths: Sequence[int] = ()
    ) -> None:
        """Call when an update is complete; waits where it was the turn's last."""
        self.turn.num_tokens += num_tokens
        self.turn.num_cut += num_cut
        self.turn.lengths += lengths
        for stage, seconds in stages.items():
            self.turn.stages[stage] = self.turn.stages.get(stage, 0.0) + seconds
        self._left -= 1
        if self._left == 0:
            self.turn.seconds = time.perf_counter() - self._started
            self._connection.send(asdict(self.turn))
            self._wait()

    def finish(self, accuracy: dict[str, float]) -> None:
        self._connection.send(accuracy)

    def _wait(self) -> None:
        """Until the parent grants the next turn; 0 lets a side go that has made all of its updates."""
        try:
            self._left = int(self._connection.recv())
        except EOFError:
            sys.exit("the parent is gone")
        self.turn = Turn()
        self._started = time.perf_counter()
