"""Counts what the driver receives from workers, to show that no payload passes through it."""

import io
import pickle
from typing import Any

import ray


class Traffic:
    """Bytes received by the driver (bytes), payload and messages apart.

    `payload_bytes` are array and Arrow buffers, those that pickle would send out of band; `message_bytes` is all the
    rest: counts, ids, handles, distances and metrics.
    """

    def __init__(self) -> None:
        self.payload_bytes = 0
        self.message_bytes = 0

    def count(self, message: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(message)
        self.payload_bytes += sum(buffer.raw().nbytes for buffer in buffers)
        self.message_bytes += stream.tell()


class _Pickler(pickle.Pickler):
    """Leaves handles alone: pickling an ObjectRef outside of a call would pin its object for good."""

    def persistent_id(self, obj: Any) -> str | None:
        return obj.hex() if isinstance(obj, ray.ObjectRef) else None
