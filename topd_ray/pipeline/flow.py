"""The whole algorithm, as what the driver decides: who writes, who guides, when to learn, what is too old.

    tasks -> rollout workers (student writes) -> teachers (scores, near futures, sparse targets)
          -> buffer -> learner (one update) -> new weights for the rollout workers -> ...

A task is one trajectory that is to be trained on exactly once. The learner's version L counts its updates. With
pipeline.max_staleness S, at most S + 1 batches of tasks are open at a time, and a trajectory whose oldest token was
written by version v may be trained on while L - v <= S. S = 0 is the synchronous run: a batch is drawn when the last
one is trained on, and written by workers that serve the newest policy.

An open task is in one place at a time: waiting to be written, with a rollout worker, in a chunk that waits for a
teacher, with a teacher, in front of the buffer, in it, or with the learner. What a failure takes along goes back to
where it is written. A task that may be why workers fail (`pipeline.faults`) is then tried alone on a worker.

Nothing here knows a tensor or Ray: a fleet (`pipeline.fleet`) carries the commands out and reports events.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
from topd_ray.actors.messages import GuidedItem, RolloutChunk
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
    """trained on: first what was dropped before, then in the order of policy versions and ids"""
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
        self._to_write: deque[list[Task]] = deque()  # the samples of a prompt together
        self._to_write_alone: deque[Task] = deque()
        self._writing: list[dict[str, Task]] = [{} for _ in range(num_rollouts)]
        self._serves: list[int | None] = [policy_version] * num_rollouts
        self._to_guide: list[RolloutChunk] = []
        self._to_guide_alone: deque[RolloutChunk] = deque()
        self._guiding: list[list[tuple[RolloutChunk, ...]]] = [[] for _ in range(num_teachers)]
        self._teacher_ready = [True] * num_teachers
        self._guided_by: dict[str, int] = {}
        self._to_put: list[GuidedItem] = []  # does not fit into the buffer
        self._buffer = TrajectoryBuffer(config.buffer)
        self._trained: tuple[tuple[GuidedItem, ...], tuple[Task, ...]] | None = None
        self._blame = Blame(config.faults)
        self._quarantined: list[tuple[Task, str]] = []
        self._num_dropped = 0
        self._gauges = Gauges(num_rollouts, num_teachers)
        self._open(reopened)

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
        (items, tasks), self._trained = self._trained, None
        quarantined, self._quarantined = self._quarantined, []
        num_dropped, self._num_dropped = self._num_dropped, 0
        return Update(
            policy_version=self._version,
            items=items,
            tasks=tasks,
            quarantined=tuple(quarantined),
            num_dropped=num_dropped,
            metrics=self._gauges.take(
                {
                    "staleness/dropped": num_dropped,
                    "faults/quarantined": len(quarantined),
                    "queue/rollout": sum(map(len, self._to_write)) + len(self._to_write_alone),
                    "queue/writing": sum(map(len, self._writing)),
                    "queue/teacher": sum(len(chunk.trajectory_ids) for chunk in self._all_to_guide()),
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

    # What is decided

    def _draw(self) -> None:
        batch = self._config.batch_size
        while len(self._tasks) + batch <= batch * min(self._max_staleness + 1, self._updates_left):
            self._open(self._tasks.draw())

    def _write(self) -> None:
        """Hand open tasks to rollout workers whose policy is young enough, unless the buffer is full."""
        if self._to_put or not (self._to_write or self._to_write_alone):
            return
        oldest = self._oldest_to_write()
        load = {
            worker: len(self._writing[worker])
            for worker, version in enumerate(self._serves)
            if version is not None and version >= oldest and not self._holds_lone(self._writing[worker])
        }
        for worker in _take_idle(load, self._to_write_alone):
            self._hand_out(worker, [self._to_write_alone.popleft()])
        if self._config.run.deterministic:
            self._write_own_shares(load)
        else:
            self._write_least_busy(load)

    def _oldest_to_write(self) -> int:
        """The oldest policy that may begin now: what it writes can at the earliest be in the update after this one.

        While something waits that has been dropped, only the newest, so that it is not too old again.
        """
        if any(task.version is None for task in self._tasks.drawn_again.values()):
            return self._version
        return self._version + bool(self._buffer.leased) - self._max_staleness

    def _write_own_shares(self, load: dict[int, int]) -> None:
        """Each worker its own share of the batch in the order it was drawn, also when it has to be written again."""
        shares: dict[int | None, list[Task]] = {}
        for task in sorted((task for prompt in self._to_write for task in prompt), key=lambda task: task.order):
            shares.setdefault(task.worker, []).append(task)
        for worker in [worker for worker, busy in load.items() if not busy and worker in shares]:
            self._hand_out(worker, shares.pop(worker))
        self._to_write = deque(shares.values())

    def _write_least_busy(self, load: dict[int, int]) -> None:
        """Whole prompts, whose samples share a prefix cache, as far as the engines have room, and a little more."""
        most = self._config.rollout.max_num_seqs * 5 // 4
        shares: dict[int, list[Task]] = {}
        while self._to_write and load:
            worker = min(load, key=load.__getitem__)
            if load[worker] >= most:
                break
            prompt = self._to_write.popleft()
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
        """Hand finished trajectories to the least busy teachers, unless the buffer is full."""
        if self._to_put or not (self._to_guide or self._to_guide_alone):
            return
        load = {
            teacher: len(calls)
            for teacher, calls in enumerate(self._guiding)
            if self._teacher_ready[teacher] and not (calls and self._holds_lone(calls[0][0].trajectory_ids))
        }
        for teacher in _take_idle(load, self._to_guide_alone):
            self._ask_teacher(teacher, (self._to_guide_alone.popleft(),))
        load = {teacher: busy for teacher, busy in load.items() if busy < TEACHER_CALLS_IN_FLIGHT}
        if self._config.run.deterministic:
            self._guide_in_order(load)
        elif self._to_guide and load:
            least = [teacher for teacher, busy in load.items() if busy == min(load.values())]
            for teacher, share in zip(least, split_evenly(self._to_guide, len(least)), strict=False):
                self._ask_teacher(teacher, tuple(share))
            self._to_guide.clear()

    def _guide_in_order(self, load: dict[int, int]) -> None:
        """Once all is written, each rollout worker's chunk to a teacher of its own."""
        if self._to_write or self._to_write_alone or any(self._writing):
            return
        chunks = sorted(self._to_guide, key=lambda chunk: chunk.trajectory_ids)
        self._to_guide.clear()
        for chunk in chunks:
            teacher = self._writer(chunk) % len(self._guiding)
            if load.get(teacher, TEACHER_CALLS_IN_FLIGHT) < TEACHER_CALLS_IN_FLIGHT:
                load[teacher] += 1
                self._ask_teacher(teacher, (chunk,))
            else:
                self._to_guide.append(chunk)

    def _ask_teacher(self, teacher: int, chunks: tuple[RolloutChunk, ...]) -> None:
        self._guiding[teacher].append(chunks)
        self._gauges.busy("teacher", teacher)
        self._fleet.guide(teacher, chunks, self._threshold())

    def _learn(self) -> None:
        """Start an update once a batch is there. What quarantine leaves of the last batches is a smaller one."""
        batch = min(self._config.batch_size, len(self._tasks))
        if self._buffer.leased or (self._would_strand(batch) and not self._to_put):
            return
        items = self._buffer.take(batch, first=self._tasks.drawn_again)
        if items:
            self._gauges.watch.stop("rollout_and_look_ahead")
            self._gauges.watch.start("learn")
            self._gauges.busy("learner", 0)
            self._fleet.learn(items)
        elif self._to_put:
            raise TopdError("buffer.max_bytes is too small for the trajectories of one update: raise it")

    def _would_strand(self, batch: int) -> bool:
        """Whether an update now would leave too little room, in the updates to come, for what was dropped before.

        Of those left by it, number i in the order of age can be trained on when the learner is at L + 1 + i // batch.
        So a trajectory is dropped at most once for its age, if the buffer is not full: the learner waits for those that
        take longest.
        """
        handed_out = [task for task in self._tasks.drawn_again.values() if task.version is not None]
        handed_out.sort(key=lambda task: (task.version, task.trajectory_id))
        guided = [task for task in handed_out if task.trajectory_id in self._guided_by]
        if len(guided) == len(handed_out):
            return False
        left = [task for task in handed_out if task not in guided[:batch]]
        return any(
            self._is_too_old(task.version, self._version + 1 + number // batch)
            for number, task in enumerate(left)
        )

    # What has happened

    def _listen(self) -> None:
        if not self._buffer.leased and self._trained is None:  # an update must come to its end
            self._check_interrupt()
        for event in self._fleet.wait():
            self._handle(event)
        del self._to_put[: self._buffer.put(self._to_put)]

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
                self._again(self._tasks[one] for source in sources for one in source.trajectory_ids)
            case Learned(report=report):
                self._take_in_update(report)
            case LearnUnreadable():
                self._again(self._tasks[item.trajectory_id] for item in self._end_lease())
                self._gauges.watch.start("rollout_and_look_ahead")
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
        self._queue_for_teacher(chunk)

    def _take_in_guided(self, teacher: int, items: Sequence[GuidedItem]) -> None:
        self._gauges.count("teacher/tokens", sum(item.num_tokens for item in items))
        self._guided_by.update((item.trajectory_id, teacher) for item in items)
        self._to_put += items
        self._drop_too_old(items)

    def _take_in_update(self, report: UpdateReport) -> None:
        items = self._end_lease()
        self._trained = items, tuple(self._close(item.trajectory_id for item in items))
        self._gauges.add(report.metrics)
        self._gauges.trained(items, self._version)
        self._version = report.policy_version
        self._updates_left -= 1
        self._drop_too_old([*self._to_put, *self._buffer.waiting])
        self._gauges.watch.start("publish_weights")
        self._fleet.publish()

    def _lose_rollout(self, worker: int, reason: str) -> None:
        """What it was writing is drawn again, and what it wrote and no teacher has read, for that is lost with it."""
        self._serves[worker] = None
        writing, self._writing[worker] = self._writing[worker], {}
        self._gauges.idle("rollout", worker)
        self._gauges.count("faults/restarts_rollout", 1)
        unread = [chunk for chunk in self._all_to_guide() if self._writer(chunk) == worker]
        for queue in (self._to_guide, self._to_guide_alone):
            kept = [chunk for chunk in queue if self._writer(chunk) != worker]
            queue.clear()
            queue.extend(kept)
        self._again(self._tasks[one] for chunk in unread for one in chunk.trajectory_ids)
        self._again(self._fail(list(writing.values()), reason))

    def _lose_teacher(self, teacher: int, reason: str) -> None:
        """It is asked again for what it was asked; what it guided and nobody has learnt from is drawn again."""
        self._teacher_ready[teacher] = False
        calls, self._guiding[teacher] = self._guiding[teacher], []
        self._gauges.idle("teacher", teacher)
        self._gauges.count("faults/restarts_teacher", 1)
        for chunk in [chunk for call in calls for chunk in call]:
            left = self._fail([self._tasks[one] for one in chunk.trajectory_ids], reason)
            if len(chunk.trajectory_ids) > 1 and any(map(self._blame.is_lone, left)):
                self._again(left)  # each in a chunk of its own
            elif left:
                self._queue_for_teacher(chunk)
        leased = {item.trajectory_id for item in self._buffer.leased}
        self._discard([one for one, by in self._guided_by.items() if by == teacher and one not in leased])

    # Tasks

    def _open(self, tasks: Sequence[Task]) -> None:
        if self._config.run.deterministic:
            shares = split_requests([task.request for task in tasks], len(self._writing))
            for worker, share in enumerate(shares):
                for request in share:
                    self._tasks[request.trajectory_id].worker = worker
        self._to_write.extend(by_prompt(tasks))

    def _again(self, tasks: Iterable[Task]) -> None:
        """Tasks whose trajectory is gone go back to where they are written, before those that were drawn later."""
        in_company = []
        for task in tasks:
            task.version = None
            self._guided_by.pop(task.trajectory_id, None)
            if self._blame.is_lone(task):
                self._to_write_alone.append(task)
            else:
                in_company.append(task)
        self._to_write.extendleft(reversed(by_prompt(in_company)))

    def _discard(self, trajectory_ids: Collection[str]) -> None:
        """Guided trajectories that are not used are drawn again."""
        unused = set(trajectory_ids)
        self._buffer.discard(unused)
        self._to_put = [item for item in self._to_put if item.trajectory_id not in unused]
        self._again(self._tasks[one] for one in trajectory_ids)

    def _drop_too_old(self, items: Sequence[GuidedItem]) -> None:
        too_old = [item.trajectory_id for item in items if self._is_too_old(item.policy_version, self._version)]
        self._tasks.note_drawn_again(too_old)
        self._num_dropped += len(too_old)
        self._discard(too_old)

    def _fail(self, tasks: Sequence[Task], reason: str) -> list[Task]:
        """A worker failed with `tasks`; returns those that are to be tried again, the others are given up."""
        given_up = self._blame.put_on(tasks)
        for task in given_up:
            self._quarantined.append((task, reason))
            self._say(f"trajectory {task.trajectory_id} is given up: a worker fails whenever it has it: {reason}")
        self._close(task.trajectory_id for task in given_up)
        return [task for task in tasks if task not in given_up]

    def _close(self, trajectory_ids: Iterable[str]) -> list[Task]:
        closed = self._tasks.close(trajectory_ids)
        for task in closed:
            self._guided_by.pop(task.trajectory_id, None)
        return closed

    def _queue_for_teacher(self, chunk: RolloutChunk) -> None:
        (self._to_guide_alone if self._holds_lone(chunk.trajectory_ids) else self._to_guide).append(chunk)

    def _all_to_guide(self) -> Iterator[RolloutChunk]:
        yield from self._to_guide
        yield from self._to_guide_alone

    def _end_call(self, teacher: int, sources: tuple[RolloutChunk, ...]) -> None:
        self._guiding[teacher].remove(sources)
        if not self._guiding[teacher]:
            self._gauges.idle("teacher", teacher)

    def _end_lease(self) -> tuple[GuidedItem, ...]:
        self._gauges.watch.stop("learn")
        self._gauges.idle("learner", 0)
        return self._buffer.release()

    def _writer(self, chunk: RolloutChunk) -> int:
        worker = self._tasks[chunk.trajectory_ids[0]].worker
        assert worker is not None, "it was written by one"
        return worker

    def _holds_lone(self, trajectory_ids: Iterable[str]) -> bool:
        """Whether these are one task that is tried alone: it is the only one then, so the first tells."""
        first = next(iter(trajectory_ids), None)
        return first is not None and self._blame.is_lone(self._tasks[first])

    def _is_too_old(self, version: int, learner_version: int) -> bool:
        return learner_version - version > self._max_staleness

    def _all_serve_newest(self) -> bool:
        """Workers that are being made anew excepted, if there are others."""
        versions = [version for version in self._serves if version is not None]
        return bool(versions) and all(version == self._version for version in versions)


def _take_idle(load: dict[int, int], alone: Collection[object]) -> Iterator[int]:
    """Take a worker out of `load` for each of `alone` while there are idle ones, and one more that is to become idle.

    The caller takes one out of `alone` for each worker it gets. Without the one more, workers that always get
    something new would never be idle.
    """
    while alone and load:
        worker = min(load, key=load.__getitem__)
        if load.pop(worker) > 0:
            return
        yield worker
