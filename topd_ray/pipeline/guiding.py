"""Which teacher guides what."""

from collections.abc import Callable, Iterator, Sequence

from topd_ray.actors.messages import RolloutChunk
from topd_ray.actors.sharing import split_evenly
from topd_ray.config.schema import TopdConfig
from topd_ray.pipeline.faults import Blame, take_idle
from topd_ray.pipeline.fleet import FlowFleet
from topd_ray.pipeline.gauges import Gauges
from topd_ray.pipeline.tasks import Tasks

CALLS_IN_FLIGHT = 2
"""Calls a teacher worker holds: one on its engine, one whose transport runs or that waits for the engine."""

Call = tuple[RolloutChunk, ...]


class Guiding:
    """Chunks of written trajectories that wait for a teacher, and the calls that each teacher has."""

    def __init__(
        self,
        config: TopdConfig,
        fleet: FlowFleet,
        tasks: Tasks,
        blame: Blame,
        gauges: Gauges,
        threshold: Callable[[], float],
    ) -> None:
        self._deterministic = config.run.deterministic
        self._fleet = fleet
        self._tasks = tasks
        self._blame = blame
        self._gauges = gauges
        self._threshold = threshold
        self._waiting: list[RolloutChunk] = []
        self._waiting_alone: list[RolloutChunk] = []
        self._calls: list[list[Call]] = [[] for _ in range(config.teacher.num_workers)]
        self._is_ready = [True] * config.teacher.num_workers

    @property
    def num_waiting(self) -> int:
        return sum(len(chunk.trajectory_ids) for chunk in (*self._waiting, *self._waiting_alone))

    @property
    def is_idle(self) -> bool:
        return not any(self._calls)

    def add(self, chunk: RolloutChunk) -> None:
        (self._waiting_alone if self._is_lone(chunk) else self._waiting).append(chunk)

    def hand_out(self, *, all_written: bool) -> None:
        """Ask the least busy teachers. Deterministic runs wait until the whole batch is there."""
        if not (self._waiting or self._waiting_alone):
            return
        load = {
            teacher: len(calls)
            for teacher, calls in enumerate(self._calls)
            if self._is_ready[teacher] and not (calls and self._is_lone(calls[0][0]))
        }
        for teacher in take_idle(load, self._waiting_alone):
            self._ask(teacher, (self._waiting_alone.pop(0),))
        if self._deterministic:
            if all_written:
                self._ask_own(load)
        elif self._waiting and load:
            least = min(load.values())
            teachers = [teacher for teacher, busy in load.items() if busy == least]
            if least == 0 or (least < CALLS_IN_FLIGHT and self._is_worth_a_call(teachers)):
                for teacher, share in zip(teachers, split_evenly(self._waiting, len(teachers)), strict=False):
                    self._ask(teacher, tuple(share))
                self._waiting.clear()

    def _is_worth_a_call(self, teachers: Sequence[int]) -> bool:
        """Whether there is as much for each of these as it has: less would wait behind that, and gathers company."""
        has = min(sum(map(_size, call)) for teacher in teachers for call in self._calls[teacher])
        return sum(map(_size, self._waiting)) >= has * len(teachers)

    def _ask_own(self, load: dict[int, int]) -> None:
        """Each rollout worker's chunk to a teacher of its own, in the order of their ids."""
        chunks, self._waiting = sorted(self._waiting, key=lambda chunk: chunk.trajectory_ids), []
        for chunk in chunks:
            teacher = self._writer(chunk) % len(self._calls)
            if load.get(teacher, CALLS_IN_FLIGHT) < CALLS_IN_FLIGHT:
                load[teacher] += 1
                self._ask(teacher, (chunk,))
            else:
                self._waiting.append(chunk)

    def _ask(self, teacher: int, chunks: Call) -> None:
        self._calls[teacher].append(chunks)
        self._gauges.busy("teacher", teacher)
        self._fleet.guide(teacher, chunks, self._threshold())

    def end_call(self, teacher: int, chunks: Call) -> None:
        self._calls[teacher].remove(chunks)
        if not self._calls[teacher]:
            self._gauges.idle("teacher", teacher)

    def ready(self, teacher: int) -> None:
        """A teacher that was made anew takes calls."""
        self._is_ready[teacher] = True

    def lose(self, teacher: int) -> list[RolloutChunk]:
        """A teacher is gone; returns what it was asked for."""
        self._is_ready[teacher] = False
        calls, self._calls[teacher] = self._calls[teacher], []
        self._gauges.idle("teacher", teacher)
        return [chunk for call in calls for chunk in call]

    def remove_of(self, writer: int) -> Iterator[str]:
        """Take away what rollout worker `writer` has written and nobody has read; the ids of the trajectories."""
        for queue in (self._waiting, self._waiting_alone):
            chunks = list(queue)
            queue.clear()
            for chunk in chunks:
                if self._writer(chunk) == writer:
                    yield from chunk.trajectory_ids
                else:
                    queue.append(chunk)

    def _writer(self, chunk: RolloutChunk) -> int:
        worker = self._tasks[chunk.trajectory_ids[0]].worker
        assert worker is not None, "it was written by one"
        return worker

    def _is_lone(self, chunk: RolloutChunk) -> bool:
        """A lone task is written alone and so is the only one of its chunk, and of its teacher: the first tells."""
        return self._blame.is_lone(self._tasks[chunk.trajectory_ids[0]])


def _size(chunk: RolloutChunk) -> int:
    return len(chunk.trajectory_ids)
