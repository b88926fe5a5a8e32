"""When a fleet gives a worker up, by an injected clock: no Ray, and actors that are only pretended."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from topd_ray.actors.calls import Call, Limit
from topd_ray.actors.crew import Slot
from topd_ray.actors.events import Guided, Lost, Written
from topd_ray.actors.fleet import RayFleet
from topd_ray.actors.messages import GuidedChunk, RolloutChunk
from topd_ray.actors.restarts import RestartBudget
from topd_ray.actors.room import Need
from topd_ray.config.load import load_config
from topd_ray.errors import RolloutError, TeacherError

DEMO = Path(__file__).parents[2] / "jobs" / "demo.yaml"
CHUNK = RolloutChunk(handle=None, trajectory_ids=("p/0/0",), policy_versions=(0,), num_tokens=(1,), metrics=())
HOUR = 3600.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fleet_of(role: str, clock: Clock) -> tuple[RayFleet, Slot]:
    """A fleet with one worker, whose losses come an hour after the other and whose window is of seconds."""
    config = load_config(DEMO, ("faults.max_restarts=2", "faults.window_seconds=10"))
    fleet: Any = RayFleet(config, total_updates=1)
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    fleet._crew, fleet._absence = SimpleNamespace(make=nothing), SimpleNamespace(begin=nothing, end=nothing)
    fleet._answers, fleet._set_up, fleet._read = SimpleNamespace(get=lambda future: future), nothing, nothing
    need = Need(role=role, index=0, num_cpus=1, num_gpus=0.0)
    slot = Slot(role=role, index=0, need=need, bundle=0, budget=RestartBudget(config.faults, clock))
    return fleet, slot


def lose(fleet: RayFleet, slot: Slot, clock: Clock) -> None:
    clock.now += HOUR
    assert isinstance(fleet._lose(slot, "it died"), Lost)


def answer(fleet: Any, slot: Slot, kind: str, said: Any = None) -> list[Any]:
    call = Call(kind=kind, slot=slot, made_at=0.0, limit=Limit(setting="x", seconds=1.0, is_silence=False))
    return list(fleet._answered(call, said))


def deliver(fleet: Any, slot: Slot) -> list[Any]:
    """A chunk of trajectories, written or guided."""
    if slot.role == "teacher":
        return answer(fleet, slot, "guide", GuidedChunk(items=(), metrics=()))
    return answer(fleet, slot, "read", [CHUNK])


def give_up_an_input(fleet: Any, slot: Slot) -> None:
    fleet._crew.of = lambda role: [slot] if role == slot.role else []
    fleet.excuse("rollout")
    fleet.excuse("teacher")


ROLES = pytest.mark.parametrize(("role", "error"), [("rollout", RolloutError), ("teacher", TeacherError)])


@ROLES
def test_a_worker_that_loads_slowly_and_dies_each_time_ends_the_run(role: str, error: type[Exception]) -> None:
    clock = Clock()
    fleet, slot = fleet_of(role, clock)
    deliver(fleet, slot)  # before it failed for the first time
    for _ in range(2):
        lose(fleet, slot, clock)
        answer(fleet, slot, "submit" if role == "rollout" else "verify")  # it takes calls, and delivers nothing
    message = rf"^{role} worker 0 has failed more than faults\.max_restarts=2 times without progress, the last time: it"
    with pytest.raises(error, match=message):
        lose(fleet, slot, clock)


@ROLES
def test_a_worker_that_delivers_after_each_restart_is_kept(role: str, error: type[Exception]) -> None:
    clock = Clock()
    fleet, slot = fleet_of(role, clock)
    for _ in range(20):
        lose(fleet, slot, clock)
        clock.now += 1.0
        (event,) = deliver(fleet, slot)
        assert isinstance(event, Written if role == "rollout" else Guided)
    lose(fleet, slot, clock)
    lose(fleet, slot, clock)
    with pytest.raises(error):
        lose(fleet, slot, clock)


@ROLES
def test_restarts_for_an_input_that_is_given_up_do_not_count(role: str, error: type[Exception]) -> None:
    """All within faults.window_seconds."""
    clock = Clock()
    fleet, slot = fleet_of(role, clock)
    for _ in range(2):
        fleet._lose(slot, "it died")
    give_up_an_input(fleet, slot)
    clock.now += 1.0
    deliver(fleet, slot)
    clock.now += 1.0
    for _ in range(2):
        fleet._lose(slot, "it died")
    with pytest.raises(error):
        fleet._lose(slot, "it died")
