"""Which rollout worker writes what."""

from collections import deque
from collections.abc import Iterable, Sequence

from topd_ray.actors.messages import RolloutChunk
from topd_ray.actors.sharing import by_prompt, split_requests
from topd_ray.config.schema import TopdConfig
from topd_ray.pipeline.faults import Blame, take_idle
from topd_ray.pipeline.fleet import FlowFleet
from topd_ray.pipeline.gauges import Gauges
from topd_ray.pipeline.tasks import Task, Tasks


class Writing:
    """Tasks that wait to be written, in the order they are handed out, and those that each rollout worker has."""

    def __init__(
        self,
        config: TopdConfig,
        fleet: FlowFleet,
        tasks: Tasks,
        blame: Blame,
        gauges: Gauges,
        *,
        policy_version: int,
    ) -> None:
        num_workers = config.rollout.num_workers
        self._max_num_seqs = config.rollout.max_num_seqs
        self._deterministic = config.run.deterministic
        self._fleet = fleet
        self._tasks = tasks
        self._blame = blame
        self._gauges = gauges
        self._waiting: deque[list[Task]] = deque()  # the samples of a prompt together
        self._waiting_alone: deque[Task] = deque()
        self._has: list[dict[str, Task]] = [{} for _ in range(num_workers)]
        self._serves: list[int | None] = [policy_version] * num_workers

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting)) + len(self._waiting_alone)

    @property
    def num_writing(self) -> int:
        return sum(map(len, self._has))

    @property
    def is_done(self) -> bool:
        """Whether nothing waits and nobody writes."""
        return not (self._waiting or self._waiting_alone or any(self._has))

    def all_serve(self, version: int) -> bool:
        """Workers that are being made anew excepted, if there are others."""
        versions = [one for one in self._serves if one is not None]
        return bool(versions) and all(one == version for one in versions)

    def open(self, tasks: Sequence[Task]) -> None:
        """Newly drawn tasks."""
        if self._deterministic:
            task_of = {task.trajectory_id: task for task in tasks}
            for worker, share in enumerate(split_requests([task.request for task in tasks], len(self._has))):
                for request in share:
                    task_of[request.trajectory_id].worker = worker
        self._waiting.extend(by_prompt(tasks))

    def again(self, tasks: Iterable[Task]) -> None:
        """Tasks whose trajectory is gone, before those that were drawn later."""
        in_company = []
        for task in tasks:
            self._tasks.set_version(task, None)
            if self._blame.is_lone(task):
                self._waiting_alone.append(task)
            else:
                in_company.append(task)
        self._waiting.extendleft(reversed(by_prompt(in_company)))

    def hand_out(self, oldest_policy: int) -> None:
        """Give work to the workers that serve `oldest_policy` or a newer one, as far as they have room for it."""
        if not (self._waiting or self._waiting_alone):
            return
        load = {
            worker: len(self._has[worker])
            for worker, version in enumerate(self._serves)
            if version is not None and version >= oldest_policy and not self._has_lone(worker)
        }
        for worker in take_idle(load, self._waiting_alone):
            self._give(worker, [self._waiting_alone.popleft()])
        if self._deterministic:
            self._give_own_shares(load)
        else:
            self._give_least_busy(load)

    def _give_own_shares(self, load: dict[int, int]) -> None:
        """Each worker its own share of the batch in the order it was drawn, also when it has to be written again."""
        shares: dict[int | None, list[Task]] = {}
        for task in sorted((task for prompt in self._waiting for task in prompt), key=lambda task: task.order):
            shares.setdefault(task.worker, []).append(task)
        for worker in [worker for worker, busy in load.items() if not busy and worker in shares]:
            self._give(worker, shares.pop(worker))
        self._waiting = deque(shares.values())

    def _give_least_busy(self, load: dict[int, int]) -> None:
        """Whole prompts, whose samples share a prefix cache, as far as the engines have room, and a little more."""
        most = self._max_num_seqs * 5 // 4
        shares: dict[int, list[Task]] = {}
        while self._waiting and load:
            worker = min(load, key=load.__getitem__)
            if load[worker] >= most:
                break
            prompt = self._waiting.popleft()
            load[worker] += len(prompt)
            shares.setdefault(worker, []).extend(prompt)
        for worker, share in shares.items():
            self._give(worker, share)

    def _give(self, worker: int, tasks: Sequence[Task]) -> None:
        for task in tasks:
            task.worker = worker
            self._tasks.set_version(task, self._serves[worker])
            self._has[worker][task.trajectory_id] = task
        self._gauges.busy("rollout", worker)
        self._fleet.write(worker, [task.request for task in tasks])

    def take_in(self, worker: int, chunk: RolloutChunk) -> None:
        """A worker has written `chunk`."""
        for trajectory_id, version in zip(chunk.trajectory_ids, chunk.policy_versions, strict=True):
            self._tasks.set_version(self._has[worker].pop(trajectory_id), version)
        if not self._has[worker]:
            self._gauges.idle("rollout", worker)
        self._gauges.count_tokens("rollout", sum(chunk.num_tokens))

    def serve(self, worker: int, version: int) -> None:
        """A worker serves policy `version`."""
        self._serves[worker] = version

    def lose(self, worker: int) -> list[Task]:
        """A worker is gone; returns what it had. It has nothing to do until it serves a policy again."""
        self._serves[worker] = None
        lost, self._has[worker] = list(self._has[worker].values()), {}
        self._gauges.idle("rollout", worker)
        return lost

    def _has_lone(self, worker: int) -> bool:
        """A lone task is the only one of its worker, so the first tells."""
        first = next(iter(self._has[worker].values()), None)
        return first is not None and self._blame.is_lone(first)
