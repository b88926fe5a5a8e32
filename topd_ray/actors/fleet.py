"""All workers of a run as Ray actors. Payloads pass between them by reference; the driver sees counts and handles."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError
from tqdm import tqdm

from topd_ray.actors.absence import Absence
from topd_ray.actors.answers import POLL_SECONDS, Answers, is_loss, reason_of
from topd_ray.actors.calls import Call, Calls
from topd_ray.actors.cluster import check_run_folder, cluster_address, start_ray
from topd_ray.actors.crew import Crew, Slot
from topd_ray.actors.events import (
    Event,
    Guided,
    GuideUnreadable,
    Learned,
    LearnUnreadable,
    Lost,
    Packed,
    Published,
    Ready,
    Written,
)
from topd_ray.actors.messages import GuidedItem, LearnerCheck, Normalisers, RolloutChunk
from topd_ray.actors.nodes import check_nodes, check_place, look_at_place
from topd_ray.actors.placement import check_local_fit, cluster_nodes, local_cores, needs, reserve, with_gpus_of
from topd_ray.actors.rollout import RemoteStudent
from topd_ray.actors.sharing import balance_ranks, check_receipt, merge_reports, split_evenly
from topd_ray.actors.traffic import Traffic
from topd_ray.config.schema import EvaluationConfig, TopdConfig
from topd_ray.engines.process import check_build
from topd_ray.errors import (
    ConfigError,
    LearnerError,
    NonFiniteLossError,
    PayloadLostError,
    RolloutError,
    TeacherError,
    TopdError,
    WorkerLostError,
)
from topd_ray.types import Completions, Prompt, RolloutRequest, UpdateReport
from topd_ray.weights.bundle import weight_metrics
from topd_ray.weights.checksum import WeightReceipt

SAVE_SECONDS = 60.0
"""How long the learner ranks may take to save a batch whose loss is not finite."""
FAILED = {"rollout": RolloutError, "teacher": TeacherError, "learner": LearnerError}


class RayFleet:
    """Starts Ray (or joins a cluster), reserves room, builds the workers, and passes handles between them.

    A rollout or teacher worker that is lost is made anew, within `faults.max_restarts`; chunks of trajectories are its
    progress. `check_interrupt` is called while the driver waits for what may be broken off; what it raises goes to the
    caller. `say` hears of workers that stay away.
    """

    def __init__(
        self,
        config: TopdConfig,
        total_updates: int,
        check_interrupt: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._config = config
        self.planned = config
        self._total_updates = total_updates
        self._check_interrupt = check_interrupt
        self._say = say
        self.traffic = Traffic()
        self._calls = Calls(config)
        self._newest: ray.ObjectRef | None = None
        """the bundle of the newest weights"""
        self._publication_is_due = False
        self._reports: dict[int, UpdateReport | PayloadLostError] = {}
        """of the learner ranks that have answered"""
        self._looked_at = time.monotonic()

    @staticmethod
    def check(config: TopdConfig) -> None:
        """Raise ConfigError, before anything loads, for what this machine cannot hold; a cluster is asked later."""
        if cluster_address(config) is None:
            num_gpus = torch.cuda.device_count()
            check_build(num_gpus)
            check_local_fit(config, num_cores=local_cores(), num_gpus=num_gpus)
        check_run_folder(config.run.folder)

    def start(self) -> None:
        config = self._config
        start_ray(config, self._say)
        wanted = needs(config, num_gpus=int(ray.cluster_resources().get("GPU", 0.0)))
        self.planned = with_gpus_of(config, wanted)
        self._group = reserve(
            wanted,
            cluster_nodes(),
            wait_seconds=config.resources.wait_seconds,
            check_interrupt=self._check_interrupt,
            say=self._say,
        )
        check_nodes(config, wanted, self._group)
        self._crew = Crew(config, wanted, self._group, self._total_updates)
        self._absence = Absence(self._group, self._say)
        self._answers = Answers(self._crew, self.traffic, self._check_interrupt)
        self._rollouts = self._crew.of("rollout")
        self._teachers = self._crew.of("teacher")
        self._learners = self._crew.of("learner")
        self._is_starting = True
        for slot in self._crew.slots:
            self._crew.make(slot)
        several = len(self._learners) > 1
        rendezvous = [self._learners[0].actor.rendezvous.remote()] if several else []
        meeting = next(iter(self._answers.fetch(rendezvous, self._calls.loading)), None)
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
        self._calls.add("submit", slot, slot.actor.submit.remote(requests, whole=self._config.run.deterministic))

    def guide(self, teacher: int, chunks: Sequence[RolloutChunk], threshold: float) -> None:
        slot = self._teachers[teacher]
        student = {"student": self._student_of(teacher)} if self._config.resamples else {}
        future = slot.actor.look_ahead.remote(chunks, threshold, **student)
        self._calls.add("guide", slot, future, sources=tuple(chunks))

    def _student_of(self, teacher: int) -> RemoteStudent | None:
        """The rollout worker that continues prefixes for a teacher: its own, or while that is not there, another."""
        turn = teacher % len(self._rollouts)
        present = [slot for slot in self._rollouts[turn:] + self._rollouts[:turn] if slot.version is not None]
        return RemoteStudent(present[0].actor) if present else None

    def learn(self, items: Sequence[GuidedItem]) -> None:
        shares = balance_ranks(items, len(self._learners))
        normalisers = Normalisers.of(items)
        self._reports = {}
        for slot, share in zip(self._learners, shares, strict=True):
            self._calls.add("learn", slot, slot.actor.learn.remote(share, normalisers))

    def publish(self) -> None:
        self._publication_is_due = True
        self._publish_if_due()

    def _publish_if_due(self) -> None:
        """With `ipc` once nobody reads the last version any more, over which the learner writes the new one."""
        being_read = self._config.weights.channel == "ipc" and self._calls.of(kind="update_weights")
        if not self._publication_is_due or being_read:
            return
        self._publication_is_due = False
        packing = [slot.actor.pack_weights.remote() for slot in self._learners]
        self._newest = packing[0]
        for slot, future in zip(self._learners, packing, strict=True):
            self._calls.add("pack", slot, future)
        for slot in self._rollouts:
            if slot.is_ready:
                self._send_weights(slot)

    def excuse(self, role: str) -> None:
        for slot in self._crew.of(role):
            slot.budget.excuse()

    def _send_weights(self, slot: Slot) -> None:
        """Not by way of the driver: the worker gets the learner's answer."""
        interrupt = self._config.pipeline.on_new_weights == "interrupt"
        future = slot.actor.update_weights.remote(self._newest, interrupt=interrupt)
        self._calls.add("update_weights", slot, future, bundle=self._newest)

    def _read(self, slot: Slot) -> None:
        self._calls.add("read", slot, slot.actor.read.remote())

    def _set_up(self, slot: Slot, *args: Any, since: float | None = None) -> None:
        self._calls.add("setup", slot, slot.actor.setup.remote(*args), made_at=since)

    # Events

    def wait(self) -> list[Event]:
        """What has happened, after at least something has, or half a second."""
        pending = list(self._calls)
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
        if not ready:
            ready, _ = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
        events: list[Event] = []
        for one in ready:
            if one in self._calls:  # and its worker has not been lost a moment ago
                events += self._hear(one)
        events += self._late()
        self._publish_if_due()
        return events

    def _hear(self, future: ray.ObjectRef) -> list[Event]:
        call = self._calls.pop(future)
        call.slot.heard_at = time.monotonic()
        if call.kind == "look":
            return self._looked(call, future)
        try:
            return self._answered(call, self._answers.get(future))
        except NonFiniteLossError:
            raise NonFiniteLossError("; ".join(self._failures([future, *self._calls.of(kind="learn")]))) from None
        except PayloadLostError as error:
            return self._unreadable(call, error)
        except (TopdError, RayError) as error:
            return self._failed(call, error)

    def _looked(self, call: Call, future: ray.ObjectRef) -> list[Event]:
        """Set a worker up that is made anew. Raises its role's error if its node does not fit."""
        slot = call.slot
        try:
            check_place(self._config, slot.role, self._group, slot.bundle, self._answers.get(future, count=False))
        except ConfigError as error:
            raise FAILED[slot.role](f"{slot} is not back: {error}") from None
        except RayError as error:
            return [self._lose(slot, error)]
        self._set_up(slot, since=call.made_at)
        return []

    def _answered(self, call: Call, answer: Any) -> list[Event]:
        slot = call.slot
        match call.kind:
            case "pack" if answer is not None:
                return [Packed(metrics=tuple(weight_metrics(answer, [])))]
            case "read":
                return self._written(slot, answer)
            case "guide":
                slot.budget.progressed()
                return [Guided(teacher=slot.index, sources=call.sources, chunk=answer)]
            case "learn":
                return self._learnt(slot.index, answer)
            case "update_weights" if answer is not None:  # a newer version is on its way to the worker
                self._acknowledge(call, answer)
                return [Published(worker=slot.index, version=answer.version, metrics=answer.metrics)]
            case "setup":
                slot.is_ready = True
                self._absence.end(slot)
                return self._ready(slot, answer)
        return []

    def _written(self, slot: Slot, chunks: list[RolloutChunk]) -> list[Event]:
        self._read(slot)
        slot.budget.progressed()
        slot.num_writing -= sum(len(chunk.trajectory_ids) for chunk in chunks)
        return [Written(worker=slot.index, chunk=chunk) for chunk in chunks]

    def _acknowledge(self, call: Call, receipt: WeightReceipt) -> None:
        """Raise WeightSyncError unless the receipt is of weights that the worker was sent.

        Weights that newer ones overtake are answered with the receipt of these, before or after they are themselves.
        """
        slot = call.slot
        if receipt != slot.receipt:
            sent = [
                call.bundle,
                *(one.bundle for one in self._calls.of(kind="update_weights").values() if one.slot is slot),
            ]
            packed, _ = ray.wait(sent, num_returns=len(sent), timeout=0)
            check_receipt(slot.index, ray.get(packed), receipt)
            slot.receipt = receipt

    def _ready(self, slot: Slot, result: Any) -> list[Event]:
        if slot.role == "learner":
            self.learner_attention: str = result
        elif slot.role == "teacher":
            return [Ready(teacher=slot.index)]
        else:
            self._read(slot)
            if self._newest is not None and not self._publication_is_due:
                self._send_weights(slot)
        return []

    def _learnt(self, rank: int, report: UpdateReport | PayloadLostError) -> list[Event]:
        """Every rank has to answer: all of them have learnt, or none."""
        self._reports[rank] = report
        if len(self._reports) < len(self._learners):
            return []
        reports = [self._reports[rank] for rank in sorted(self._reports)]
        lost = [reason_of(report) for report in reports if isinstance(report, PayloadLostError)]
        if lost:
            return [LearnUnreadable(reason="; ".join(dict.fromkeys(lost)))]
        return [Learned(report=merge_reports([one for one in reports if isinstance(one, UpdateReport)]))]

    def _unreadable(self, call: Call, error: PayloadLostError) -> list[Event]:
        if call.kind == "guide":
            return [GuideUnreadable(teacher=call.slot.index, sources=call.sources, reason=reason_of(error))]
        if call.kind == "learn":
            return self._learnt(call.slot.index, error)
        raise WorkerLostError(f"the newest weights cannot be fetched: {error}")

    def _failed(self, call: Call, error: Exception) -> list[Event]:
        slot = call.slot
        if isinstance(error, RayActorError):  # of another worker, where a call waited for that one's answer
            slot = self._crew.slot_of(error.actor_id) or slot
        if slot.role == "learner":
            loss = error if is_loss(error) else self._answers.loss_among(list(self._calls.of(role="learner")))
            if loss is not None:
                raise self._answers.lost(loss) from error
            raise error
        if self._is_starting and not is_loss(error):
            raise error
        return [self._lose(slot, error)]

    def _lose(self, slot: Slot, reason: Exception | str) -> Lost:
        """Make the worker anew. Raises its role's error if that has happened too often."""
        self._calls.drop(slot)
        if not slot.budget.spend():
            raise FAILED[slot.role](f"{slot} has failed {slot.budget}, the last time: {reason_of(reason)}")
        self._absence.begin(slot)
        self._crew.make(slot)
        if cluster_address(self._config) is None:
            self._set_up(slot)
        else:  # it may have moved to another node, even one that was not there at the start
            self._calls.add("look", slot, look_at_place(self._config, slot.role, self._group, slot.bundle))
        return Lost(role=slot.role, worker=slot.index, reason=reason_of(reason))

    def _late(self) -> list[Event]:
        """Workers that should have been heard of, looked for from time to time."""
        now = time.monotonic()
        if now < self._looked_at + POLL_SECONDS:
            return []
        self._looked_at = now
        self._absence.look()
        late = {}
        for call in self._calls.late(now):
            late[call.slot] = f"{call.kind} took longer than {call.limit}"
            is_setup = call.kind in ("look", "setup")
            if is_setup and call.slot.role != "learner" and not self._is_starting:
                waits_for = self._absence.waits_for(call.slot)
                raise FAILED[call.slot.role](f"{call.slot} is not back: {late[call.slot]}; {waits_for}")
            if call.slot.role == "learner" or is_setup:
                raise WorkerLostError(f"{call.slot} does not answer: {late[call.slot]}")
        silence = self._calls.silence
        for slot in self._rollouts:
            if slot.num_writing and slot.heard_at + silence.seconds < now:
                late[slot] = f"it wrote nothing within {silence}"
        return [self._lose(slot, reason) for slot, reason in late.items()]

    def _failures(self, futures: Sequence[ray.ObjectRef]) -> list[str]:
        """What the ranks say of a non-finite loss, once all have saved their share of the batch or time is up."""
        done, late = ray.wait(list(futures), num_returns=len(futures), timeout=SAVE_SECONDS)
        messages = []
        for future in done:
            try:
                self._answers.get(future)
            except (TopdError, RayError) as error:
                messages.append(str(error) if isinstance(error, NonFiniteLossError) else reason_of(error))
        ranks = self._calls.of(kind="learn")
        return messages + [f"{ranks[one].slot} has not answered within {SAVE_SECONDS:g} s" for one in late]

    # What is done when it returns

    def publish_weights(self) -> int:
        self.publish()
        assert self._newest is not None, "it has just been published"
        while not all(slot.is_ready for slot in self._crew.slots) or not self._all_serve_newest():
            self._check_interrupt()
            self.wait()
        return int(ray.get(self._newest).version)

    def _all_serve_newest(self) -> bool:
        return not self._calls.of(kind="update_weights") and all(slot.version is not None for slot in self._rollouts)

    def evaluate(
        self, prompts: Sequence[Prompt], *, model: str, evaluation: EvaluationConfig, seed: int
    ) -> Iterator[Completions]:
        """By workers that are there; one that is being made anew still has the weights it was loaded with."""
        if model == "student":
            slots = [slot for slot in self._rollouts if slot.version is not None]
        else:
            slots = [slot for slot in self._teachers if slot.is_ready]
        if not slots:
            raise WorkerLostError(f"no worker is there to evaluate the {model}")
        shares = split_evenly(prompts, len(slots))
        methods = [slot.actor.evaluate for slot, _ in zip(slots, shares, strict=False)]
        return self._answers.stream(methods, shares, self._calls.silence, evaluation=evaluation, seed=seed)

    def own_teacher(self, requests: Sequence[RolloutRequest]) -> list[GuidedItem]:
        future = self._rollouts[0].actor.own_teacher.remote(requests, self._config.teacher.top_k)
        return list(self._answers.fetch([future], self._calls.silence)[0])

    def preflight(self, items: list[GuidedItem]) -> LearnerCheck:
        check: LearnerCheck = self._on_all_ranks("preflight", items)[0]
        return check

    def verify_teacher(self, requests: Sequence[RolloutRequest]) -> float | None:
        limit = self._calls.silence
        (chunks,) = self._answers.fetch([self._rollouts[0].actor.generate_whole.remote(requests)], limit)
        differences = self._answers.fetch([slot.actor.verify.remote(chunks) for slot in self._teachers], limit)
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
        futures = [getattr(slot.actor, method).remote(*args) for slot in self._learners]
        return self._answers.fetch(futures, self._calls.silence)
