"""The trajectories of a run that are drawn and not yet trained on."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topd_ray.data.schedule import PromptSchedule, rollout_requests
from topd_ray.errors import DataError
from topd_ray.types import Prompt, RolloutRequest


@dataclass(slots=True, kw_only=True, eq=False)
class Task:
    """One trajectory that is to be trained on exactly once."""

    request: RolloutRequest
    prompt_index: int
    order: int
    """how many were drawn before it"""
    worker: int | None = None
    """who writes it, or wrote it"""
    version: int | None = None
    """oldest policy that may have written some of it; None while nobody writes"""
    num_failures: int = 0
    """failures of workers that it was part of"""

    @property
    def trajectory_id(self) -> str:
        return self.request.trajectory_id


class Tasks:
    """Draws tasks from the schedule, and holds them until they are trained on or given up."""

    def __init__(self, schedule: PromptSchedule, prompts: Sequence[Prompt], samples_per_prompt: int, seed: int) -> None:
        self._schedule = schedule
        self._prompts = prompts
        self._samples_per_prompt = samples_per_prompt
        self._seed = seed
        self._open: dict[str, Task] = {}
        self.num_begun_of: Counter[int] = Counter()
        """open tasks by the oldest policy that may have written some of them"""
        self._drawn_again: dict[str, Task] = {}
        self._num_drawn = 0

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def __contains__(self, trajectory_id: str) -> bool:
        return trajectory_id in self._open

    def __getitem__(self, trajectory_id: str) -> Task:
        return self._open[trajectory_id]

    @property
    def position(self) -> int:
        """Prompts drawn so far, over all epochs."""
        return self._schedule.position

    @property
    def drawn_again(self) -> Mapping[str, Task]:
        """Open tasks that were thrown away at least once for being too old, by id."""
        return self._drawn_again

    def note_drawn_again(self, trajectory_ids: Iterable[str]) -> None:
        """These were thrown away for being too old."""
        self._drawn_again.update((one, self._open[one]) for one in trajectory_ids)

    def set_version(self, task: Task, version: int | None) -> None:
        """`version` is the oldest policy that may have written some of an open task; None: nobody has begun it."""
        if task.version is not None:
            self.num_begun_of[task.version] -= 1
        task.version = version
        if version is not None:
            self.num_begun_of[version] += 1

    def draw(self) -> list[Task]:
        """Open the next step's tasks."""
        return self._begin(self._schedule.take(), range(self._samples_per_prompt))

    def close(self, trajectory_ids: Iterable[str]) -> list[Task]:
        """Forget tasks, which are done with."""
        closed = [self._open.pop(one) for one in trajectory_ids]
        for task in closed:
            if task.version is not None:
                self.num_begun_of[task.version] -= 1
            self._drawn_again.pop(task.trajectory_id, None)
        return closed

    def state(self) -> dict[str, Any]:
        """The schedule's state with what is open, as [epoch, index of the prompt, sample]. JSON only."""
        rows = [[task.request.epoch, task.prompt_index, task.request.sample_index] for task in self._open.values()]
        return {**self._schedule.state(), "open": rows}

    def load_state(self, state: dict[str, Any]) -> list[Task]:
        """Go on from `state`; returns the tasks that are open again. Raises DataError as the schedule does."""
        self._schedule.load_state(state)
        opened = []
        for epoch, index, sample in state.get("open", []):
            if not 0 <= index < len(self._prompts):
                raise DataError(f"the checkpoint's open prompt {index} is not one of {len(self._prompts)}")
            opened += self._begin([(epoch, index)], [sample])
        return opened

    def _begin(self, draws: Sequence[tuple[int, int]], samples: Sequence[int]) -> list[Task]:
        requests = rollout_requests(
            [(epoch, self._prompts[index]) for epoch, index in draws], samples=samples, run_seed=self._seed
        )
        indices = [index for _, index in draws for _ in samples]
        tasks = [
            Task(request=request, prompt_index=index, order=self._num_drawn + number)
            for number, (request, index) in enumerate(zip(requests, indices, strict=True))
        ]
        self._num_drawn += len(tasks)
        self._open.update((task.trajectory_id, task) for task in tasks)
        return tasks
