"""Whatever fails, and whenever: each task is trained on exactly once, or is in quarantine for good reasons."""

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scripted_fleet import Run, Script, ScriptedFleet, make_config, make_tasks
from topd_ray.actors.events import Event
from topd_ray.config.schema import FaultsConfig
from topd_ray.errors import WorkerLostError
from topd_ray.pipeline.faults import Blame, take_idle

EXAMPLES = settings(max_examples=40, deadline=None)


configs = st.fixed_dictionaries(
    {
        "rollout": st.fixed_dictionaries(
            {
                "prompts_per_step": st.integers(1, 3),
                "samples_per_prompt": st.integers(1, 3),
                "num_workers": st.integers(1, 3),
                "max_num_seqs": st.integers(1, 5),
            }
        ),
        "teacher": st.fixed_dictionaries({"num_workers": st.integers(1, 3)}),
        "pipeline": st.fixed_dictionaries({"max_staleness": st.integers(0, 3)}),
        "faults": st.fixed_dictionaries({"max_attempts": st.integers(3, 6)}),
    }
)
deaths = st.lists(
    st.tuples(st.integers(0, 150), st.sampled_from(["rollout", "teacher"]), st.integers(0, 2)), max_size=14
)
trajectories = st.builds(lambda prompt, sample: f"p{prompt}/0/{sample}", st.integers(0, 9), st.integers(0, 2))
poisons = st.sets(st.tuples(st.sampled_from(["rollout", "teacher"]), trajectories), max_size=4)
seeds = st.integers(0, 10**6)


@EXAMPLES
@given(sections=configs, num_updates=st.integers(1, 7), seed=seeds, deaths=deaths, poison=poisons, tight=st.booleans())
def test_each_task_is_trained_on_once_or_quarantined(
    sections: dict[str, Any], num_updates: int, seed: int, deaths: Any, poison: Any, tight: bool
) -> None:
    unlucky = random.Random(seed)
    per_batch = sections["rollout"]["prompts_per_step"] * sections["rollout"]["samples_per_prompt"]
    config = make_config(**sections, buffer={"max_bytes": 3 * per_batch if tight else 10**6})
    script = Script.random(
        seed,
        deaths=deaths,
        poison=poison,
        loses_payload=lambda kind: unlucky.random() < 0.1,
        num_bytes=lambda trajectory_id: 1 + len(trajectory_id) % 3,
    )
    run = Run(config, script, num_updates).play()
    run.check()
    if not tight:
        assert max(run.tasks.num_drops.values(), default=0) <= 1, "dropped twice"
    if config.pipeline.max_staleness == 0:
        assert set(run.fleet.ages) == {0}
        assert not run.tasks.num_drops


@EXAMPLES
@given(sections=configs, num_updates=st.integers(1, 7), seed=seeds, poison=poisons)
def test_poison_and_only_it_is_quarantined(sections: dict[str, Any], num_updates: int, seed: int, poison: Any) -> None:
    run = Run(make_config(**sections), Script.random(seed, poison=poison), num_updates).play()
    run.check()
    tried = {one for _, ids in run.fleet.writes for one in ids}
    assert set(run.quarantined) == {one for _, one in poison} & tried
    for one in run.quarantined:
        assert run.fleet.failures[one] == run.config.faults.max_attempts


@EXAMPLES
@given(sections=configs, num_updates=st.integers(2, 7), seed=seeds, deaths=deaths, data=st.data())
def test_a_second_session_goes_on_where_the_first_one_was(
    sections: dict[str, Any], num_updates: int, seed: int, deaths: Any, data: st.DataObject
) -> None:
    config = make_config(**sections)
    first = Run(config, Script.random(seed, deaths=deaths), num_updates)
    num_first = data.draw(st.integers(0, num_updates - 1))
    for _ in range(num_first):
        first.updates.append(first.flow.update())
    state = json.loads(json.dumps(first.tasks.state()))
    trained = [task.trajectory_id for update in first.updates for task in update.tasks]
    second = Run(config, Script.random(seed + 1), 0)
    reopened = second.tasks.load_state(state)
    second.fleet = ScriptedFleet(config, second.script, version=num_first)
    second.num_updates = num_updates - num_first
    second.flow = second.start(second.fleet, reopened, second.num_updates)
    second.play()
    trained += second.fleet.trained
    assert len(trained) == len(set(trained))
    drawn = second.tasks.position * config.rollout.samples_per_prompt
    assert len(trained) + len(first.quarantined) + len(second.quarantined) == drawn
    assert len(second.tasks) == 0


@pytest.mark.parametrize("seed", [61, 187, 283, 1016, *range(30)])
def test_nothing_is_dropped_twice(seed: int) -> None:
    """Weights that are late, and trajectories that take longer than all updates a policy may be behind."""
    choose = random.Random(seed)
    sections: dict[str, Any] = {
        "pipeline": {"max_staleness": choose.choice([1, 2, 3])},
        "rollout": {
            "prompts_per_step": choose.randint(1, 3),
            "samples_per_prompt": choose.randint(1, 2),
            "num_workers": choose.randint(1, 4),
            "max_num_seqs": choose.randint(1, 6),
        },
        "teacher": {"num_workers": choose.randint(1, 2)},
    }
    seconds = {
        "write": [choose.choice([1, 2, 5, 20, 60]) for _ in range(4)],
        "queue": [0],
        "publish": [choose.choice([0, 1, 10, 40]) for _ in range(3)],
        "learn": [choose.choice([1, 3, 9])],
        "guide": [1, choose.choice([1, 9, 30])],
    }
    run = Run(make_config(**sections), Script(seconds=lambda kind, key: choose.choice(seconds[kind])), 12).play()
    run.check()
    assert max(run.tasks.num_drops.values(), default=0) <= 1


def test_what_the_learner_is_lost_with_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(make_config(), Script(), 3)

    def learning() -> list[str]:
        return [task.trajectory_id for task in run.flow.learning]

    assert learning() == []
    run.flow.update()
    assert learning() == []
    wait = run.fleet.wait

    def lose() -> list[Event]:
        if run.fleet.is_learning:
            raise WorkerLostError("learner rank 0 is lost")
        return wait()

    monkeypatch.setattr(run.fleet, "wait", lose)
    with pytest.raises(WorkerLostError):
        run.flow.update()
    assert learning() == ["p2/0/0", "p2/0/1", "p3/0/0", "p3/0/1"]


def scattered(role: str) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Two inputs of each batch kill the only worker of `role`, five batches one after the other."""
    poison = [(role, f"p{8 * batch + place}/0/0") for batch in range(5) for place in (2, 3)]
    return poison, {"rollout": {"prompts_per_step": 8, "samples_per_prompt": 1, "num_workers": 1}}


@pytest.mark.parametrize("role", ["rollout", "teacher"])
@pytest.mark.parametrize("is_deterministic", [True, False])
def test_inputs_that_kill_the_only_worker_do_not_use_up_its_restarts(role: str, is_deterministic: bool) -> None:
    poison, sections = scattered(role)
    config = make_config(**sections, run={"deterministic": is_deterministic})
    run = Run(config, Script(poison=poison), 5).play()
    run.check()
    assert {(role, one) for one in run.quarantined} == {*poison}
    assert len(poison) * 2 > config.faults.max_restarts and not run.fleet.worn_out


@pytest.mark.parametrize("role", ["rollout", "teacher"])
def test_restarts_for_inputs_are_excused_only_once_these_are_given_up(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScriptedFleet, "excuse", lambda *_: None)
    poison, sections = scattered(role)
    assert Run(make_config(**sections), Script(poison=poison), 5).play().fleet.worn_out == {(role, 0)}


@pytest.mark.parametrize("role", ["rollout", "teacher"])
def test_a_worker_that_fails_with_everything_is_not_excused(role: str) -> None:
    """It gives up one input after the other, and delivers nothing."""
    _, sections = scattered(role)
    everything = [(role, f"p{prompt}/0/0") for prompt in range(8)]
    run = Run(make_config(**sections), Script(poison=everything), 2).play()
    assert set(run.quarantined) == {one for _, one in everything} and run.fleet.worn_out == {(role, 0)}


def test_blame() -> None:
    blame = Blame(FaultsConfig(max_attempts=4))
    tasks = make_tasks(make_config()).draw()
    assert blame.put_on(tasks[:3]) == [] and not any(map(blame.is_lone, tasks))
    assert blame.put_on(tasks[:2]) == []
    assert [blame.is_lone(task) for task in tasks] == [True, True, False, False]
    assert blame.put_on([tasks[1]]) == [] and blame.put_on([tasks[0]]) == []
    assert blame.put_on([tasks[1]]) == [tasks[1]]
    assert [task.num_failures for task in tasks] == [3, 4, 1, 0]


def test_idle_workers_are_for_what_is_tried_alone_and_one_more_becomes_idle() -> None:
    def taken(load: dict[int, int], alone: list[str]) -> list[int]:
        workers = []
        for worker in take_idle(load, alone):
            workers.append(worker)
            alone.pop()
        return workers

    assert taken(load := {0: 3, 1: 0, 2: 1, 3: 0}, ["a", "b", "c"]) == [1, 3]
    assert load == {0: 3}, "worker 2 gets nothing more"
    assert taken(load := {0: 3, 1: 0, 2: 0}, ["a"]) == [1]
    assert load == {0: 3, 2: 0}
    assert taken(load := {0: 0}, []) == [] and load == {0: 0}
    assert taken({}, ["a"]) == []
