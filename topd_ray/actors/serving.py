"""What a rollout worker's threads share: the requests and weights that wait, and whose turn the engine is.

One thread serves: it alone steps the engine, and takes what the others left between two steps. While it has nothing to
do it sleeps, and others may use the engine for a while (evaluation, verification).
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from topd_ray.errors import RolloutError, WeightSyncError
from topd_ray.types import RolloutRequest, Trajectory
from topd_ray.weights.bundle import Delivery, IpcDelivery, Named
from topd_ray.weights.checksum import WeightReceipt

HANDOVER_SHARE = 0.1
"""Largest share of a rollout worker's time that goes into handing trajectories on: a handover waits, and gathers
company, until the time since the last one makes up for what that one cost, Ray's store included. In one process
(`--inline`) that is also the teacher's look-ahead: nothing is written meanwhile, so more company costs no time."""

Weights = Iterable[Named] | Delivery | IpcDelivery


class ServedEngine(Protocol):
    """What the serving thread needs of `engines.rollout.RolloutEngine`."""

    @property
    def policy_version(self) -> int: ...

    @property
    def is_whole(self) -> bool: ...

    @property
    def num_running(self) -> int: ...

    def add(self, requests: Sequence[RolloutRequest]) -> None: ...

    def step(self) -> list[Trajectory]: ...

    def abandon(self) -> None: ...

    def generate_by_step(self, requests: Sequence[RolloutRequest]) -> Iterator[list[Trajectory]]: ...

    def update_weights(self, version: int, weights: Weights, *, interrupt: bool) -> WeightReceipt: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """Requests that came together."""

    requests: Sequence[RolloutRequest]
    whole: bool


@dataclass(slots=True, kw_only=True, eq=False)
class Update:
    """A policy that waits to be served, and what became of it."""

    version: int
    weights: Weights
    interrupt: bool
    outcome: WeightReceipt | Exception | None = None
    overtaken_by: "Update | None" = None

    @property
    def last(self) -> "Update":
        """The update that is applied in place of this one, or this one."""
        return self if self.overtaken_by is None else self.overtaken_by.last


class Handover:
    """Trajectories that wait to leave together."""

    def __init__(self, *, is_whole: bool = False) -> None:
        self.is_whole = is_whole
        """All wait for the last one"""
        self.finished: list[Trajectory] = []
        self._next = 0.0

    def is_due(self, *, is_last: bool) -> bool:
        """Whether some wait and may leave: after the last one at once."""
        return bool(self.finished) and (is_last or (not self.is_whole and time.monotonic() >= self._next))

    def hand_over(self) -> Iterator[list[Trajectory]]:
        """All that wait, in the order of their ids; what the receiver takes is what they cost (seconds)."""
        started = time.monotonic()
        leaving, self.finished = sorted(self.finished, key=lambda one: one.trajectory_id), []
        yield leaving
        ended = time.monotonic()
        self._next = ended + (ended - started) / HANDOVER_SHARE


class RolloutServer:
    """One engine for several threads. Every method but `serve` may be called by any of them, at any time."""

    def __init__(self, engine: ServedEngine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._user: int | None = None
        self._is_serving = False
        self._is_stopping = False
        self._submissions: deque[Submission] = deque()
        self._update: Update | None = None
        self._receipt: WeightReceipt | None = None
        self._handover = Handover()

    def submit(self, requests: Sequence[RolloutRequest], *, whole: bool) -> None:
        """Have `serve` write these, once what came before has entered the engine; returns at once.

        With `whole` they run alone and leave together.
        """
        if requests:
            with self._changed:
                self._submissions.append(Submission(requests=requests, whole=whole))
                self._changed.notify_all()

    def stop(self) -> None:
        """End `serve`, or the next one if none is on, at the next step; what it has not handed over is dropped."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()

    def serve(self) -> Iterator[list[Trajectory]]:
        """Write what is submitted and yield finished trajectories, until `stop`.

        Whatever ends it, an error of the engine or a failed update that leaves no policy to serve included, all
        requests are forgotten; then it may be called again. Raises RolloutError if another thread serves.
        """
        with self._changed:
            if self._is_serving:
                raise RolloutError("this worker is served already: end that stream with stop() before another one")
            self._is_serving = True
        try:
            while self._wait_for_work():
                with self._turn_taken():
                    yield from self._write()
        finally:
            with self._changed:
                self._is_serving = self._is_stopping = False
                self._submissions.clear()
                self._changed.notify_all()

    def generate(self, requests: Sequence[RolloutRequest], *, whole: bool) -> Iterator[list[Trajectory]]:
        """Write these and nothing else, in this thread; yield as `serve` does."""
        handover = Handover(is_whole=whole)
        with self.turn():
            for step in self._engine.generate_by_step(requests):
                handover.finished += step
                if handover.is_due(is_last=False):
                    yield from handover.hand_over()
            if handover.is_due(is_last=True):
                yield from handover.hand_over()

    def update_weights(
        self, version: int, fetch: Callable[[], Weights | None], *, interrupt: bool
    ) -> WeightReceipt | None:
        """Serve `version` from now on; returns when the engine does.

        The weights are fetched in this thread. The serving thread loads them between two steps: with `interrupt` the
        next two, else when nothing runs any more, and until then no submission enters. Where nobody serves, this
        thread loads them. An update that a newer one overtakes before it is loaded has the newer one's outcome, or None
        if it could not even be fetched any more. Raises WeightSyncError for an older version than the one served, and
        what the engine raises.
        """
        if version < self._engine.policy_version:
            raise WeightSyncError(
                f"version {version} of the weights came late: version {self._engine.policy_version} is served already"
            )
        weights = fetch()
        if weights is None:
            return None
        update = Update(version=version, weights=weights, interrupt=interrupt)
        del weights  # they belong to the update, which drops them when it is overtaken
        with self._changed:
            self._offer(update)
            self._changed.notify_all()
            self._changed.wait_for(lambda: update.last.outcome is not None or self._may_take_turn_unserved())
            loads_here = update.last.outcome is None
            if loads_here:
                outer, self._user = self._user, threading.get_ident()
        if loads_here:
            with self._turn_taken(then=outer):
                self._load(at_once=True)
        outcome = update.last.outcome
        if isinstance(outcome, WeightReceipt):
            return outcome
        assert outcome is not None, "an update that was waited for has an outcome"
        raise outcome

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The engine for this thread alone. Waits until nobody else works with it."""
        with self._changed:
            self._changed.wait_for(self._may_take_turn)
            outer, self._user = self._user, threading.get_ident()
        with self._turn_taken(then=outer):
            yield

    @contextmanager
    def _turn_taken(self, then: int | None = None) -> Iterator[None]:
        """Give the turn back, to the user `then` if this thread had it before."""
        try:
            yield
        finally:
            with self._changed:
                self._user = then
                self._changed.notify_all()

    def _may_take_turn(self) -> bool:
        """A thread that has it already must not wait for itself: its engine says what it does not do at a time."""
        return self._user in (None, threading.get_ident())

    def _may_take_turn_unserved(self) -> bool:
        return not self._is_serving and self._may_take_turn()

    def _wait_for_work(self) -> bool:
        """Sleep until there is work and the engine is free, and take the turn; False if the stream should end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_stopping or (self._user is None and bool(self._submissions or self._update))
            )
            if self._is_stopping:
                return False
            self._user = threading.get_ident()
            return True

    def _write(self) -> Iterator[list[Trajectory]]:
        """Step the engine until it has nothing to do."""
        engine, handover = self._engine, self._handover
        try:
            while not self._is_stopping:
                if handover.is_due(is_last=not engine.num_running):
                    yield from handover.hand_over()
                if (failure := self._load(at_once=False)) is not None and not engine.is_whole:
                    raise failure
                engine.add(self._entering())
                if not engine.num_running:
                    return
                handover.finished += engine.step()
        finally:
            handover.finished = []
            engine.abandon()

    def _entering(self) -> list[RolloutRequest]:
        """What enters the engine before its next step: nothing while weights wait."""
        entering: list[RolloutRequest] = []
        with self._changed:
            if not self._engine.num_running:
                self._handover.is_whole = False
            while self._submissions and self._update is None and not self._handover.is_whole:
                first = self._submissions[0]
                if first.whole and (entering or self._engine.num_running):
                    break
                self._handover.is_whole = first.whole
                entering += self._submissions.popleft().requests
        return entering

    def _offer(self, update: Update) -> None:
        """Let the newest update wait, and the others for its outcome."""
        older, newer = self._update, update
        if older is not None:
            if older.version > newer.version:
                older, newer = newer, older
            older.overtaken_by, older.weights = newer, ()
        self._update = newer

    def _load(self, *, at_once: bool) -> Exception | None:
        """Load the weights that wait, `at_once` or if nothing runs that should finish first.

        Returns what went wrong, which also goes to who sent the weights.
        """
        engine = self._engine
        with self._changed:
            update = self._update
            if update is None:
                return None
            is_late = update.version < engine.policy_version
            if not (at_once or update.interrupt or is_late) and engine.num_running:
                return None
            self._update = None
        outcome: WeightReceipt | Exception
        try:
            if is_late:  # it was fetched while a newer one was loaded
                assert self._receipt is not None
                outcome = self._receipt
            else:
                outcome = self._receipt = engine.update_weights(
                    update.version, update.weights, interrupt=update.interrupt
                )
        except Exception as error:  # the thread that waits for it raises it
            outcome = error
        with self._changed:
            update.outcome = outcome
            self._changed.notify_all()
        return outcome if isinstance(outcome, Exception) else None
