"""Counts what the driver receives from workers, to show that no payload passes through it."""

import io
import pickle
from typing import Any

import ray
import torch


class Traffic:
    """Bytes received by the driver (bytes), payload and messages apart.

    `payload_bytes` are NumPy, torch and Arrow buffers and raw bytes; `message_bytes` is all the rest: counts, ids,
    handles, distances and metrics.
    """

    def __init__(self) -> None:
        self.payload_bytes = 0
        self.message_bytes = 0

    def count(self, message: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        pickler = _Pickler(stream, protocol=5, buffer_callback=buffers.append)
        pickler.dump(message)
        self.payload_bytes += pickler.inline_bytes + sum(buffer.raw().nbytes for buffer in buffers)
        self.message_bytes += stream.tell()


class _Pickler(pickle.Pickler):
    """Leaves handles alone: pickling an ObjectRef outside of a call would pin its object for good.

    Counts apart what pickle would write in line: tensors and raw bytes (bytes).
    """

    inline_bytes = 0

    def persistent_id(self, obj: Any) -> str | None:
        if isinstance(obj, ray.ObjectRef):
            return obj.hex()
        if isinstance(obj, torch.Tensor):
            self.inline_bytes += obj.nbytes
            return "tensor"
        if isinstance(obj, (bytes, bytearray)):
            self.inline_bytes += len(obj)
            return "bytes"
        return None
