"""What a rollout worker has written and the driver has not read yet."""

import threading

from topd_ray.actors.messages import RolloutChunk


class Outbox:
    """One thread puts chunks and says how it ended, another takes all there are and at last that end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._chunks: list[RolloutChunk] = []
        self._is_closed = False
        self._error: BaseException | None = None
        self.is_spent = False
        """The end has been taken"""

    @classmethod
    def spent(cls) -> "Outbox":
        """One that nothing comes from any more."""
        outbox = cls()
        outbox.is_spent = True
        return outbox

    def put(self, chunk: RolloutChunk) -> None:
        with self._changed:
            self._chunks.append(chunk)
            self._changed.notify()

    def close(self, error: BaseException | None = None) -> None:
        """Nothing more will be put, because of `error` or because it was asked for."""
        with self._changed:
            self._is_closed, self._error = True, error
            self._changed.notify()

    def take(self) -> list[RolloutChunk]:
        """All chunks, as soon as there are some; none at the end. Raises the error that it was closed with instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self._is_closed)
            taken, self._chunks = self._chunks, []
            if not taken:
                self.is_spent = True
                if self._error is not None:
                    raise self._error
            return taken
