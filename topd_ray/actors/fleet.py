"""All workers of a run as Ray actors. Payloads pass between them by reference; the driver sees counts and handles."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from tqdm import tqdm

from topd_ray.actors.absence import Absence
from topd_ray.actors.cluster import check_run_folder, cluster_address, start_ray
from topd_ray.actors.crew import Crew, Slot
from topd_ray.actors.events import (
    Event,
    Guided,
    GuideUnreadable,
    Learned,
    LearnUnreadable,
    Lost,
    Published,
    Ready,
    Written,
)
from topd_ray.actors.messages import GuidedItem, LearnerCheck, Normalisers, RolloutChunk
from topd_ray.actors.nodes import check_nodes
from topd_ray.actors.placement import check_local_fit, cluster_nodes, local_cores, needs, reserve
from topd_ray.actors.sharing import balance_ranks, check_receipt, merge_reports, split_evenly
from topd_ray.actors.traffic import Traffic
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import (
    LearnerError,
    NonFiniteLossError,
    PayloadLostError,
    RolloutError,
    TeacherError,
    TopdError,
    WorkerLostError,
)
from topd_ray.types import Completions, Prompt, RolloutRequest, UpdateReport

POLL_SECONDS = 0.5
SAVE_SECONDS = 60.0
"""How long the learner ranks may take to save a batch whose loss is not finite."""
FAILED = {"rollout": RolloutError, "teacher": TeacherError, "learner": LearnerError}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """A call of an actor that has not been answered."""

    kind: str
    slot: Slot
    sources: tuple[RolloutChunk, ...] = ()
    """of `guide`"""
    bundle: ray.ObjectRef | None = None
    """of `update_weights`"""
    deadline: float
    limit: str
    """the setting that the deadline comes from"""


class RayFleet:
    """Starts Ray (or joins a cluster), reserves room, builds the workers, and passes handles between them.

    A rollout or teacher worker that is lost is made anew, within `faults.max_restarts`. `check_interrupt` is called
    while the driver waits for what may be broken off; what it raises goes to the caller. `say` hears of workers that
    stay away.
    """

    def __init__(
        self,
        config: TopdConfig,
        total_updates: int,
        check_interrupt: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._config = config
        self._check_interrupt = check_interrupt
        self._say = say
        self.traffic = Traffic()
        self._calls: dict[ray.ObjectRef, Call] = {}
        self._streams: dict[ray.ObjectRefGenerator, Slot] = {}
        self._newest: ray.ObjectRef | None = None
        """the bundle of the newest weights"""
        self._reports: dict[int, UpdateReport | None] = {}
        """of the learner ranks that have answered; None where the batch could not be read"""
        self._looked_at = time.monotonic()
        start_ray(config)
        try:
            self._build(total_updates)
        except BaseException:
            ray.shutdown()
            raise

    @staticmethod
    def check(config: TopdConfig) -> None:
        """Raise ConfigError, before anything loads, for what this machine cannot hold; a cluster is asked later."""
        if cluster_address(config) is None:
            check_local_fit(config, num_cores=local_cores(), num_gpus=torch.cuda.device_count())
        check_run_folder(config.run.folder)

    def _build(self, total_updates: int) -> None:
        config = self._config
        wanted = needs(config, num_gpus=int(ray.cluster_resources().get("GPU", 0.0)))
        group = reserve(
            wanted,
            cluster_nodes(),
            wait_seconds=config.resources.wait_seconds,
            check_interrupt=self._check_interrupt,
            say=self._say,
        )
        check_nodes(config, wanted, group)
        self._crew = Crew(config, wanted, group, total_updates)
        self._absence = Absence(group, self._say)
        self._rollouts = self._crew.of("rollout")
        self._teachers = self._crew.of("teacher")
        self._learners = self._crew.of("learner")
        self._is_starting = True
        for slot in self._crew.slots:
            self._crew.make(slot)
        several = len(self._learners) > 1
        meeting = self._fetch([self._learners[0].actor.rendezvous.remote()])[0] if several else None
        for slot in [*self._learners, *self._rollouts, *self._teachers]:
            self._set_up(slot, *([meeting] if slot.role == "learner" else []))
        num_slots = len(self._crew.slots)
        with tqdm(total=num_slots, desc="loading", unit="worker", disable=None, leave=False) as progress:
            while not all(slot.is_ready for slot in self._crew.slots):
                self._check_interrupt()
                self.wait()
                progress.update(sum(slot.is_ready for slot in self._crew.slots) - progress.n)
        self._is_starting = False

    # Commands

    def write(self, worker: int, requests: Sequence[RolloutRequest]) -> None:
        slot = self._rollouts[worker]
        if slot.num_writing == 0:
            slot.heard_at = time.monotonic()
        slot.num_writing += len(requests)
        self._call("submit", slot, slot.actor.submit.remote(requests, whole=self._config.run.deterministic))

    def guide(self, teacher: int, chunks: Sequence[RolloutChunk], threshold: float) -> None:
        slot = self._teachers[teacher]
        self._call("guide", slot, slot.actor.look_ahead.remote(chunks, threshold), sources=tuple(chunks))

    def learn(self, items: Sequence[GuidedItem]) -> None:
        shares = balance_ranks(items, len(self._learners))
        normalisers = Normalisers.of(items)
        self._reports = {}
        for slot, share in zip(self._learners, shares, strict=True):
            self._call("learn", slot, slot.actor.learn.remote(share, normalisers))

    def publish(self) -> None:
        packing = [slot.actor.pack_weights.remote() for slot in self._learners]
        self._newest = packing[0]
        for slot, future in zip(self._learners, packing, strict=True):
            self._call("pack", slot, future)
        for slot in self._rollouts:
            if slot.is_ready:
                self._send_weights(slot)

    def _send_weights(self, slot: Slot) -> None:
        """Not by way of the driver: the worker gets the learner's answer."""
        interrupt = self._config.pipeline.on_new_weights == "interrupt"
        future = slot.actor.update_weights.remote(self._newest, interrupt=interrupt)
        self._call("update_weights", slot, future, bundle=self._newest)

    def _set_up(self, slot: Slot, *args: Any) -> None:
        self._call("setup", slot, slot.actor.setup.remote(*args))

    def _call(self, kind: str, slot: Slot, future: ray.ObjectRef, **details: Any) -> None:
        faults = self._config.faults
        limit = "faults.stall_seconds", faults.stall_seconds
        if kind == "setup":
            limit = "faults.replace_seconds", faults.replace_seconds
        elif kind == "update_weights" and self._config.pipeline.on_new_weights == "interrupt":
            limit = "weights.timeout_seconds", self._config.weights.timeout_seconds
        self._calls[future] = Call(
            kind=kind,
            slot=slot,
            deadline=time.monotonic() + limit[1],
            limit=f"{limit[0]}={limit[1]:g}",
            **details,
        )

    # Events

    def wait(self) -> list[Event]:
        """What has happened, after at least something has, or half a second."""
        waitables = [*self._calls, *self._streams]
        ready, _ = ray.wait(waitables, num_returns=len(waitables), timeout=0)
        if not ready:
            ready, _ = ray.wait(waitables, num_returns=1, timeout=POLL_SECONDS)
        events: list[Event] = []
        for one in ready:
            if one in self._streams:
                events += self._hear_stream(one)
            elif one in self._calls:  # and its worker has not been lost a moment ago
                events += self._hear(one)
        return events + self._late()

    def _hear_stream(self, stream: ray.ObjectRefGenerator) -> list[Event]:
        slot = self._streams[stream]
        try:
            chunk = self._result(next(stream))
        except StopIteration:
            return [self._lose(slot, "it has stopped serving")]
        except (TopdError, RayError) as error:
            return [self._lose(slot, error)]
        slot.num_writing -= len(chunk.trajectory_ids)
        slot.heard_at = time.monotonic()
        return [Written(worker=slot.index, chunk=chunk)]

    def _hear(self, future: ray.ObjectRef) -> list[Event]:
        call = self._calls.pop(future)
        try:
            result = self._result(future)
        except NonFiniteLossError:
            others = [one for one, other in self._calls.items() if other.kind == "learn"]
            raise NonFiniteLossError("; ".join(self._failures([future, *others]))) from None
        except PayloadLostError as error:
            return self._unreadable(call, error)
        except (TopdError, RayError) as error:
            return self._failed(call, error)
        return self._answered(call, result)

    def _answered(self, call: Call, result: Any) -> list[Event]:
        slot = call.slot
        match call.kind:
            case "guide":
                return [Guided(teacher=slot.index, sources=call.sources, chunk=result)]
            case "learn":
                return self._learnt(slot.index, result)
            case "update_weights":
                bundles = ray.get([one for one in (call.bundle, self._newest) if one is not None])
                slot.version = check_receipt(slot.index, bundles, result)
                return [Published(worker=slot.index, version=slot.version)]
            case "setup":
                slot.is_ready = True
                self._absence.end(slot)
                return self._ready(slot, result)
        return []

    def _ready(self, slot: Slot, result: Any) -> list[Event]:
        if slot.role == "learner":
            self.learner_attention: str = result
        elif slot.role == "teacher":
            return [Ready(teacher=slot.index)]
        else:
            self._streams[slot.actor.serve.options(num_returns="streaming").remote()] = slot
            if self._newest is not None:
                self._send_weights(slot)
        return []

    def _learnt(self, rank: int, report: UpdateReport | None) -> list[Event]:
        """Every rank has to answer: all of them have learnt, or none."""
        self._reports[rank] = report
        if len(self._reports) < len(self._learners):
            return []
        reports = [self._reports[rank] for rank in sorted(self._reports)]
        read = [report for report in reports if report is not None]
        return [Learned(report=merge_reports(read))] if len(read) == len(reports) else [LearnUnreadable()]

    def _unreadable(self, call: Call, error: PayloadLostError) -> list[Event]:
        if call.kind == "guide":
            return [GuideUnreadable(teacher=call.slot.index, sources=call.sources)]
        if call.kind == "learn":
            return self._learnt(call.slot.index, None)
        raise WorkerLostError(f"the newest weights cannot be fetched: {error}")

    def _failed(self, call: Call, error: Exception) -> list[Event]:
        slot = call.slot
        if isinstance(error, RayActorError):  # of another worker, where a call waited for that one's answer
            slot = self._crew.slot_of(error.actor_id) or slot
        is_dead = isinstance(error, RayActorError)
        if slot.role == "learner":
            if is_dead:
                raise WorkerLostError(f"{slot} is lost: {_first_line(error)}") from error
            raise error
        if self._is_starting and not is_dead:
            raise error
        return [self._lose(slot, error)]

    def _lose(self, slot: Slot, reason: Exception | str) -> Lost:
        """Make the worker anew. Raises its role's error if that has happened too often."""
        self._calls = {future: call for future, call in self._calls.items() if call.slot is not slot}
        self._streams = {stream: other for stream, other in self._streams.items() if other is not slot}
        if not slot.budget.spend():
            raise FAILED[slot.role](f"{slot} has failed {slot.budget}, the last time: {_first_line(reason)}")
        self._absence.begin(slot)
        self._crew.make(slot)
        self._set_up(slot)
        return Lost(role=slot.role, worker=slot.index, reason=_first_line(reason))

    def _late(self) -> list[Event]:
        """Workers that should have been heard of, looked for from time to time."""
        now = time.monotonic()
        if now < self._looked_at + POLL_SECONDS:
            return []
        self._looked_at = now
        self._absence.look()
        late = {
            call.slot: f"{call.kind} took longer than {call.limit} s"
            for call in self._calls.values()
            if call.deadline < now
        }
        stall = self._config.faults.stall_seconds
        for slot in self._rollouts:
            if slot.num_writing and slot.heard_at + stall < now:
                late[slot] = f"it wrote nothing within faults.stall_seconds={stall:g} s"
        events: list[Event] = []
        for slot, reason in late.items():
            if "setup" in reason and slot.role != "learner" and not self._is_starting:
                raise FAILED[slot.role](f"{slot} is not back: {reason}; {self._absence.waits_for(slot)}")
            if slot.role == "learner" or "setup" in reason:
                raise WorkerLostError(f"{slot} does not answer: {reason}")
            events.append(self._lose(slot, reason))
        return events

    def _failures(self, futures: Sequence[ray.ObjectRef]) -> list[str]:
        """What each rank says of a non-finite loss, once all have saved their share of the batch or time is up."""
        done, late = ray.wait(list(futures), num_returns=len(futures), timeout=SAVE_SECONDS)
        messages = []
        for future in done:
            try:
                self._result(future)
            except NonFiniteLossError as error:
                messages.append(str(error))
        silent = [f"{self._calls[one].slot} has not answered within {SAVE_SECONDS:g} s" for one in late]
        return messages + silent

    # What is done when it returns

    def publish_weights(self) -> int:
        self.publish()
        assert self._newest is not None, "it has just been published"
        while not all(slot.is_ready for slot in self._crew.slots) or not self._all_serve_newest():
            self._check_interrupt()
            self.wait()
        return int(ray.get(self._newest).version)

    def _all_serve_newest(self) -> bool:
        waits = any(call.kind == "update_weights" for call in self._calls.values())
        return not waits and all(slot.version is not None for slot in self._rollouts)

    def evaluate(self, prompts: Sequence[Prompt], *, model: str, seed: int) -> Iterator[Completions]:
        slots = [slot for slot in (self._rollouts if model == "student" else self._teachers) if slot.is_ready]
        shares = split_evenly(prompts, len(slots))
        return self._stream([slot.actor.evaluate for slot, _ in zip(slots, shares, strict=False)], shares, seed=seed)

    def own_teacher(self, requests: Sequence[RolloutRequest]) -> list[GuidedItem]:
        return list(self._fetch([self._rollouts[0].actor.own_teacher.remote(requests, self._config.teacher.top_k)])[0])

    def preflight(self, items: list[GuidedItem]) -> LearnerCheck:
        check: LearnerCheck = self._on_all_ranks("preflight", items)[0]
        return check

    def verify_teacher(self, requests: Sequence[RolloutRequest]) -> float | None:
        chunks = list(self._stream([self._rollouts[0].actor.generate], [requests], whole=True))
        differences = self._fetch([slot.actor.verify.remote(chunks) for slot in self._teachers])
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
        return self._fetch([getattr(slot.actor, method).remote(*args) for slot in self._learners])

    def _stream(self, methods: Sequence[Any], shares: Sequence[Any], **args: Any) -> Iterator[Any]:
        """What several workers yield, as it comes."""
        streams = [
            method.options(num_returns="streaming").remote(share, **args)
            for method, share in zip(methods, shares, strict=True)
        ]
        while streams:
            self._check_interrupt()
            for stream in ray.wait(streams, num_returns=1, timeout=POLL_SECONDS)[0]:
                try:
                    yield self._insist(next(stream))
                except StopIteration:
                    streams.remove(stream)

    def _fetch(self, futures: Sequence[ray.ObjectRef]) -> list[Any]:
        """Results of actor calls, in the order of `futures`; the first error ends the wait."""
        pending = list(futures)
        while pending:
            ready, pending = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
            for one in ready:
                self._insist(one, count=False)
        return [self._insist(one) for one in futures]

    def _insist(self, future: ray.ObjectRef, *, count: bool = True) -> Any:
        """A result that the run cannot go on without. Raises WorkerLostError if its worker is gone."""
        try:
            return self._result(future, count=count)
        except RayActorError as error:
            raise WorkerLostError(f"{self._crew.slot_of(error.actor_id)} is lost: {_first_line(error)}") from error

    def _result(self, future: ray.ObjectRef, *, count: bool = True) -> Any:
        try:
            result = ray.get(future)
        except RayTaskError as error:
            if isinstance(error.cause, TopdError):
                raise error.cause from None
            raise
        if count:
            self.traffic.count(result)
        return result


def _first_line(reason: Exception | str) -> str:
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return lines[0] if lines else type(reason).__name__
