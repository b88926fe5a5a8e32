"""All workers of a run as Ray actors. Payloads pass between them by reference; the driver sees counts and handles."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from tqdm import tqdm

from topd_ray.actors.buffer import TrajectoryBuffer
from topd_ray.actors.cluster import check_run_folder, cluster_address, start_ray, worker_environment
from topd_ray.actors.learner import LearnerWorker
from topd_ray.actors.messages import GuidedChunk, GuidedItem, LearnerCheck, Lease, Normalisers, RolloutChunk
from topd_ray.actors.nodes import check_nodes
from topd_ray.actors.parts import learner_part, rollout_part, teacher_part, threads
from topd_ray.actors.placement import Need, check_local_fit, cluster_nodes, local_cores, needs, reserve
from topd_ray.actors.rollout import RolloutWorker
from topd_ray.actors.sharing import (
    balance_ranks,
    check_receipts,
    merge_reports,
    split_evenly,
    split_requests,
)
from topd_ray.actors.store import RayStore
from topd_ray.actors.teacher import TeacherWorker
from topd_ray.actors.traffic import Traffic
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import LearnerError, NonFiniteLossError, RolloutError, TeacherError, TopdError, WeightSyncError
from topd_ray.types import Completions, Prompt, RolloutRequest, UpdateReport

POLL_SECONDS = 0.5
TEACHER_CALLS_IN_FLIGHT = 2
"""Calls a teacher worker holds: one on its engine, one whose transport runs or that waits for the engine."""
SAVE_SECONDS = 60.0
"""How long the learner ranks may take to save a batch whose loss is not finite."""
Item = TypeVar("Item")
DEAD_WORKER = {"rollout": RolloutError, "teacher": TeacherError, "learner": LearnerError}


class RayFleet:
    """Starts Ray (or joins a cluster), reserves room, builds the workers, and passes handles between them.

    `check_interrupt` is called while the driver waits for rollouts and teachers; what it raises goes to the caller.
    """

    def __init__(
        self, config: TopdConfig, total_updates: int, check_interrupt: Callable[[], None] = lambda: None
    ) -> None:
        self._config = config
        self._check_interrupt = check_interrupt
        self.traffic = Traffic()
        self._roles: dict[str, str] = {}
        start_ray(config)
        try:
            self._build_workers(total_updates)
        except BaseException:
            ray.shutdown()
            raise

    @staticmethod
    def check(config: TopdConfig) -> None:
        """Raise ConfigError, before anything loads, for what this machine cannot hold; a cluster is asked later."""
        if cluster_address(config) is None:
            check_local_fit(config, num_cores=local_cores(), num_gpus=torch.cuda.device_count())
        check_run_folder(config.run.folder)

    def _build_workers(self, total_updates: int) -> None:
        config = self._config
        wanted = needs(config, num_gpus=int(ray.cluster_resources().get("GPU", 0.0)))
        group = reserve(
            wanted,
            cluster_nodes(),
            wait_seconds=config.resources.wait_seconds,
            check_interrupt=self._check_interrupt,
        )
        check_nodes(config, wanted, group)
        placed = [
            (need, PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index))
            for index, need in enumerate(wanted)
        ]
        store = RayStore()
        self.buffer = RemoteBuffer(config, self._fetch)
        self._rollouts = [
            self._actor(RolloutWorker, need, at, **rollout_part(config), store=store)
            for need, at in placed
            if need.role == "rollout"
        ]
        self._teachers = [
            self._actor(TeacherWorker, need, at, **teacher_part(config), store=store)
            for need, at in placed
            if need.role == "teacher"
        ]
        self._learners = [
            self._actor(
                LearnerWorker,
                need,
                at,
                **learner_part(config, rank=need.index, total_updates=total_updates),
                store=store,
            )
            for need, at in placed
            if need.role == "learner"
        ]
        meeting = self._fetch([self._learners[0].rendezvous.remote()])[0] if len(self._learners) > 1 else None
        loading = [learner.setup.remote(meeting) for learner in self._learners]
        loading += [worker.setup.remote() for worker in [*self._rollouts, *self._teachers]]
        arriving = self._as_they_come(loading, interruptible=True)
        loaded = dict(tqdm(arriving, total=len(loading), desc="loading", unit="worker", disable=None, leave=False))
        self.learner_attention: str = loaded[loading[0]]

    def rollout(self, requests: Sequence[RolloutRequest]) -> "Streams[RolloutChunk]":
        shares = split_requests(requests, len(self._rollouts))
        whole = self._config.run.deterministic
        return Streams(
            self,
            [
                worker.generate.options(num_returns="streaming").remote(share, whole=whole)
                for worker, share in zip(self._rollouts, shares, strict=False)
            ],
        )

    def look_ahead(self, rollouts: Iterable[RolloutChunk], threshold: float) -> Iterator[GuidedChunk]:
        """Hand finished trajectories to the teachers while others are still being written.

        Deterministic runs give each rollout worker's whole share to one teacher, in a fixed order.
        """
        if self._config.run.deterministic:
            futures = [
                self._teachers[index % len(self._teachers)].look_ahead.remote([chunk], threshold)
                for index, chunk in enumerate(rollouts)
            ]
            yield from self._fetch(futures, interruptible=True)
            return
        assert isinstance(rollouts, Streams), "Ray actors read what rollout() started"
        waiting: list[RolloutChunk] = []
        in_flight: dict[ray.ObjectRef, int] = {}
        while rollouts.open or waiting or in_flight:
            if idle := self._idle_teachers(in_flight):
                for teacher, share in zip(idle, split_evenly(waiting, len(idle)), strict=False):
                    in_flight[self._teachers[teacher].look_ahead.remote(share, threshold)] = teacher
                waiting = []
            ready = self._wait([*rollouts.open, *in_flight])
            for future in [future for future in ready if future in in_flight]:
                del in_flight[future]
                yield self._fetch([future])[0]
            waiting += rollouts.collect([stream for stream in ready if stream in rollouts.open])

    def learn(self, items: Sequence[GuidedItem]) -> UpdateReport:
        shares = balance_ranks(items, len(self._learners))
        normalisers = Normalisers.of(items)
        futures = [
            learner.learn.remote(share, normalisers) for learner, share in zip(self._learners, shares, strict=True)
        ]
        try:
            return merge_reports(self._fetch(futures))
        except NonFiniteLossError:
            raise NonFiniteLossError("; ".join(self._failures(futures))) from None

    def _failures(self, futures: Sequence[ray.ObjectRef]) -> list[str]:
        """What each rank says of a non-finite loss, once all have saved their share of the batch or time is up."""
        done, late = ray.wait(list(futures), num_returns=len(futures), timeout=SAVE_SECONDS)
        messages = []
        for future in done:
            try:
                self._result(future)
            except NonFiniteLossError as error:
                messages.append(str(error))
        silent = [f"learner rank {futures.index(one)} has not answered within {SAVE_SECONDS:g} s" for one in late]
        return messages + silent

    def publish_weights(self) -> int:
        packing = [learner.pack_weights.remote() for learner in self._learners]
        updating = [worker.update_weights.remote(packing[0]) for worker in self._rollouts]  # not by way of the driver
        bundle = self._fetch(packing)[0]
        return check_receipts(bundle, self._fetch(updating, timeout=self._config.weights.timeout_seconds))

    def evaluate(self, prompts: Sequence[Prompt], *, model: str, seed: int) -> Iterator[Completions]:
        workers = self._rollouts if model == "student" else self._teachers
        shares = split_evenly(prompts, len(workers))
        streams: Streams[Completions] = Streams(
            self,
            [
                worker.evaluate.options(num_returns="streaming").remote(share, seed=seed)
                for worker, share in zip(workers, shares, strict=False)
            ],
        )
        while streams.open:
            yield from streams.collect(self._wait(streams.open))

    def own_teacher(self, requests: Sequence[RolloutRequest]) -> list[GuidedItem]:
        return list(self._fetch([self._rollouts[0].own_teacher.remote(requests, self._config.teacher.top_k)])[0])

    def preflight(self, items: list[GuidedItem]) -> LearnerCheck:
        check: LearnerCheck = self._on_all_ranks("preflight", items)[0]
        return check

    def verify_teacher(self, requests: Sequence[RolloutRequest]) -> float | None:
        chunks = list(self.rollout(requests))
        differences = self._fetch([teacher.verify.remote(chunks) for teacher in self._teachers])
        return max((one for one in differences if one is not None), default=None)

    def save_learner(self, folder: Path) -> None:
        self._on_all_ranks("save", folder)

    def load_learner(self, folder: Path) -> int:
        return int(self._on_all_ranks("load", folder)[0])

    def export(self, folder: Path) -> None:
        self._on_all_ranks("export", folder)

    def shutdown(self) -> None:
        """End every worker and, if this fleet started it, Ray."""
        ray.shutdown()

    def _on_all_ranks(self, method: str, *args: Any) -> list[Any]:
        return self._fetch([getattr(learner, method).remote(*args) for learner in self._learners])

    def _idle_teachers(self, in_flight: dict[ray.ObjectRef, int]) -> list[int]:
        """The least busy teachers, if they have room for another call."""
        load = [sum(teacher == index for teacher in in_flight.values()) for index in range(len(self._teachers))]
        least = min(load)
        return [i for i in range(len(load)) if load[i] == least] if least < TEACHER_CALLS_IN_FLIGHT else []

    def _wait(self, waitables: Sequence[Any]) -> list[Any]:
        """Whatever of `waitables` is ready, after at least one is."""
        while True:
            self._check_interrupt()
            ready, _ = ray.wait(list(waitables), num_returns=len(waitables), timeout=0)
            if not ready:
                ready, _ = ray.wait(list(waitables), num_returns=1, timeout=POLL_SECONDS)
            if ready:
                return list(ready)

    def _fetch(
        self, futures: Sequence[ray.ObjectRef], *, timeout: float = math.inf, interruptible: bool = False
    ) -> list[Any]:
        """Results of actor calls, in the order of `futures`."""
        results = dict(self._as_they_come(futures, timeout=timeout, interruptible=interruptible))
        return [results[future] for future in futures]

    def _as_they_come(
        self, futures: Sequence[ray.ObjectRef], *, timeout: float = math.inf, interruptible: bool = False
    ) -> Iterator[tuple[ray.ObjectRef, Any]]:
        """(future, result), counted; the first error ends the wait, as the class it was raised as.

        An update or a checkpoint is not `interruptible`: the learner must come to its end. Raises WeightSyncError
        after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        pending = list(futures)
        while pending:
            if interruptible:
                self._check_interrupt()
            ready, pending = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
            if ready:
                yield ready[0], self._result(ready[0])
            elif time.monotonic() > deadline:
                raise WeightSyncError(
                    f"{len(pending)} of {len(futures)} workers did not acknowledge new weights within "
                    f"weights.timeout_seconds={timeout:g}"
                )

    def _result(self, future: ray.ObjectRef) -> Any:
        try:
            result = ray.get(future)
        except RayTaskError as error:
            if isinstance(error.cause, TopdError):
                raise error.cause from None
            raise
        except RayActorError as error:
            role = self._roles.get(error.actor_id, "buffer")
            raise DEAD_WORKER.get(role, TopdError)(f"a {role} worker died: {error}") from error
        self.traffic.count(result)
        return result

    def _concurrency(self, role: str) -> int:
        """Two calls may race for a teacher's engine, so deterministic runs make one at a time."""
        return TEACHER_CALLS_IN_FLIGHT if role == "teacher" and not self._config.run.deterministic else 1

    def _actor(self, worker: type, need: Need, at: PlacementGroupSchedulingStrategy, **parts: Any) -> Any:
        actor = (
            ray.remote(worker)
            .options(
                num_cpus=need.num_cpus,
                num_gpus=need.num_gpus,
                scheduling_strategy=at,
                max_concurrency=self._concurrency(need.role),
                runtime_env={
                    "env_vars": worker_environment(threads(self._config, need.role), on_cpu=not need.num_gpus)
                },
            )
            .remote(**parts)
        )
        self._roles[actor._actor_id.hex()] = need.role
        return actor


class Streams(Generic[Item]):
    """What several workers yield, as it comes."""

    def __init__(self, fleet: RayFleet, streams: list[ray.ObjectRefGenerator]) -> None:
        self._fleet = fleet
        self.open = streams

    def collect(self, ready: Sequence[ray.ObjectRefGenerator]) -> list[Item]:
        """One item of each ready stream; streams that have ended are closed."""
        items: list[Item] = []
        for stream in ready:
            try:
                items += self._fleet._fetch([next(stream)])
            except StopIteration:
                self.open.remove(stream)
        return items

    def __iter__(self) -> Iterator[Item]:
        """Every item, worker by worker."""
        for stream in list(self.open):
            while stream in self.open:
                self._fleet._wait([stream])
                yield from self.collect([stream])


class RemoteBuffer:
    """The trajectory buffer in an actor of its own."""

    def __init__(self, config: TopdConfig, fetch: Callable[[Sequence[ray.ObjectRef]], list[Any]]) -> None:
        self._actor = ray.remote(TrajectoryBuffer).options(num_cpus=0).remote(config.buffer)
        self._fetch = fetch

    def put(self, items: Sequence[GuidedItem]) -> int:
        return int(self._fetch([self._actor.put.remote(items)])[0])

    def take(self, num_items: int) -> Lease | None:
        lease: Lease | None = self._fetch([self._actor.take.remote(num_items)])[0]
        return lease

    def acknowledge(self, lease_id: int) -> None:
        self._fetch([self._actor.acknowledge.remote(lease_id)])

    def clear(self) -> int:
        return int(self._fetch([self._actor.clear.remote()])[0])
