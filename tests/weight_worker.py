"""Rollout workers without engines, as processes, that take weights by broadcast and fail in the middle when told to."""

import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.one_gpu import pose_as_a_host
from topd_ray.errors import WeightSyncError
from topd_ray.weights.broadcast import BroadcastChannel
from topd_ray.weights.bundle import Named, WeightsBundle
from topd_ray.weights.checksum import fingerprint
from topd_ray.weights.group import Backend, Group

TIMEOUTS: dict[Backend, float] = {"gloo": 8.0, "nccl": 40.0}
"""Of which a worker that hangs may take a quarter, and NCCL some seconds to make a group."""
SECONDS = 60.0
NUM_PIECES = 12
PIECE_BYTES: dict[Backend, int] = {"gloo": 2**20, "nccl": 2**24}
"""What is sent after a worker hangs must not fit into the buffers on its way: NCCL's and the sockets' hold some MiB."""
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def tensors(version: int, backend: Backend) -> list[Named]:
    """A version of 12 chunks."""
    generator = torch.Generator().manual_seed(version)
    size = PIECE_BYTES[backend] // 4
    return [(f"layer.{i}", torch.randn(size, generator=generator)) for i in range(NUM_PIECES)]


def open_end(backend: Backend, timeout_seconds: float | None = None) -> BroadcastChannel:
    pose_as_a_host()
    return BroadcastChannel(
        backend=backend,
        address="127.0.0.1",
        num_workers=2,
        chunk_bytes=PIECE_BYTES[backend],
        timeout_seconds=timeout_seconds or TIMEOUTS[backend],
    )


def work(asked: Connection, backend: Backend) -> None:
    """Fetch the bundles that are asked for, and say what came.

    If told to, `die` or `stop` before the fourth piece, or `fail` in every round.
    """
    channel = open_end(backend)
    broadcast = Group.broadcast
    while True:
        bundle, order = asked.recv()
        pieces = iter(range(NUM_PIECES))

        def obey(group: Group, octets: Any, pieces: Iterator[int] = pieces, order: str = order) -> None:
            if order == "fail":
                raise RuntimeError("told to")
            if next(pieces, 0) == 3 and order:
                os._exit(1) if order == "die" else signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            broadcast(group, octets)

        Group.broadcast = obey  # type: ignore[method-assign]
        started = time.monotonic()
        try:
            delivery = channel.fetch(bundle)
            found: Any = delivery and fingerprint(delivery.tensors).checksum
        except WeightSyncError as error:
            found = str(error)
        asked.send((found, time.monotonic() - started))


class Worker:
    """One of them, seen from the learner's process."""

    def __init__(self, backend: Backend) -> None:
        self._end, other = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=work, args=(other, backend), daemon=True)
        self._process.start()

    def ask(self, bundle: WeightsBundle, order: str = "") -> None:
        self._end.send((bundle, order))

    def answer(self) -> tuple[Any, float]:
        """The checksum of what came, None if it was overtaken, or what went wrong; and the seconds it took."""
        assert self._end.poll(SECONDS)
        found: tuple[Any, float] = self._end.recv()
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
