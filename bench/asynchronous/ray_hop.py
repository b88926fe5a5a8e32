"""The same driver over Ray actors that sleep: what Ray's own hop costs a trajectory.

A few actor processes stand for many rollout workers each, whose trajectories come alone, each with a handle of the
object store. The driver reads them as topd_ray.actors.fleet does; teachers and the learner are actors that sleep too.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from bench.asynchronous.fleet import chunk_of, guided_items
from bench.asynchronous.workload import Workload
from topd_ray.actors.events import Event, Guided, Learned, Published, Written
from topd_ray.actors.messages import GuidedChunk, GuidedItem, RolloutChunk
from topd_ray.pipeline.flow import Flow
from topd_ray.types import RolloutRequest, UpdateReport

NUM_ACTORS = 4
POLL_SECONDS = 0.5
TOKEN_SECONDS = 0.001
"""Of a token, whatever the load."""


class Rollouts:
    """Rollout workers of one process."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._finished: dict[int, asyncio.Queue[RolloutChunk]] = {}
        self._versions: dict[int, int] = {}
        self._writing: set[asyncio.Task[None]] = set()

    async def read(self, worker: int) -> list[RolloutChunk]:
        """What `worker` has finished since the last call, as soon as there is something."""
        finished = self._queue(worker)
        chunks = [await finished.get()]
        while not finished.empty():
            chunks.append(finished.get_nowait())
        return chunks

    async def write(self, worker: int, requests: Sequence[RolloutRequest]) -> None:
        for request in requests:
            task = asyncio.create_task(self._write(worker, request))
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)

    async def _write(self, worker: int, request: RolloutRequest) -> None:
        version, num_tokens = self._versions.get(worker, 0), self._workload.length(request)
        await asyncio.sleep(TOKEN_SECONDS * num_tokens)
        self._queue(worker).put_nowait(replace(chunk_of(request, version, num_tokens), handle=ray.put(num_tokens)))

    async def take_weights(self, worker: int, version: int) -> None:
        await asyncio.sleep(self._workload.fetch_seconds * random.uniform(0.5, 1.5))
        self._versions[worker] = version

    def _queue(self, worker: int) -> "asyncio.Queue[RolloutChunk]":
        return self._finished.setdefault(worker, asyncio.Queue())


class Others:
    """Teachers and the learner."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    async def guide(self, chunks: Sequence[RolloutChunk], threshold: float) -> GuidedChunk:
        await asyncio.sleep(self._workload.call_seconds)
        handle = ray.put(threshold)
        return GuidedChunk(items=tuple(replace(item, handle=handle) for item in guided_items(chunks)), metrics=())

    async def learn(self, items: Sequence[GuidedItem], version: int) -> UpdateReport:
        await asyncio.sleep(self._workload.update_seconds)
        return UpdateReport(policy_version=version, metrics=())


class RayFleet:
    """A FlowFleet over these actors."""

    def __init__(self, workload: Workload) -> None:
        rollouts = ray.remote(num_cpus=0)(Rollouts)
        self._rollouts = [rollouts.remote(workload) for _ in range(NUM_ACTORS)]
        self._others = ray.remote(num_cpus=0)(Others).remote(workload)
        self._answers: dict[Any, Callable[[Any], list[Event]]] = {}
        self._num_rollouts = workload.num_rollouts
        self._version = 0
        for worker in range(workload.num_rollouts):
            self._read(worker)

    def _read(self, worker: int) -> None:
        def written(chunks: list[RolloutChunk]) -> list[Event]:
            self._read(worker)
            return [Written(worker=worker, chunk=chunk) for chunk in chunks]

        self._answers[self._rollout(worker).read.remote(worker)] = written

    def _rollout(self, worker: int) -> Any:
        return self._rollouts[worker % NUM_ACTORS]

    def write(self, worker: int, requests: Sequence[RolloutRequest]) -> None:
        self._rollout(worker).write.remote(worker, requests)

    def guide(self, teacher: int, chunks: Sequence[RolloutChunk], threshold: float) -> None:
        sources = tuple(chunks)
        self._answers[self._others.guide.remote(sources, threshold)] = lambda chunk: [
            Guided(teacher=teacher, sources=sources, chunk=chunk)
        ]

    def learn(self, items: Sequence[GuidedItem]) -> None:
        self._version += 1
        self._answers[self._others.learn.remote(items, self._version)] = lambda report: [Learned(report=report)]

    def publish(self) -> None:
        for worker in range(self._num_rollouts):
            event = Published(worker=worker, version=self._version)
            self._answers[self._rollout(worker).take_weights.remote(worker, self._version)] = partial(_only, event)

    def excuse(self, role: str) -> None:
        raise AssertionError("engines that sleep do not fail")

    def wait(self) -> list[Event]:
        pending = list(self._answers)
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
        if not ready:
            ready, _ = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
        answers = zip([self._answers.pop(one) for one in ready], ray.get(ready), strict=True)
        return [event for events_of, answer in answers for event in events_of(answer)]


def _only(event: Event, _: object) -> list[Event]:
    return [event]


def measure(workload: Workload, max_staleness: int, num_updates: int) -> dict[str, float]:
    """Milliseconds of the driver a trajectory: CPU of its thread, of its process with Ray's threads, and the rate."""
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address="local", num_cpus=NUM_ACTORS, **options)
    try:
        total = 1 + max_staleness + num_updates
        flow = Flow(
            workload.config(max_staleness, "interrupt"),
            RayFleet(workload),
            workload.tasks(total + max_staleness + 1),
            updates_left=total + max_staleness + 1,
            policy_version=0,
            threshold=lambda: 0.3,
        )
        for _ in range(1 + max_staleness):
            flow.update()
        thread, process, wall = time.thread_time(), time.process_time(), time.perf_counter()
        num_trained = sum(len(flow.update().items) for _ in range(num_updates))
        seconds = time.perf_counter() - wall
        return {
            "thread_ms": 1e3 * (time.thread_time() - thread) / num_trained,
            "process_ms": 1e3 * (time.process_time() - process) / num_trained,
            "rate": num_trained / seconds,
            "seconds": seconds,
        }
    finally:
        ray.shutdown()
