"""A fleet without workers, in virtual time: it plays what a script says, and checks what the driver may ask of it.

Rollout workers, teachers and the learner take as long as the script says, die when it says or whenever they have a
poison trajectory, and take what they hold along. Every command that breaks a rule fails the test at once.
"""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
from topd_ray.actors.messages import GuidedChunk, GuidedItem, RolloutChunk
from topd_ray.actors.restarts import RestartBudget
from topd_ray.config.schema import TopdConfig
from topd_ray.data.schedule import PromptSchedule
from topd_ray.pipeline.faults import LONE_ATTEMPTS
from topd_ray.pipeline.flow import Flow, Update
from topd_ray.pipeline.guiding import CALLS_IN_FLIGHT
from topd_ray.pipeline.tasks import Task, Tasks
from topd_ray.types import Prompt, RolloutRequest, UpdateReport

NUM_PROMPTS = 400


@dataclass(kw_only=True)
class Script:
    """What happens. Seconds are virtual."""

    seconds: Callable[[str, str], float] = lambda kind, key: 1.0
    """of `write`, `queue` (before it begins), `guide`, `learn`, `publish`, `replace` and `die` (of poison)"""
    deaths: Sequence[tuple[float, str, int]] = ()
    """(when, role, worker)"""
    poison: Collection[tuple[str, str]] = ()
    """(role, trajectory id): a worker of this role dies whenever it has this trajectory"""
    loses_payload: Callable[[str], bool] = lambda kind: False
    """whether a `guide` or `learn` cannot read what it is asked for, all workers being alive"""
    num_bytes: Callable[[str], int] = lambda trajectory_id: 1

    @classmethod
    def random(cls, seed: int, **fields: Any) -> "Script":
        """Long tails, and every order of events."""
        choose = random.Random(seed)
        seconds = {
            "write": (1, 2, 3, 5, 40),
            "queue": (0, 0, 0, 2, 9),
            "guide": (1, 2, 6, 30),
            "learn": (1, 4, 9),
            "publish": (0, 1, 2, 12),
            "replace": (1, 5, 60),
            "die": (0, 1, 4),
        }
        return cls(seconds=lambda kind, key: choose.choice(seconds[kind]), **fields)


@dataclass(eq=False)
class Worker:
    role: str
    index: int
    version: int
    budget: RestartBudget
    is_up: bool = True
    """takes calls"""
    is_loaded: bool = True
    """takes weights"""
    life: int = 0
    """deaths so far"""
    has: list[tuple[str, ...]] = field(default_factory=list)
    """ids of trajectories, by call"""
    busy_until: float = 0.0
    """of a teacher, which serves one call after the other; of a rollout worker, when it has the last weights"""

    @property
    def ids(self) -> list[str]:
        return [one for call in self.has for one in call]


class ScriptedFleet:
    """`writes`, `guides`, `batches` and `failures` tell what was asked and what failed.

    Runs go on beyond faults.max_restarts; `worn_out` holds the workers for which a real one would have ended.
    """

    def __init__(self, config: TopdConfig, script: Script, version: int = 0) -> None:
        self._config = config
        self._script = script
        self._limit = config.faults.max_attempts
        self._numbers = itertools.count()
        self._agenda: list[tuple[float, int, Callable[[], Iterable[Event]]]] = []
        self._lone = config.faults.max_attempts - LONE_ATTEMPTS
        self.now = 0.0
        self.version = version
        self.is_learning = False
        numbers = {"rollout": config.rollout.num_workers, "teacher": config.teacher.num_workers}
        self.workers = {
            role: [
                Worker(role, index, version, RestartBudget(config.faults, lambda: self.now)) for index in range(number)
            ]
            for role, number in numbers.items()
        }
        self.worn_out: set[tuple[str, int]] = set()
        self.failures: Counter[str] = Counter()
        self.lone_failures: Counter[str] = Counter()
        self.open: set[str] = set()
        self.trained: list[str] = []
        self.writes: list[tuple[int, tuple[str, ...]]] = []
        self.guides: list[tuple[int, tuple[str, ...]]] = []
        self.batches: list[list[GuidedItem]] = []
        self.ages: list[int] = []
        for when, role, index in script.deaths:
            worker = self.workers[role][index % len(self.workers[role])]
            self._at(when, lambda worker=worker: self._die(worker, "scripted"))

    # Commands

    def write(self, worker: int, requests: Sequence[RolloutRequest]) -> None:
        ids = tuple(request.trajectory_id for request in requests)
        one = self.workers["rollout"][worker]
        assert one.is_up, "asked while lost"
        assert one.version >= self.version - self._config.pipeline.max_staleness, "its policy is too old to begin"
        held = [other for role in self.workers.values() for each in role for other in each.ids]
        assert len(set(ids)) == len(ids) > 0 and not set(ids) & {*held, *self.trained}, "written twice"
        self.open |= set(ids)
        limit = self._config.batch_size * (self._config.pipeline.max_staleness + 1)
        assert len(self.open) <= limit, "more than S + 1 batches are open"
        self.writes.append((worker, ids))
        self._take_on(one, ids)
        if self._config.run.deterministic:
            self._later("write", ids[0], lambda: self._written(one, ids, [one.version] * len(ids)), one)
        else:
            for each in ids:
                self._later("queue", each, lambda each=each: self._begin(one, each), one)

    def guide(self, teacher: int, chunks: Sequence[RolloutChunk], threshold: float) -> None:
        one = self.workers["teacher"][teacher]
        assert one.is_up, "asked while lost"
        assert len(one.has) < CALLS_IN_FLIGHT, "too many calls"
        assert threshold == 0.25
        ids = tuple(each for chunk in chunks for each in chunk.trajectory_ids)
        held = [other for role in self.workers.values() for each in role for other in each.ids]
        assert len(set(ids)) == len(ids) > 0 and not set(ids) & {*held, *self.trained}, "guided twice"
        self.guides.append((teacher, ids))
        self._take_on(one, ids)
        one.busy_until = max(self.now, one.busy_until) + self._script.seconds("guide", ids[0])
        is_lost = self._script.loses_payload("guide") or not all(self._is_there(chunk.handle) for chunk in chunks)
        self._at(one.busy_until, lambda: self._guided(one, ids, tuple(chunks), is_lost), one)

    def learn(self, items: Sequence[GuidedItem]) -> None:
        assert not self.is_learning, "one at a time"
        self.is_learning = True
        ids = [item.trajectory_id for item in items]
        assert len(set(ids)) == len(ids) and set(ids) <= self.open
        assert len(ids) == min(self._config.batch_size, len(self.open)), "neither a batch nor all that is left"
        ages = [self.version - item.policy_version for item in items]
        assert min(ages) >= 0 and max(ages) <= self._config.pipeline.max_staleness, "too old"
        is_lost = self._script.loses_payload("learn") or not all(self._is_there(item.handle) for item in items)
        self._later("learn", ids[0], lambda: self._learnt(items, ages, is_lost))

    def publish(self) -> None:
        for one in self.workers["rollout"]:
            if one.is_loaded:
                self._send_weights(one)

    def excuse(self, role: str) -> None:
        for one in self.workers[role]:
            one.budget.excuse()

    def wait(self) -> list[Event]:
        """All events of the next moment at which there are some."""
        events: list[Event] = []
        while not events:
            assert self._agenda, "the driver waits, and nothing is under way"
            self.now = self._agenda[0][0]
            while self._agenda and self._agenda[0][0] == self.now:
                events += heapq.heappop(self._agenda)[2]()
        return _together(events)

    # Workers

    def _at(self, when: float, act: Callable[[], Iterable[Event]], worker: Worker | None = None) -> None:
        """Do something then, unless `worker` has died in the meantime."""
        life = worker.life if worker else 0
        heapq.heappush(
            self._agenda,
            (when, next(self._numbers), lambda: act() if worker is None or worker.life == life else ()),
        )

    def _later(self, kind: str, key: str, act: Callable[[], Iterable[Event]], worker: Worker | None = None) -> None:
        self._at(self.now + self._script.seconds(kind, key), act, worker)

    def _take_on(self, worker: Worker, ids: tuple[str, ...]) -> None:
        if self._config.run.deterministic or worker.role == "teacher":
            worker.has.append(ids)
        else:
            worker.has += [(each,) for each in ids]
        for each in worker.ids:
            assert self.failures[each] < self._lone or len(worker.ids) == 1, f"{each} is to be tried alone"
        if any((worker.role, each) in self._script.poison for each in ids):
            self._later("die", ids[0], lambda: self._die(worker, "poisoned"), worker)

    def _begin(self, worker: Worker, trajectory_id: str) -> Iterable[Event]:
        if ("rollout", trajectory_id) not in self._script.poison:
            version = worker.version
            act = lambda: self._written(worker, (trajectory_id,), [version])  # noqa: E731
            self._later("write", trajectory_id, act, worker)
        return ()

    def _written(self, worker: Worker, ids: tuple[str, ...], versions: Sequence[int]) -> Iterable[Event]:
        if any(("rollout", each) in self._script.poison for each in ids):
            return
        worker.has.remove(ids)
        worker.budget.progressed()
        chunk = RolloutChunk(
            handle=(worker, worker.life),
            trajectory_ids=tuple(sorted(ids)),
            policy_versions=tuple(versions),
            num_tokens=(3,) * len(ids),
            metrics=(),
        )
        yield Written(worker=worker.index, chunk=chunk)

    def _guided(
        self, worker: Worker, ids: tuple[str, ...], chunks: tuple[RolloutChunk, ...], is_lost: bool
    ) -> Iterable[Event]:
        if any(("teacher", each) in self._script.poison for each in ids):
            return
        worker.has.remove(ids)
        if is_lost:
            yield GuideUnreadable(teacher=worker.index, sources=chunks, reason="gone")
            return
        worker.budget.progressed()
        items = [
            GuidedItem(
                handle=(worker, worker.life),
                row=0,
                trajectory_id=each,
                policy_version=version,
                num_tokens=3,
                num_sequence_tokens=5,
                num_guided=1.0,
                num_bytes=self._script.num_bytes(each),
                distances=(),
            )
            for chunk in chunks
            for each, version in zip(chunk.trajectory_ids, chunk.policy_versions, strict=True)
        ]
        yield Guided(teacher=worker.index, sources=chunks, chunk=GuidedChunk(items=tuple(items), metrics=()))

    def _learnt(self, items: Sequence[GuidedItem], ages: Sequence[int], is_lost: bool) -> Iterable[Event]:
        self.is_learning = False
        if is_lost:
            yield LearnUnreadable(reason="gone")
            return
        ids = [item.trajectory_id for item in items]
        assert not set(ids) & set(self.trained), "trained on twice"
        self.trained += ids
        self.open -= set(ids)
        self.batches.append(list(items))
        self.ages += ages
        self.version += 1
        yield Learned(report=UpdateReport(policy_version=self.version, metrics=()))

    def _send_weights(self, worker: Worker) -> None:
        version = self.version
        worker.busy_until = max(worker.busy_until, self.now + self._script.seconds("publish", str(worker.index)))
        self._at(worker.busy_until, lambda: self._serve(worker, version), worker)

    def _serve(self, worker: Worker, version: int) -> Iterable[Event]:
        worker.version = version
        worker.is_up = True
        yield Published(worker=worker.index, version=version)

    def _die(self, worker: Worker, reason: str) -> Iterable[Event]:
        if not worker.is_loaded:
            return
        if not worker.budget.spend():
            self.worn_out.add((worker.role, worker.index))
        self.failures.update(worker.ids)
        self.lone_failures.update(worker.ids if len(worker.ids) == 1 else ())
        self.open -= {each for each in worker.ids if self.failures[each] >= self._limit}
        worker.has, worker.is_up, worker.is_loaded, worker.busy_until = [], False, False, 0.0
        worker.life += 1
        self._later("replace", str(worker.index), lambda: self._replaced(worker), worker)
        yield Lost(role=worker.role, worker=worker.index, reason=reason)

    def _replaced(self, worker: Worker) -> Iterable[Event]:
        worker.is_loaded = True
        if worker.role == "rollout":
            self._send_weights(worker)
        else:
            worker.is_up = True
            yield Ready(teacher=worker.index)

    @staticmethod
    def _is_there(handle: tuple[Worker, int]) -> bool:
        worker, life = handle
        return worker.life == life


def _together(events: Sequence[Event]) -> list[Event]:
    """What a rollout worker has finished at the same moment, as one chunk."""
    merged: list[Event] = []
    place: dict[int, int] = {}
    for event in events:
        if not isinstance(event, Written) or place.setdefault(event.worker, len(merged)) == len(merged):
            merged.append(event)
            continue
        first = merged[place[event.worker]]
        assert isinstance(first, Written)
        fields = ("trajectory_ids", "policy_versions", "num_tokens")
        both = {name: getattr(first.chunk, name) + getattr(event.chunk, name) for name in fields}
        merged[place[event.worker]] = replace(first, chunk=replace(first.chunk, **both))
    return merged


class CountingTasks(Tasks):
    """Counts how often each task was thrown away for its age."""

    num_drops: Counter[str]

    def note_drawn_again(self, trajectory_ids: Iterable[str]) -> None:
        ids = list(trajectory_ids)
        self.num_drops.update(ids)
        super().note_drawn_again(ids)


def make_config(**sections: dict[str, Any]) -> TopdConfig:
    """Of models that do not exist; 2 prompts x 2 samples a batch."""
    rollout = {"prompts_per_step": 2, "samples_per_prompt": 2, **sections.pop("rollout", {})}
    teacher = {"model": "t", **sections.pop("teacher", {})}
    return TopdConfig.model_validate({"student": {"model": "s"}, "teacher": teacher, "rollout": rollout, **sections})


def make_tasks(config: TopdConfig) -> CountingTasks:
    """Of prompts p0, p1, ... in this order."""
    prompts = [Prompt(prompt_id=f"p{index}", token_ids=(1,)) for index in range(NUM_PROMPTS)]
    names = [prompt.prompt_id for prompt in prompts]
    schedule = PromptSchedule(names, config.rollout.prompts_per_step, seed=0, shuffle=False)
    tasks = CountingTasks(schedule, prompts, config.rollout.samples_per_prompt, seed=0)
    tasks.num_drops = Counter()
    return tasks


@dataclass
class Run:
    """A flow of a script, with what it did."""

    config: TopdConfig
    script: Script
    num_updates: int
    tasks: CountingTasks = field(init=False)
    updates: list[Update] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tasks = make_tasks(self.config)
        self.fleet = ScriptedFleet(self.config, self.script)
        self.flow = self.start(self.fleet, (), self.num_updates)

    def start(self, fleet: ScriptedFleet, reopened: Sequence[Task], updates_left: int, **more: Any) -> Flow:
        return Flow(
            self.config,
            fleet,
            self.tasks,
            reopened=reopened,
            updates_left=updates_left,
            policy_version=fleet.version,
            threshold=lambda: 0.25,
            **more,
        )

    def play(self) -> "Run":
        while len(self.updates) < self.num_updates:
            self.updates.append(self.flow.update())
        return self

    @property
    def quarantined(self) -> list[str]:
        return [task.trajectory_id for update in self.updates for task, _ in update.quarantined]

    def metric(self, key: str) -> list[float]:
        return [metric.sum for update in self.updates for metric in update.metrics if metric.key == key]

    def check(self) -> None:
        """What has to be true of every run, beside what the fleet has checked."""
        drawn = self.tasks.position * self.config.rollout.samples_per_prompt
        assert len(self.fleet.trained) + len(self.quarantined) + len(self.tasks) == drawn
        assert len(self.tasks) == 0, "all is done with at the end"
        assert set(self.fleet.trained).isdisjoint(self.quarantined)
        assert [[item.trajectory_id for item in update.items] for update in self.updates] == [
            [item.trajectory_id for item in batch] for batch in self.fleet.batches
        ]
        assert [[task.trajectory_id for task in update.tasks] for update in self.updates] == [
            [item.trajectory_id for item in batch] for batch in self.fleet.batches
        ]
        assert [update.policy_version for update in self.updates] == list(range(1, self.num_updates + 1))
        limit = self.config.faults.max_attempts
        assert set(self.quarantined) == {one for one, number in self.fleet.failures.items() if number >= limit}
        assert all(self.fleet.lone_failures[one] >= 2 for one in self.quarantined)
        assert max(self.metric("queue/bytes")) <= self.config.buffer.max_bytes
        assert sum(update.num_dropped for update in self.updates) == sum(self.tasks.num_drops.values())
