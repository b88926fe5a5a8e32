"""What workers and their fleet do at moments that a run on this machine seldom meets; engines and Ray are scripted."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from topd_ray.actors import fleet as fleet_module
from topd_ray.actors import rollout as rollout_module
from topd_ray.actors.cluster import KEEP_FREED_MEMORY, worker_environment
from topd_ray.actors.fleet import RayFleet, Streams
from topd_ray.actors.learner import LearnerWorker
from topd_ray.actors.messages import Normalisers
from topd_ray.actors.rollout import RolloutWorker
from topd_ray.actors.store import LocalStore
from topd_ray.config.schema import (
    EvaluationConfig,
    LearnerConfig,
    ObjectiveConfig,
    RolloutConfig,
    StudentConfig,
    WeightsConfig,
)
from topd_ray.data.arrow import GUIDED_SCHEMA, batch_to_trajectories
from topd_ray.errors import NonFiniteLossError
from topd_ray.types import Trajectory

STUDENT = StudentConfig(model="s")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class StepEngine:
    """Takes a second per step, in which the given numbers of trajectories finish."""

    def __init__(self, clock: Clock, finishing: Sequence[int]) -> None:
        self._clock = clock
        self._finishing = finishing

    def generate_by_step(self, requests: object) -> Iterator[list[Trajectory]]:
        names = iter(f"{index:02d}" for index in range(sum(self._finishing)))
        for count in self._finishing:
            self._clock.now += 1.0
            yield [trajectory(next(names)) for _ in range(count)]


def trajectory(name: str) -> Trajectory:
    return Trajectory(
        trajectory_id=name,
        prompt_id=name,
        sample_index=0,
        epoch=0,
        policy_version=0,
        finish_reason="stop",
        prompt_ids=np.array([1], np.int32),
        response_ids=np.array([2, 3], np.int32),
        behaviour_logprobs=np.zeros(2, np.float32),
    )


def handovers(
    finishing: Sequence[int], monkeypatch: pytest.MonkeyPatch, *, cost: float, whole: bool = False
) -> list[tuple[float, int]]:
    """(second, number of trajectories) of each chunk, if its receiver takes `cost` seconds."""
    clock = Clock()
    monkeypatch.setattr(rollout_module, "time", clock)
    worker = RolloutWorker(
        STUDENT,
        RolloutConfig(),
        EvaluationConfig(),
        weights=WeightsConfig(),
        max_prompt_tokens=1,
        threads=1,
        seed=0,
        store=LocalStore(),
    )
    worker._engine = StepEngine(clock, finishing)  # type: ignore[assignment]
    found = []
    for chunk in worker.generate([], whole=whole):
        found.append((round(clock.now - 100.0, 6), len(batch_to_trajectories(chunk.handle))))
        clock.now += cost
    return found


def test_trajectories_of_one_step_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert handovers([0, 8, 0, 0, 1], monkeypatch, cost=0.0) == [(2.0, 8), (5.0, 1)]
    assert handovers([0, 8, 0, 0, 1], monkeypatch, cost=0.0, whole=True) == [(5.0, 9)]


def test_a_handover_is_made_up_for_by_steps_in_which_nothing_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first costs 0.2 s, so the next may leave 2 s later, in the step without a trajectory of its own."""
    assert handovers([1, 3, 0, 0, 0, 1], monkeypatch, cost=0.2) == [(1.0, 1), (4.2, 3), (6.4, 1)]


class NonFiniteEngine:
    policy_version = 3

    def learn(self, *_: object, **__: object) -> None:
        raise NonFiniteLossError("update 4: the loss is nan")


def failing_learner(folder: Path) -> LearnerWorker:
    worker = LearnerWorker(
        STUDENT,
        LearnerConfig(),
        ObjectiveConfig(),
        weights=WeightsConfig(),
        temperature=1.0,
        total_updates=1,
        rank=1,
        threads=1,
        seed=0,
        deterministic=False,
        failed_batch_folder=folder,
        store=LocalStore(),
    )
    worker._engine = NonFiniteEngine()
    return worker


def test_an_empty_share_is_saved_as_an_empty_table(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="the loss is nan; this rank's share of the batch is in"):
        failing_learner(tmp_path).learn([], Normalisers.of([]))
    table = pq.read_table(tmp_path / "version-000003-rank-1.parquet")
    assert (table.num_rows, table.schema.names) == (0, GUIDED_SCHEMA.names)


def test_a_share_that_cannot_be_saved_does_not_hide_the_loss(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"the loss is nan; this rank's share of the batch could not be saved: .*Not a directory"
    with pytest.raises(NonFiniteLossError, match=message):
        failing_learner(tmp_path / "file" / "failed").learn([], Normalisers.of([]))


def test_a_rank_that_is_still_saving_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def result(future: str) -> None:
        assert future == "rank 0"
        raise NonFiniteLossError("the loss is nan")

    fleet: Any = object.__new__(RayFleet)
    fleet._result = result
    monkeypatch.setattr(
        fleet_module, "ray", SimpleNamespace(wait=lambda futures, **_: ([futures[0]], list(futures[1:])))
    )
    assert fleet._failures(["rank 0", "rank 1"]) == ["the loss is nan", "learner rank 1 has not answered within 60 s"]


class Teacher:
    """A teacher's handle, which remembers how many chunks each of its calls took."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.look_ahead = SimpleNamespace(remote=self._look_ahead)

    def _look_ahead(self, chunks: Sequence[str], threshold: float) -> tuple[str, ...]:
        self.calls.append(len(chunks))
        return tuple(chunks)


@pytest.mark.parametrize(("num_chunks", "calls"), [(4, [[2], [2]]), (5, [[3], [2]]), (1, [[1], []])])
def test_waiting_chunks_are_shared_between_the_idle_teachers(num_chunks: int, calls: list[list[int]]) -> None:
    fleet: Any = object.__new__(RayFleet)
    fleet._config = SimpleNamespace(run=SimpleNamespace(deterministic=False))
    fleet._teachers = [Teacher(), Teacher()]
    fleet._wait = list
    fleet._fetch = list
    streams: Any = Streams(fleet, [iter([f"chunk {index}"]) for index in range(num_chunks)])  # type: ignore[list-item]
    guided = [chunk for call in fleet.look_ahead(streams, 0.1) for chunk in call]
    assert sorted(guided) == [f"chunk {index}" for index in range(num_chunks)]
    assert [teacher.calls for teacher in fleet._teachers] == calls


def test_the_less_busy_teacher_is_served_first() -> None:
    fleet: Any = object.__new__(RayFleet)
    fleet._teachers = [Teacher(), Teacher()]
    assert fleet._idle_teachers({"a": 0}) == [1]
    assert fleet._idle_teachers({"a": 0, "b": 1}) == [0, 1]
    assert fleet._idle_teachers({"a": 0, "b": 1, "c": 0, "d": 1}) == []


def test_the_users_own_malloc_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_TOP_PAD_", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "5")
    found = worker_environment(1, on_cpu=True)
    assert found["MALLOC_TRIM_THRESHOLD_"] == "5"
    assert found["MALLOC_TOP_PAD_"] == KEEP_FREED_MEMORY["MALLOC_TOP_PAD_"]
    assert not KEEP_FREED_MEMORY.keys() & worker_environment(1, on_cpu=False).keys()
