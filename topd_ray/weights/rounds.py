"""Broadcasts by request: each goes to the rollout workers that ask for a version, however many these are by then.

A worker that wants a version asks for it at a store that learner rank 0 keeps, and is told its seat in a group. A
thread of the learner's process (the sender) gathers the requests, seats all who asked, and broadcasts: a round. So
nobody has to know who lives. A worker that is lost does not ask again; one that is made anew asks when it is there, and
has a round of its own; one whose round failed because another died in it asks once more. After a failure a version is
sent to one worker at a time, so that whoever makes rounds fail does so alone.

A group serves round after round as long as the same workers ask, each of them with its end of it still open. Otherwise
a new group is made, of a new generation.
"""

import atexit
import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import numpy as np
from numpy.typing import NDArray
from torch.distributed import PrefixStore, QueueEmptyError, Store, TCPStore  # type: ignore[attr-defined]

from topd_ray.errors import WeightSyncError
from topd_ray.weights.group import Backend, Group

GATHER_SECONDS = 1.0
"""How long the sender waits for the other workers once one has asked."""
PAUSE_SECONDS = 1.0
"""How long a worker whose round failed waits before it asks again."""
POLL_SECONDS = 0.02
CLOSE_SECONDS = 5.0
"""How long a closing sender waits for its thread."""
SHARE_OF_TIMEOUT = 0.25
"""Largest wait inside a round, for the meeting or for one piece, over `weights.timeout_seconds`: after a round with a
worker that hangs there has to be time for one without it."""
REQUESTS = "requests"

_log = logging.getLogger(__name__)
Octets = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """Where requests are made."""

    address: str
    port: int
    backend: Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A worker wants a version."""

    worker: str
    version: int
    holds: int | None
    """generation of the group whose end it still has"""
    answer: str
    """key under which it looks for its seat"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Place of a worker in the group of a round."""

    generation: int
    rank: int
    size: int


class Sender:
    """The learner's end, with a thread of its own: the learner goes on to its next update meanwhile."""

    def __init__(self, *, address: str, backend: Backend, num_workers: int, timeout_seconds: float) -> None:
        listener = socket.create_server((address, 0))
        self.desk = Desk(address=address, port=listener.getsockname()[1], backend=backend)
        self._store = TCPStore(
            address,
            self.desk.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_seconds),
            master_listen_fd=listener.detach(),
        )
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._offer: tuple[int, Sequence[Octets]] | None = None
        self._group: Group | None = None
        self._generation = 0
        self._members: list[str] = []
        self._failed: int | None = None
        """a version that is sent to one worker at a time"""
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="broadcast-weights", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def offer(self, version: int, pieces: Sequence[Octets]) -> None:
        """Broadcast `pieces` to whoever asks for `version`. Do not write to them any more.

        Raises WeightSyncError if the thread has failed.
        """
        if not self._thread.is_alive():
            raise WeightSyncError("the thread that sends the weights has failed; the learner's log says why")
        self._offer = version, pieces

    def withdraw(self) -> None:
        """A newer version is being packed: tell whoever asks for the last one, and let its memory go."""
        self._offer = None

    def close(self) -> None:
        """End the thread, and break off what it is sending.

        An interpreter that ends while the thread is in the store aborts the process, so it calls this at its end.
        """
        self._is_closed.set()
        if (group := self._group) is not None:
            group.close()
        self._thread.join(CLOSE_SECONDS)
        atexit.unregister(self.close)

    def _serve(self) -> None:
        waiting: dict[str, Request] = {}
        gathering_since = 0.0
        while not self._is_closed.is_set():
            if not waiting:
                gathering_since = time.monotonic()
            self._take_requests(waiting)
            version, pieces = self._offer or (None, ())
            size = 1 if version == self._failed else self._num_workers
            is_over = time.monotonic() > gathering_since + GATHER_SECONDS
            if waiting and (is_over or len(waiting) >= size):
                asked = [waiting.pop(worker) for worker in list(waiting)[:size]]
                for late in [one for one in asked if one.version != version]:
                    self._answer(late, None)
                seated = [one for one in asked if one.version == version]
                if seated and not self._round(sorted(seated, key=lambda one: one.worker), pieces):
                    self._failed = version
            else:
                self._is_closed.wait(POLL_SECONDS)
            del pieces

    def _take_requests(self, waiting: dict[str, Request]) -> None:
        """Of two requests of one worker the first has been given up."""
        while True:
            try:
                request = Request(**json.loads(self._store.queue_pop(REQUESTS, block=False)))
            except QueueEmptyError:
                return
            waiting[request.worker] = request

    def _round(self, requests: Sequence[Request], pieces: Sequence[Octets]) -> bool:
        """One broadcast; whether it worked, as far as can be seen from here: whom it did not reach asks again."""
        members = [one.worker for one in requests]
        if any(one.holds != self._generation for one in requests) or members != self._members:
            self._hang_up()
        if self._group is None:
            self._generation += 1
            self._members = members
        seats = [Seat(generation=self._generation, rank=1 + i, size=1 + len(members)) for i in range(len(members))]
        for request, seat in zip(requests, seats, strict=True):
            self._answer(request, seat)
        try:
            if self._group is None:
                seat = replace(seats[0], rank=0)
                self._group = meet(self._store, self.desk, seat, self.desk.address, self._timeout_seconds)
            for piece in pieces:
                self._group.broadcast(piece)
        except RuntimeError as error:
            _log.warning("a broadcast of weights to %d workers failed: %s", len(members), error)
            self._hang_up()
            return False
        return True

    def _answer(self, request: Request, seat: Seat | None) -> None:
        self._store.set(request.answer, json.dumps(None if seat is None else asdict(seat)))

    def _hang_up(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


class Receiver:
    """A rollout worker's end. Several threads may call it, one after the other has its turn."""

    def __init__(self, *, address: str, timeout_seconds: float) -> None:
        self._address = address
        self._seconds = timeout_seconds
        self._name = uuid.uuid4().hex
        self._turn = threading.Lock()
        self._store: Store | None = None
        self._group: Group | None = None
        self._generation: int | None = None

    def receive(self, desk: Desk, version: int, sizes: Sequence[int]) -> list[Octets] | None:
        """The pieces of `version`, in host memory of this process; None if the learner offers a newer version.

        A round that fails is followed by another, for `weights.timeout_seconds`. Raises WeightSyncError after that.
        """
        with self._turn:
            deadline = time.monotonic() + self._seconds
            while (seat := self._ask(desk, version, deadline)) is not None:
                try:
                    return self._take_part(desk, seat, sizes)
                except RuntimeError as error:
                    self._hang_up()
                    if time.monotonic() > deadline:
                        raise WeightSyncError(
                            f"version {version} of the weights could not be received within "
                            f"weights.timeout_seconds={self._seconds:g} s: {error}"
                        ) from error
                    _log.warning("a broadcast of version %d of the weights failed: %s", version, error)
                time.sleep(PAUSE_SECONDS)
            return None

    def _ask(self, desk: Desk, version: int, deadline: float) -> Seat | None:
        """A seat in the next round; None for an old version. WeightSyncError if no answer comes in time."""
        answer = f"answer/{uuid.uuid4().hex}"
        request = Request(worker=self._name, version=version, holds=self._generation, answer=answer)
        try:
            if self._store is None:
                self._store = TCPStore(
                    desk.address,
                    desk.port,
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=self._seconds),
                )
            self._store.queue_push(REQUESTS, json.dumps(asdict(request)))
            left = max(deadline - time.monotonic(), SHARE_OF_TIMEOUT * self._seconds)
            self._store.wait([answer], timedelta(seconds=left))
            seat = json.loads(self._store.get(answer))
            self._store.delete_key(answer)
        except RuntimeError as error:
            raise WeightSyncError(
                f"the learner at {desk.address}:{desk.port} did not begin to send version {version} of the weights "
                f"within weights.timeout_seconds={self._seconds:g} s: {error}"
            ) from error
        return None if seat is None else Seat(**seat)

    def _take_part(self, desk: Desk, seat: Seat, sizes: Sequence[int]) -> list[Octets]:
        assert self._store is not None, "the seat came through it"
        if self._group is None or self._generation != seat.generation:
            self._hang_up()
            self._group = meet(self._store, desk, seat, self._address, self._seconds)
            self._generation = seat.generation
        pieces = [np.empty(size, np.uint8) for size in sizes]
        for piece in pieces:
            self._group.broadcast(piece)
        return pieces

    def _hang_up(self) -> None:
        self._generation = None
        if self._group is not None:
            self._group.close()
            self._group = None


def meet(store: Store, desk: Desk, seat: Seat, address: str, timeout_seconds: float) -> Group:
    """The group of all with a seat of one generation."""
    return Group(
        desk.backend,
        PrefixStore(f"group/{seat.generation}", store),
        rank=seat.rank,
        size=seat.size,
        address=address,
        seconds=timeout_seconds * SHARE_OF_TIMEOUT,
    )
