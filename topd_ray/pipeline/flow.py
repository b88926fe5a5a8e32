"""The whole algorithm, as what the driver decides: who writes, who guides, when to learn, what is too old.

    tasks -> rollout workers (student writes) -> teachers (scores, near futures, sparse targets)
          -> buffer -> learner (one update) -> new weights for the rollout workers -> ...

A task is one trajectory that is to be trained on exactly once. The learner's version L counts its updates. With
pipeline.max_staleness S, at most S + 1 batches of tasks are open at a time, and a trajectory whose oldest token was
written by version v may be trained on while L - v <= S. S = 0 is the synchronous run: a batch is drawn when the last
one is trained on, and written by workers that serve the newest policy.

Nothing here knows a tensor or Ray: a fleet (`pipeline.fleet`) carries the commands out and reports events. What
becomes of the tasks that a failure takes along is in `pipeline.faults`.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from topd_ray.actors.buffer import TrajectoryBuffer
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
from topd_ray.actors.messages import GuidedItem, Lease, RolloutChunk
from topd_ray.actors.sharing import by_prompt, split_evenly, split_requests
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import TopdError
from topd_ray.pipeline.faults import Blame
from topd_ray.pipeline.fleet import FlowFleet
from topd_ray.pipeline.gauges import Gauges
from topd_ray.pipeline.tasks import Task, Tasks
from topd_ray.types import Metric, UpdateReport

TEACHER_CALLS_IN_FLIGHT = 2
"""Calls a teacher worker holds: one on its engine, one whose transport runs or that waits for the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What was done up to and with one update."""

    policy_version: int
    items: tuple[GuidedItem, ...]
    """trained on, in the order of policy versions and ids"""
    tasks: tuple[Task, ...]
    """the same ones"""
    quarantined: tuple[tuple[Task, str], ...]
    """given up since the last update, each with the reason"""
    num_dropped: int
    """thrown away for their age since the last update, and drawn again"""
    metrics: tuple[Metric, ...]


class Flow:
    """Runs a fleet from update to update. `threshold` gives the transport distance that parts false alarms."""

    def __init__(
        self,
        config: TopdConfig,
        fleet: FlowFleet,
        tasks: Tasks,
        *,
        reopened: Sequence[Task] = (),
        updates_left: int,
        policy_version: int,
        threshold: Callable[[], float],
        check_interrupt: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """All workers serve `policy_version`; `reopened` are tasks that a checkpoint left open."""
        num_rollouts, num_teachers = config.rollout.num_workers, config.teacher.num_workers
        self._config = config
        self._fleet = fleet
        self._tasks = tasks
        self._updates_left = updates_left
        self._version = policy_version
        self._threshold = threshold
        self._check_interrupt = check_interrupt
        self._say = say
        self._max_staleness = config.pipeline.max_staleness
        self._to_write: deque[Task] = deque()
        self._to_write_alone: deque[Task] = deque()
        self._writing: list[dict[str, Task]] = [{} for _ in range(num_rollouts)]
        self._serves: list[int | None] = [policy_version] * num_rollouts
        self._to_guide: deque[RolloutChunk] = deque()
        self._guiding: list[list[tuple[RolloutChunk, ...]]] = [[] for _ in range(num_teachers)]
        self._teacher_ready = [True] * num_teachers
        self._guided_by: dict[str, int] = {}
        self._to_put: list[GuidedItem] = []
        self._buffer = TrajectoryBuffer(config.buffer)
        self._lease: Lease | None = None
        self._trained: tuple[GuidedItem, ...] | None = None
        self._blame = Blame(config.faults)
        self._quarantined: list[tuple[Task, str]] = []
        self._num_dropped = 0
        self._gauges = Gauges(num_rollouts, num_teachers)
        self._open(reopened)

    # What is decided

    def update(self) -> Update:
        """Go on until one more update is made; a synchronous run also until all workers serve the new policy."""
        self._gauges.watch.start("rollout_and_look_ahead")
        while self._trained is None or (self._max_staleness == 0 and not self._all_serve_newest()):
            if self._trained is None:
                self._draw()
                self._write()
                self._guide()
                self._learn()
            self._listen()
        items, self._trained = self._trained, None
        quarantined, self._quarantined = self._quarantined, []
        num_dropped, self._num_dropped = self._num_dropped, 0
        return Update(
            policy_version=self._version,
            items=items,
            tasks=tuple(self._close(item.trajectory_id for item in items)),
            quarantined=tuple(quarantined),
            num_dropped=num_dropped,
            metrics=self._gauges.take(
                {
                    "staleness/dropped": num_dropped,
                    "faults/quarantined": len(quarantined),
                    "queue/rollout": len(self._to_write) + len(self._to_write_alone),
                    "queue/writing": sum(map(len, self._writing)),
                    "queue/teacher": sum(len(chunk.trajectory_ids) for chunk in self._to_guide),
                    "queue/buffer": self._buffer.num_waiting,
                    "queue/bytes": self._buffer.num_bytes,
                }
            ),
        )

    def drain(self) -> None:
        """Wait until no engine has anything to do and all serve the newest policy, as an evaluation wants it."""
        while any(self._writing) or any(self._guiding) or not self._all_serve_newest():
            self._guide()
            self._listen()

    def _draw(self) -> None:
        batch = self._config.batch_size
        while len(self._tasks) + batch <= batch * min(self._max_staleness + 1, self._updates_left):
            self._open(self._tasks.draw())

    def _write(self) -> None:
        """Hand open tasks to rollout workers whose policy is young enough, unless the buffer is full."""
        if self._to_put or not (self._to_write or self._to_write_alone):
            return
        able = [
            worker
            for worker, version in enumerate(self._serves)
            if version is not None
            and self._version - version <= self._max_staleness
            and not any(self._blame.is_lone(task) for task in self._writing[worker].values())
        ]
        for worker in [worker for worker in able if not self._writing[worker]]:
            if self._to_write_alone:
                self._hand_out(worker, [self._to_write_alone.popleft()])
                able.remove(worker)
        if self._config.run.deterministic:
            self._write_own_shares(able)
        elif able:
            self._write_least_busy(able)

    def _write_own_shares(self, able: Sequence[int]) -> None:
        """Each worker its own share of the batch in the order it was drawn, also when it has to be written again."""
        for worker in able:
            share = sorted((task for task in self._to_write if task.worker == worker), key=lambda task: task.order)
            if share and not self._writing[worker]:
                self._to_write = deque(task for task in self._to_write if task.worker != worker)
                self._hand_out(worker, share)

    def _write_least_busy(self, able: Sequence[int]) -> None:
        """Whole prompts, whose samples share a prefix cache, as far as the engines have room, and a little more."""
        most = self._config.rollout.max_num_seqs * 5 // 4
        load = {worker: len(self._writing[worker]) for worker in able}
        room = sum(max(most - busy, 0) for busy in load.values())
        taken = [self._to_write.popleft() for _ in range(min(room, len(self._to_write)))]
        shares: dict[int, list[Task]] = {}
        for prompt in by_prompt(taken):
            worker = min(load, key=load.__getitem__)
            load[worker] += len(prompt)
            shares.setdefault(worker, []).extend(prompt)
        for worker, share in shares.items():
            self._hand_out(worker, share)

    def _hand_out(self, worker: int, tasks: Sequence[Task]) -> None:
        for task in tasks:
            task.worker, task.version = worker, self._serves[worker]
            self._writing[worker][task.trajectory_id] = task
        self._gauges.busy("rollout", worker)
        self._fleet.write(worker, [task.request for task in tasks])

    def _guide(self) -> None:
        """Hand finished trajectories to the least busy teachers; those that are tried alone, to idle ones."""
        if self._to_put or not self._to_guide:
            return
        if self._config.run.deterministic:
            self._guide_in_order()
            return
        load = {
            teacher: len(calls)
            for teacher, calls in enumerate(self._guiding)
            if self._teacher_ready[teacher] and not any(self._has_lone(call) for call in calls)
        }
        for chunk in [chunk for chunk in self._to_guide if self._has_lone((chunk,))]:
            self._to_guide.remove(chunk)
            if idle := [teacher for teacher, busy in load.items() if not busy]:
                self._ask_teacher(idle[0], (chunk,))
                del load[idle[0]]
            else:
                self._to_guide.append(chunk)
        company = [chunk for chunk in self._to_guide if not self._has_lone((chunk,))]
        least = min(load.values(), default=TEACHER_CALLS_IN_FLIGHT)
        if not company or least >= TEACHER_CALLS_IN_FLIGHT:
            return
        idle = [teacher for teacher, busy in load.items() if busy == least]
        for teacher, share in zip(idle, split_evenly(company, len(idle)), strict=False):
            self._ask_teacher(teacher, tuple(share))
        self._to_guide = deque(chunk for chunk in self._to_guide if self._has_lone((chunk,)))

    def _guide_in_order(self) -> None:
        """Once all is written, each rollout worker's chunk to a teacher of its own."""
        if self._to_write or self._to_write_alone or any(self._writing):
            return
        for chunk in sorted(self._to_guide, key=lambda chunk: chunk.trajectory_ids):
            worker = self._tasks[chunk.trajectory_ids[0]].worker
            assert worker is not None, "it was written by one"
            teacher = worker % len(self._guiding)
            if self._teacher_ready[teacher] and not any(self._has_lone(call) for call in self._guiding[teacher]):
                self._to_guide.remove(chunk)
                self._ask_teacher(teacher, (chunk,))

    def _ask_teacher(self, teacher: int, chunks: tuple[RolloutChunk, ...]) -> None:
        self._guiding[teacher].append(chunks)
        self._gauges.busy("teacher", teacher)
        self._fleet.guide(teacher, chunks, self._threshold())

    def _learn(self) -> None:
        """Start an update once a batch is there."""
        if self._to_put:
            del self._to_put[: self._buffer.put(self._to_put)]
        batch = min(self._config.batch_size, len(self._tasks))
        if self._lease is not None or batch == 0 or self._would_strand():
            return
        self._lease = self._buffer.take(batch, first=self._tasks.drawn_again)
        if self._lease is not None:
            self._gauges.watch.stop("rollout_and_look_ahead")
            self._gauges.watch.start("learn")
            self._gauges.busy("learner", 0)
            self._fleet.learn(self._lease.items)
        elif self._to_put:
            raise TopdError("buffer.max_bytes is too small for the trajectories of one update: raise it")

    def _would_strand(self) -> bool:
        """Whether an update now would make too old, once more, what is being drawn for the second time.

        So a trajectory is dropped at most once for its age: the learner waits for those that take longest.
        """
        limit = self._version - self._max_staleness
        return self._max_staleness > 0 and any(
            task.version is not None and task.version <= limit and one not in self._guided_by
            for one, task in self._tasks.drawn_again.items()
        )

    # What has happened

    def _listen(self) -> None:
        if self._lease is None and self._trained is None:  # an update must come to its end
            self._check_interrupt()
        for event in self._fleet.wait():
            self._handle(event)

    def _handle(self, event: Event) -> None:
        match event:
            case Written(worker=worker, chunk=chunk):
                self._take_in_written(worker, chunk)
            case Guided(teacher=teacher, sources=sources, chunk=chunk):
                self._end_call(teacher, sources)
                self._take_in_guided(teacher, chunk.items)
                self._gauges.add(chunk.metrics)
            case GuideUnreadable(teacher=teacher, sources=sources):
                self._end_call(teacher, sources)
                self._again(one for source in sources for one in source.trajectory_ids)
            case Learned(report=report):
                self._take_in_update(report)
            case LearnUnreadable():
                lost = [item.trajectory_id for item in self._leased_items]
                self._end_lease()
                self._again(lost)
            case Published(worker=worker, version=version, metrics=metrics):
                self._serves[worker] = version
                self._gauges.add(metrics)
                if self._all_serve_newest():
                    self._gauges.watch.stop("publish_weights")
            case Ready(teacher=teacher):
                self._teacher_ready[teacher] = True
            case Lost(role=role, worker=worker, reason=reason):
                self._say(f"{role} worker {worker} is lost and made anew: {reason}")
                (self._lose_rollout if role == "rollout" else self._lose_teacher)(worker, reason)

    def _take_in_written(self, worker: int, chunk: RolloutChunk) -> None:
        for trajectory_id, version in zip(chunk.trajectory_ids, chunk.policy_versions, strict=True):
            self._writing[worker].pop(trajectory_id).version = version
        if not self._writing[worker]:
            self._gauges.idle("rollout", worker)
        self._gauges.count("rollout/tokens", sum(chunk.num_tokens))
        self._to_guide.append(chunk)

    def _take_in_guided(self, teacher: int, items: Sequence[GuidedItem]) -> None:
        self._gauges.count("teacher/tokens", sum(item.num_tokens for item in items))
        young = [item for item in items if not self._is_too_old(item.policy_version)]
        self._guided_by.update((item.trajectory_id, teacher) for item in young)
        self._drop([item.trajectory_id for item in items if self._is_too_old(item.policy_version)])
        self._to_put += young

    def _take_in_update(self, report: UpdateReport) -> None:
        self._trained = self._leased_items
        self._gauges.add(report.metrics)
        self._gauges.trained(self._trained, self._version)
        self._end_lease()
        self._version = report.policy_version
        self._updates_left -= 1
        too_old = [item.trajectory_id for item in self._to_put if self._is_too_old(item.policy_version)]
        self._drop([*too_old, *self._buffer.older_than(self._version - self._max_staleness)])
        self._gauges.watch.start("publish_weights")
        self._fleet.publish()

    def _lose_rollout(self, worker: int, reason: str) -> None:
        """What it was writing is drawn again, and what it wrote and no teacher has read, for that is lost with it."""
        self._serves[worker] = None
        writing, self._writing[worker] = self._writing[worker], {}
        unread = [chunk for chunk in self._to_guide if self._tasks[chunk.trajectory_ids[0]].worker == worker]
        self._to_guide = deque(chunk for chunk in self._to_guide if chunk not in unread)
        self._gauges.idle("rollout", worker)
        self._gauges.count("faults/restarts_rollout", 1)
        self._fail(list(writing.values()), reason)
        self._again(one for chunk in unread for one in chunk.trajectory_ids)

    def _lose_teacher(self, teacher: int, reason: str) -> None:
        """It is asked again for what it was asked; what it guided and nobody has learnt from is drawn again."""
        self._teacher_ready[teacher] = False
        calls, self._guiding[teacher] = self._guiding[teacher], []
        self._gauges.idle("teacher", teacher)
        self._gauges.count("faults/restarts_teacher", 1)
        chunks = [chunk for call in calls for chunk in call]
        self._fail([self._tasks[one] for chunk in chunks for one in chunk.trajectory_ids], reason, again=False)
        for chunk in chunks:
            left = [one for one in chunk.trajectory_ids if one in self._tasks]
            if len(left) > 1 and self._has_lone((chunk,)):
                self._again(left)
            elif left:
                self._to_guide.append(chunk)
        leased = {item.trajectory_id for item in self._leased_items}
        lost = [one for one, by in self._guided_by.items() if by == teacher and one not in leased]
        self._buffer.discard(lost)
        self._to_put = [item for item in self._to_put if item.trajectory_id not in set(lost)]
        self._again(lost)

    # Tasks

    def _open(self, tasks: Sequence[Task]) -> None:
        if self._config.run.deterministic:
            shares = split_requests([task.request for task in tasks], len(self._writing))
            for worker, share in enumerate(shares):
                for request in share:
                    self._tasks[request.trajectory_id].worker = worker
        self._to_write.extend(tasks)

    def _again(self, trajectory_ids: Iterable[str]) -> None:
        """Tasks whose trajectory is gone go back to where they are written."""
        for one in trajectory_ids:
            task = self._tasks[one]
            task.version = None
            self._guided_by.pop(one, None)
            (self._to_write_alone if self._blame.is_lone(task) else self._to_write).append(task)

    def _drop(self, trajectory_ids: Collection[str]) -> None:
        """Throw away what is too old, and draw it again."""
        self._buffer.discard(trajectory_ids)
        self._to_put = [item for item in self._to_put if item.trajectory_id not in trajectory_ids]
        self._tasks.note_drawn_again(trajectory_ids)
        self._num_dropped += len(trajectory_ids)
        self._again(trajectory_ids)

    def _fail(self, tasks: Sequence[Task], reason: str, *, again: bool = True) -> None:
        """A worker failed with `tasks`: they are tried again, or given up."""
        given_up = self._blame.put_on(tasks)
        for task in given_up:
            self._quarantined.append((task, reason))
            self._say(f"trajectory {task.trajectory_id} is given up: a worker fails whenever it has it: {reason}")
        self._close(task.trajectory_id for task in given_up)
        if again:
            self._again(task.trajectory_id for task in tasks if task.trajectory_id in self._tasks)

    def _close(self, trajectory_ids: Iterable[str]) -> list[Task]:
        closed = self._tasks.close(trajectory_ids)
        for task in closed:
            self._guided_by.pop(task.trajectory_id, None)
        return closed

    def _end_call(self, teacher: int, sources: tuple[RolloutChunk, ...]) -> None:
        self._guiding[teacher].remove(sources)
        if not self._guiding[teacher]:
            self._gauges.idle("teacher", teacher)

    def _end_lease(self) -> None:
        assert self._lease is not None, "an update is under way"
        self._buffer.acknowledge(self._lease.lease_id)
        self._lease = None
        self._gauges.watch.stop("learn")
        self._gauges.idle("learner", 0)

    @property
    def _leased_items(self) -> tuple[GuidedItem, ...]:
        return () if self._lease is None else self._lease.items

    def _has_lone(self, chunks: Sequence[RolloutChunk]) -> bool:
        ids = (one for chunk in chunks for one in chunk.trajectory_ids)
        return any(self._blame.is_lone(self._tasks[one]) for one in ids if one in self._tasks)

    def _is_too_old(self, version: int) -> bool:
        return self._version - version > self._max_staleness

    def _all_serve_newest(self) -> bool:
        """Workers that are being made anew excepted, if there are others."""
        versions = [version for version in self._serves if version is not None]
        return bool(versions) and all(version == self._version for version in versions)
