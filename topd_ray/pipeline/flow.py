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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from topd_ray.actors.buffer import TrajectoryBuffer
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
from topd_ray.actors.messages import GuidedItem
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import TopdError
from topd_ray.pipeline.faults import Blame
from topd_ray.pipeline.fleet import FlowFleet
from topd_ray.pipeline.gauges import Gauges
from topd_ray.pipeline.guiding import Guiding
from topd_ray.pipeline.tasks import Task, Tasks
from topd_ray.pipeline.writing import Writing
from topd_ray.types import Metric, UpdateReport


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
        self._config = config
        self._fleet = fleet
        self._tasks = tasks
        self._updates_left = updates_left
        self._version = policy_version
        self._check_interrupt = check_interrupt
        self._say = say
        self._max_staleness = config.pipeline.max_staleness
        self._guided_by: dict[str, int] = {}
        self._to_put: list[GuidedItem] = []  # does not fit into the buffer
        self._buffer = TrajectoryBuffer(config.buffer)
        self._trained: tuple[tuple[GuidedItem, ...], tuple[Task, ...]] | None = None
        self._quarantined: list[tuple[Task, str]] = []
        self._num_dropped = 0
        self._num_lost = 0
        self._blame = Blame(config.faults)
        self._gauges = Gauges(config.rollout.num_workers, config.teacher.num_workers)
        self._writing = Writing(config, fleet, tasks, self._blame, self._gauges, policy_version=policy_version)
        self._guiding = Guiding(config, fleet, tasks, self._blame, self._gauges, threshold)
        self._writing.open(reopened)

    def update(self) -> Update:
        """Go on until one more update is made; a synchronous run also until all workers serve the new policy."""
        self._gauges.go_on()
        self._gauges.watch.start("rollout_and_look_ahead")
        while self._trained is None or (self._max_staleness == 0 and not self._writing.all_serve(self._version)):
            if self._trained is None:
                self._draw()
                self._learn()  # first: what is handed out meanwhile is for the update after this one
                self._hand_out()
            self._listen()
        (items, tasks), self._trained = self._trained, None
        quarantined, self._quarantined = self._quarantined, []
        num_dropped, self._num_dropped = self._num_dropped, 0
        num_lost, self._num_lost = self._num_lost, 0
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
                    "faults/payloads_lost": num_lost,
                    "queue/rollout": self._writing.num_waiting,
                    "queue/writing": self._writing.num_writing,
                    "queue/teacher": self._guiding.num_waiting,
                    "queue/buffer": self._buffer.num_waiting,
                    "queue/bytes": self._buffer.num_bytes,
                }
            ),
        )

    @property
    def is_settled(self) -> bool:
        """Whether the learner has applied the updates that were returned, and no other."""
        return not self._buffer.leased and self._trained is None

    @property
    def learning(self) -> tuple[Task, ...]:
        """What the learner makes an update of."""
        return tuple(self._tasks[item.trajectory_id] for item in self._buffer.leased)

    def drain(self) -> None:
        """Wait until no engine has anything to do and all serve the newest policy, as an evaluation wants it."""
        self._gauges.go_on()
        while self._writing.num_writing or not self._guiding.is_idle or not self._writing.all_serve(self._version):
            self._listen()
        self._gauges.pause()

    # What is decided

    def _draw(self) -> None:
        batch = self._config.batch_size
        while len(self._tasks) + batch <= batch * min(self._max_staleness + 1, self._updates_left):
            self._writing.open(self._tasks.draw())

    def _hand_out(self) -> None:
        """Work for the rollout workers and the teachers; none while the buffer is full (back-pressure)."""
        if not self._to_put:
            self._writing.hand_out(self._oldest_to_write())
            self._guiding.hand_out(all_written=self._writing.is_done)

    def _oldest_to_write(self) -> int:
        """The oldest policy that may begin to write now, so that the result is not too old when its turn comes.

        The learner is at L + num_ahead // batch by then. What was dropped before may only be begun by the newest.
        """
        if any(task.version is None for task in self._tasks.drawn_again.values()):
            return self._version
        num_ahead = len(self._tasks) - self._writing.num_waiting
        return self._version + num_ahead // self._config.batch_size - self._max_staleness

    def _learn(self) -> None:
        """Start an update once a batch is there. What quarantine leaves of the last batches is a smaller one."""
        batch = min(self._config.batch_size, len(self._tasks))
        if self._buffer.leased or batch == 0:
            return
        if self._buffer.num_waiting < batch:
            if self._to_put:
                raise TopdError("buffer.max_bytes is too small for the trajectories of one update: raise it")
            return
        if self._to_put or not self._would_strand(batch):
            self._gauges.watch.stop("rollout_and_look_ahead")
            self._gauges.watch.start("learn")
            self._gauges.busy("learner", 0)
            self._fleet.learn(self._buffer.take(batch))

    def _would_strand(self, batch: int) -> bool:
        """Whether an update now would leave more begun by old policies than the updates to come can take in time.

        Policy v's trajectories can be trained on until the learner is at v + S, after this update v + S - L times more.
        So the learner waits for those that take longest: begun anew, they would keep it waiting for longer still. They
        are dropped only where the buffer is full, so that none can arrive, or weights reached their worker late.
        """
        num_begun = num_guided = 0
        for version in sorted(self._tasks.num_begun_of):
            num_begun += self._tasks.num_begun_of[version]
            num_guided += self._buffer.num_waiting_of[version]
            num_in_time = batch * max(version + self._max_staleness - self._version, 0)
            if num_guided < batch and num_begun - num_guided > num_in_time:
                return True
        return False

    # What has happened

    def _listen(self) -> None:
        if self.is_settled:  # an update must come to its end
            self._check_interrupt()
        for event in self._fleet.wait():
            self._handle(event)
        del self._to_put[: self._buffer.put(self._to_put)]

    def _handle(self, event: Event) -> None:
        match event:
            case Written(worker=worker, chunk=chunk):
                self._writing.take_in(worker, chunk)
                self._guiding.add(chunk)
            case Guided(teacher=teacher, sources=sources, chunk=chunk):
                self._guiding.end_call(teacher, sources)
                self._take_in_guided(teacher, chunk.items)
                self._gauges.add(chunk.metrics)
            case GuideUnreadable(teacher=teacher, sources=sources, reason=reason):
                self._guiding.end_call(teacher, sources)
                unread = [one for source in sources for one in source.trajectory_ids]
                self._lose_payload(unread, f"teacher worker {teacher}", reason)
            case Learned(report=report):
                self._take_in_update(report)
            case LearnUnreadable(reason=reason):
                self._lose_payload([item.trajectory_id for item in self._end_lease()], "the learner", reason)
                self._gauges.watch.start("rollout_and_look_ahead")
            case Packed(metrics=metrics):
                self._gauges.add(metrics)
            case Published(worker=worker, version=version, metrics=metrics):
                self._writing.serve(worker, version)
                self._gauges.add(metrics)
                if self._writing.all_serve(self._version):
                    self._gauges.watch.stop("publish_weights")
            case Ready(teacher=teacher):
                self._guiding.ready(teacher)
            case Lost(role=role, worker=worker, reason=reason):
                self._say(f"{role} worker {worker} is lost and made anew: {reason}")
                (self._lose_rollout if role == "rollout" else self._lose_teacher)(worker, reason)

    def _take_in_guided(self, teacher: int, items: Sequence[GuidedItem]) -> None:
        self._gauges.count_tokens("teacher", sum(item.num_tokens for item in items))
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
        self._gauges.count_restart("rollout")
        self._again([self._tasks[one] for one in self._guiding.remove_of(worker)])
        self._again(self._fail("rollout", self._writing.lose(worker), reason))

    def _lose_teacher(self, teacher: int, reason: str) -> None:
        """It is asked again for what it was asked; what it guided and nobody has learnt from is drawn again."""
        self._gauges.count_restart("teacher")
        for chunk in self._guiding.lose(teacher):
            left = self._fail("teacher", [self._tasks[one] for one in chunk.trajectory_ids], reason)
            if len(chunk.trajectory_ids) > 1 and any(map(self._blame.is_lone, left)):
                self._again(left)  # each in a chunk of its own
            elif left:
                self._guiding.add(chunk)
        leased = {item.trajectory_id for item in self._buffer.leased}
        self._discard([one for one, by in self._guided_by.items() if by == teacher and one not in leased])

    def _lose_payload(self, trajectory_ids: Sequence[str], reader: str, reason: str) -> None:
        self._num_lost += len(trajectory_ids)
        self._say(f"{reader} could not fetch trajectories ({len(trajectory_ids)}, written again): {reason}")
        self._again([self._tasks[one] for one in trajectory_ids])

    # Tasks

    def _again(self, tasks: Sequence[Task]) -> None:
        """Their trajectories are gone: write them again."""
        for task in tasks:
            self._guided_by.pop(task.trajectory_id, None)
        self._writing.again(tasks)

    def _discard(self, trajectory_ids: Sequence[str]) -> None:
        """Guided trajectories that are not used are drawn again."""
        unused = set(trajectory_ids)
        self._buffer.discard(unused)
        self._to_put = [item for item in self._to_put if item.trajectory_id not in unused]
        self._again([self._tasks[one] for one in trajectory_ids])

    def _drop_too_old(self, items: Sequence[GuidedItem]) -> None:
        too_old = [item.trajectory_id for item in items if self._is_too_old(item.policy_version, self._version)]
        if too_old:
            self._tasks.note_drawn_again(too_old)
            self._num_dropped += len(too_old)
            self._discard(too_old)

    def _fail(self, role: str, tasks: Sequence[Task], reason: str) -> list[Task]:
        """A worker failed with `tasks`; returns those that are to be tried again, the others are given up."""
        given_up = self._blame.put_on(tasks)
        for task in given_up:
            self._quarantined.append((task, reason))
            self._say(f"trajectory {task.trajectory_id} is given up: a worker fails whenever it has it: {reason}")
        if given_up:
            self._fleet.excuse(role)
        self._close(task.trajectory_id for task in given_up)
        return [task for task in tasks if task not in given_up]

    def _close(self, trajectory_ids: Iterable[str]) -> list[Task]:
        closed = self._tasks.close(trajectory_ids)
        for task in closed:
            self._guided_by.pop(task.trajectory_id, None)
        return closed

    def _end_lease(self) -> tuple[GuidedItem, ...]:
        self._gauges.watch.stop("learn")
        self._gauges.idle("learner", 0)
        return self._buffer.release()

    def _is_too_old(self, version: int, learner_version: int) -> bool:
        return learner_version - version > self._max_staleness
