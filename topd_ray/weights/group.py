"""A process group for one thing: bytes from its rank 0 to all others, over gloo or NCCL.

It is made on a store of its own and is not torch's default group, which the learner ranks (DeepSpeed) and the engines
(vLLM) use for themselves. The NCCL side, written against torch 2.13's ProcessGroupNCCL, has run on one H200, beside
DeepSpeed's communicator of one rank and a vLLM engine, also when members left between two broadcasts or died, failed or
hung in the middle of one; never between several GPUs or hosts (docs/weights.md).
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import Store  # type: ignore[attr-defined]

Backend = Literal["gloo", "nccl"]
_log = logging.getLogger(__name__)


class Group:
    """One member's end. All members are made at the same time, with the same `store`, which no other group uses.

    `address` is this node's, for gloo; NCCL finds its own way. RuntimeError if a member does not come within
    `seconds`.
    """

    def __init__(self, backend: Backend, store: Store, *, rank: int, size: int, address: str, seconds: float) -> None:
        self._is_root = rank == 0
        self._on_gpu = backend == "nccl"
        self._timeout = timedelta(seconds=seconds)
        self._how: Any = dist.BroadcastOptions()
        self._how.rootRank = 0
        self._how.rootTensor = 0
        self._how.timeout = self._timeout
        _wait_for_all(store, rank, size, self._timeout)
        make = _nccl_group if self._on_gpu else _gloo_group
        self._group = make(store, rank, size, address, self._timeout)
        self._stream = _own_stream() if self._on_gpu else None

    def broadcast(self, octets: NDArray[np.uint8]) -> None:
        """Send rank 0's `octets`, or overwrite these with them: equally many on all ranks, and in host memory.

        RuntimeError if a member is gone, or not all take part within the group's seconds; close the group then.
        """
        host = torch.from_numpy(octets)
        if not self._on_gpu:
            self._group.broadcast([host], self._how).wait()
            return
        with torch.cuda.stream(self._stream):
            device = host.to("cuda") if self._is_root else torch.empty_like(host, device="cuda")
            self._group.broadcast([device], self._how).wait(self._timeout)  # with a limit, it waits on this thread too
            if not self._is_root:
                host.copy_(device)

    def close(self) -> None:
        """Break off what is on its way and hang up."""
        try:
            self._group.abort()
        except RuntimeError as error:  # NCCL takes longer than the group's seconds
            _log.warning("a group for weights could not be ended: %s", error)


def _wait_for_all(store: Store, rank: int, size: int, timeout: timedelta) -> None:
    """RuntimeError if a member does not come: NCCL would only notice in the first broadcast."""
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(size)], timeout)


def _gloo_group(store: Store, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl_group(store: Store, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    """Its communicator is made without blocking, in the first broadcast, so that a member that dies then is noticed.

    It gets no watchdog (that is what TORCH_NCCL_BLOCKING_WAIT means): after a broadcast that fails, torch's would sleep
    for a minute, in which the group cannot go, and have the monitor of the process's default group end the process.
    """
    if not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise RuntimeError("the learner sends its weights through NCCL, and this process sees no GPU")
    options: Any = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.config.blocking = 0
    seconds = max(1, int(timeout.total_seconds()))
    os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(seconds))  # torch reads it once, and later
    with _environment(TORCH_NCCL_BLOCKING_WAIT="1"):
        return dist.ProcessGroupNCCL(store, rank, size, options)


def _own_stream() -> torch.cuda.Stream:
    """Copies in line with nothing else would otherwise wait for what this GPU computes."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
