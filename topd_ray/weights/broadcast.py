"""Weights from learner rank 0 straight to all rollout workers at once: NCCL between GPUs, gloo between CPUs.

The backend is all that differs. NCCL has been seen between processes on one H200, and never between hosts (see
`weights.group`).

vLLM's own NCCL engine is not used. It takes part in one group that is fixed when it is set up, it loads a tensor as it
arrives, so that an engine whose update breaks off serves nothing any more, and a member that dies leaves the others
inside NCCL. Here workers come and go, and an engine is touched only once all of a version has come and is checked.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from topd_ray.weights.bundle import Delivery, Named, WeightsBundle
from topd_ray.weights.chunks import Chunk, Entry
from topd_ray.weights.group import Backend
from topd_ray.weights.parcels import Parcels, bundle_of, delivery_of
from topd_ray.weights.rounds import Desk, Octets, Receiver, Sender


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A chunk without its bytes."""

    entries: tuple[Entry, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a worker needs to ask for a version and to make it of what it gets."""

    desk: Desk
    parcels: Parcels
    """whose handles are Layouts"""


class BroadcastChannel:
    """Chunks by broadcast, from host memory to host memory.

    The learner packs a version into its own memory and goes on; a thread sends it to the workers that ask (`rounds`).
    Only the newest version can be had: a worker that asks for an older one is told so, and its next call is for the
    newer one. A worker receives in the thread that updates its weights, whatever its engine does meanwhile, so that
    nobody waits for a worker that first finishes what it writes.

    Host memory: one version in the learner's process and one in each worker's, another one while a newer version
    overtakes it. On a GPU: one chunk.
    """

    staging_device = "cpu"

    def __init__(
        self, *, backend: Backend, address: str, num_workers: int, chunk_bytes: int, timeout_seconds: float
    ) -> None:
        """`address` is this node's, where the others reach it. The sender's `backend` counts."""
        self._backend = backend
        self._address = address
        self._num_workers = num_workers
        self._chunk_bytes = chunk_bytes
        self._timeout_seconds = timeout_seconds
        self._receiver = Receiver(address=address, timeout_seconds=timeout_seconds)
        self._sender: Sender | None = None

    def send(self, version: int, tensors: Iterable[Named]) -> WeightsBundle:
        """Pack `tensors` and offer them; the version before is not sent any more."""
        if self._sender is None:
            self._sender = Sender(
                address=self._address,
                backend=self._backend,
                num_workers=self._num_workers,
                timeout_seconds=self._timeout_seconds,
            )
        desk = self._sender.desk
        self._sender.withdraw()
        pieces: list[Octets] = []

        def keep(chunk: Chunk) -> Layout:
            pieces.append(chunk.octets)
            return Layout(entries=chunk.entries, num_bytes=chunk.octets.nbytes)

        def content(parcels: Parcels) -> Any:
            return Offer(desk=desk, parcels=parcels)

        bundle = bundle_of(version, tensors, chunk_bytes=self._chunk_bytes, put=keep, content=content)
        self._sender.offer(version, pieces)
        return bundle

    def fetch(self, bundle: WeightsBundle) -> Delivery | None:
        """Receive all chunks, then check them; None if there is a newer version."""
        started = time.perf_counter()
        offer: Offer = bundle.content
        layouts: list[Layout] = [parcel.handle for parcel in offer.parcels]
        pieces = self._receiver.receive(offer.desk, bundle.version, [layout.num_bytes for layout in layouts])
        if pieces is None:
            return None
        chunks = [
            Chunk(version=bundle.version, index=index, entries=layout.entries, octets=octets)
            for index, (layout, octets) in enumerate(zip(layouts, pieces, strict=True))
        ]
        return delivery_of(bundle, offer.parcels, chunks, started=started)
