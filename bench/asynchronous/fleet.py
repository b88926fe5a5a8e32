"""A fleet whose engines sleep, in real time, so that the driver's own time counts.

Engines keep their own time: a timer that the driver comes late for is worked off as of when it was due, as an engine
in another process would have done. What the driver learns of it, it learns late.
"""

import heapq
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count

from bench.asynchronous.workload import BYTES_PER_TOKEN, SEED, WINDOWS_PER_TOKEN, OnNewWeights, Workload
from topd_ray.actors.events import Event, Guided, Learned, Published, Written
from topd_ray.actors.messages import GuidedChunk, GuidedItem, RolloutChunk
from topd_ray.types import RolloutRequest, UpdateReport

POLL_SECONDS = 0.5


class Timers:
    """What engines have to do, and when."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = count()
        self.now = 0.0
        """of the latest action"""

    def at(self, due: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._heap, (due, next(self._numbers), action))

    def run_until(self, now: float) -> None:
        """Every action that is due, in order, as of its own time."""
        while self._heap and self._heap[0][0] <= now:
            self.now, _, action = heapq.heappop(self._heap)
            action(self.now)

    @property
    def next_due(self) -> float:
        return self._heap[0][0] if self._heap else float("inf")


class SleepingRollout:
    """One engine with continuous batching: all running sequences advance together, the slower the more they are."""

    def __init__(
        self, worker: int, workload: Workload, mode: OnNewWeights, timers: Timers, tell: Callable[[Event], None]
    ) -> None:
        self._worker = worker
        self._workload = workload
        self._mode = mode
        self._timers = timers
        self._tell = tell
        self._waiting: deque[RolloutRequest] = deque()
        self._running: list[tuple[float, int, int, RolloutRequest]] = []
        """(value of `_tokens` when it ends, number, version of its first token, request)"""
        self._numbers = count()
        self._tokens = 0.0
        """that a sequence which ran from the beginning would have"""
        self._time = 0.0
        """of `_tokens`; in the future while the engine stands still"""
        self._version = 0
        self._arrived: int | None = None
        self._alarm = 0

    def write(self, requests: Sequence[RolloutRequest], now: float) -> None:
        self._waiting.extend(requests)
        self._go_on(now)

    def take_weights(self, version: int, now: float) -> None:
        """Serve `version`: now, or once what is being written is at its end."""
        self._arrived = version
        if self._mode == "interrupt" or not self._running:
            self._swap(now)
        self._go_on(now)

    def _swap(self, now: float) -> None:
        assert self._arrived is not None
        self._advance(now)
        self._version, self._arrived = self._arrived, None
        self._time = max(self._time, now) + self._workload.swap_seconds
        event = Published(worker=self._worker, version=self._version)
        self._timers.at(self._time, lambda _: self._tell(event))

    def _go_on(self, now: float) -> None:
        self._advance(now)
        while self._waiting and self._arrived is None and len(self._running) < self._workload.num_slots:
            request = self._waiting.popleft()
            end = self._tokens + self._workload.length(request)
            heapq.heappush(self._running, (end, next(self._numbers), self._version, request))
        self._alarm += 1
        if self._running:
            alarm = self._alarm
            due = self._time + (self._running[0][0] - self._tokens) * self._token_seconds()
            self._timers.at(max(due, now), lambda now: self._ring(alarm, now))

    def _ring(self, alarm: int, now: float) -> None:
        """A sequence has come to its end, unless the engine's load has changed since the alarm was set."""
        if alarm != self._alarm:
            return
        self._advance(now)
        end, _, version, request = heapq.heappop(self._running)
        self._tokens = max(self._tokens, end)
        self._tell(Written(worker=self._worker, chunk=chunk_of(request, version, self._workload.length(request))))
        if self._arrived is not None and not self._running:
            self._swap(now)
        self._go_on(now)

    def _advance(self, now: float) -> None:
        if now > self._time:
            if self._running:
                self._tokens += (now - self._time) / self._token_seconds()
            self._time = now

    def _token_seconds(self) -> float:
        return self._workload.step_seconds + self._workload.sequence_seconds * len(self._running)


def chunk_of(request: RolloutRequest, version: int, num_tokens: int) -> RolloutChunk:
    """Each trajectory comes alone: the most that a driver can get to do."""
    return RolloutChunk(
        handle=None,
        trajectory_ids=(request.trajectory_id,),
        policy_versions=(version,),
        num_tokens=(num_tokens,),
        metrics=(),
    )


def guided_items(chunks: Sequence[RolloutChunk]) -> tuple[GuidedItem, ...]:
    return tuple(
        GuidedItem(
            handle=chunk.handle,
            row=row,
            trajectory_id=trajectory_id,
            policy_version=version,
            num_tokens=num_tokens,
            num_sequence_tokens=num_tokens + 1,
            num_guided=float(num_tokens),
            num_bytes=BYTES_PER_TOKEN * num_tokens,
            distances=tuple(map(float, range(round(WINDOWS_PER_TOKEN * num_tokens)))),
        )
        for chunk in chunks
        for row, (trajectory_id, version, num_tokens) in enumerate(
            zip(chunk.trajectory_ids, chunk.policy_versions, chunk.num_tokens, strict=True)
        )
    )


class SleepingFleet:
    """A FlowFleet. Counts the time that is spent in here, which is not the driver's."""

    def __init__(self, workload: Workload, mode: OnNewWeights, *, before_wait: Callable[[], None]) -> None:
        self.cpu_seconds = 0.0
        self.wall_seconds = 0.0
        self._workload = workload
        self._before_wait = before_wait
        self._timers = Timers()
        self._events: list[Event] = []
        self._rollouts = [
            SleepingRollout(worker, workload, mode, self._timers, self._events.append)
            for worker in range(workload.num_rollouts)
        ]
        self._teacher_free = [0.0] * workload.num_teachers
        self._learner_free = 0.0
        self._version = 0
        self._random = random.Random(SEED)

    def write(self, worker: int, requests: Sequence[RolloutRequest]) -> None:
        with self._in_engines() as now:
            self._rollouts[worker].write(requests, now)

    def guide(self, teacher: int, chunks: Sequence[RolloutChunk], threshold: float) -> None:
        with self._in_engines() as now:
            num_tokens = sum(sum(chunk.num_tokens) for chunk in chunks)
            seconds = self._workload.call_seconds + self._workload.score_seconds * num_tokens
            self._teacher_free[teacher] = max(self._teacher_free[teacher], now) + seconds
            self._timers.at(self._teacher_free[teacher], lambda _: self._end_call(teacher, tuple(chunks)))

    def _end_call(self, teacher: int, sources: tuple[RolloutChunk, ...]) -> None:
        chunk = GuidedChunk(items=guided_items(sources), metrics=())
        self._events.append(Guided(teacher=teacher, sources=sources, chunk=chunk))

    def learn(self, items: Sequence[GuidedItem]) -> None:
        with self._in_engines() as now:
            num_tokens = sum(item.num_tokens for item in items)
            seconds = self._workload.update_seconds + self._workload.train_seconds * num_tokens
            self._learner_free = max(self._learner_free, now) + seconds
            self._timers.at(self._learner_free, lambda _: self._end_update())

    def _end_update(self) -> None:
        self._version += 1
        self._events.append(Learned(report=UpdateReport(policy_version=self._version, metrics=())))

    def publish(self) -> None:
        with self._in_engines() as now:
            self._learner_free = max(self._learner_free, now) + self._workload.pack_seconds
            for rollout in self._rollouts:
                arrival = self._learner_free + self._workload.fetch_seconds * self._random.uniform(0.5, 1.5)
                self._timers.at(arrival, partial(rollout.take_weights, self._version))

    def excuse(self, role: str) -> None:
        raise AssertionError("engines that sleep do not fail")

    def wait(self) -> list[Event]:
        self._before_wait()
        with self._in_engines():
            if not self._events:
                time.sleep(max(0.0, min(self._timers.next_due - time.perf_counter(), POLL_SECONDS)))
                self._timers.run_until(time.perf_counter())
            events = list(self._events)
            self._events.clear()
            return events

    @contextmanager
    def _in_engines(self) -> Iterator[float]:
        """The time, up to which all engines have come."""
        cpu, wall = time.thread_time(), time.perf_counter()
        self._timers.run_until(wall)
        yield wall
        self.cpu_seconds += time.thread_time() - cpu
        self.wall_seconds += time.perf_counter() - wall
