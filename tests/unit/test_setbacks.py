"""What ends a run whose learner is lost again and again, and what names the batch."""

import json
from pathlib import Path

import pytest

from tests.scripted_fleet import make_config, make_tasks
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import WorkerLostError
from topd_ray.pipeline.setbacks import NAMED, Setbacks

LOST = WorkerLostError("learner rank 0 is lost")
HOUR = 3600.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def config_of(root: Path, max_restarts: int = 2) -> TopdConfig:
    return make_config(run={"root": str(root), "name": "run"}, faults={"max_restarts": max_restarts})


def losses(setbacks: Setbacks, clock: Clock, updates: list[list[int]]) -> list[bool]:
    """Whether the run may go on after each of the sessions, which make `updates` and are lost an hour later."""
    spent = []
    for made in updates:
        for update in made:
            setbacks.made(update)
        clock.now += HOUR
        spent.append(setbacks.budget.spend())
    return spent


def test_updates_that_are_made_again_are_no_progress(tmp_path: Path) -> None:
    clock = Clock()
    setbacks = Setbacks(config_of(tmp_path), clock)
    assert losses(setbacks, clock, [[1, 2, 3], [1, 2], [3], [1, 2, 3]]) == [True, True, False, False]
    assert str(setbacks.budget) == "more than faults.max_restarts=2 times without progress"


def test_newer_updates_are_progress(tmp_path: Path) -> None:
    clock = Clock()
    setbacks = Setbacks(config_of(tmp_path), clock)
    assert all(losses(setbacks, clock, [[update - 1, update] for update in range(50)]))
    assert setbacks.budget.num_spent == 50


def test_a_run_that_goes_on_from_a_checkpoint_makes_progress_from_there(tmp_path: Path) -> None:
    clock = Clock()
    setbacks = Setbacks(config_of(tmp_path), clock)
    assert losses(setbacks, clock, [[], [41], [], []]) == [True, True, True, False]


def test_the_batch_is_named_each_time_and_listed_when_it_is_too_much(tmp_path: Path) -> None:
    config = config_of(tmp_path, max_restarts=1)
    setbacks = Setbacks(config)
    batch = make_tasks(config).draw()
    first = setbacks.while_making(7, batch, LOST)
    assert str(first) == (
        "learner rank 0 is lost; it was loss 1 while the learner made update 7 of 4 trajectories "
        "(prompt/epoch/sample): p0/0/0, p0/0/1, p1/0/0, p1/0/1"
    )
    path = tmp_path / "run" / "failed_batch" / "update-000007.jsonl"
    assert setbacks.budget.spend() and not path.exists()
    last = setbacks.while_making(7, batch, LOST)
    assert str(last) == str(first).replace("loss 1", "loss 2") + f"; all are listed in {path}"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["trajectory_id"], line["prompt_id"]) for line in lines] == [
        ("p0/0/0", "p0"),
        ("p0/0/1", "p0"),
        ("p1/0/0", "p1"),
        ("p1/0/1", "p1"),
    ]
    assert lines[-1] == {
        "trajectory_id": "p1/0/1",
        "prompt_id": "p1",
        "epoch": 0,
        "sample_index": 1,
        "prompt_token_ids": [1],
    }


def test_a_large_batch_is_named_in_part(tmp_path: Path) -> None:
    tasks = make_tasks(config := config_of(tmp_path))
    batch = [task for _ in range(NAMED) for task in tasks.draw()]
    message = str(Setbacks(config).while_making(1, batch, LOST))
    assert message.endswith("p3/0/0, p3/0/1, ...") and f"update 1 of {4 * NAMED} trajectories" in message


@pytest.mark.parametrize("in_the_way", ["run", "run/failed_batch"])
def test_a_list_that_cannot_be_written_does_not_hide_the_loss(tmp_path: Path, in_the_way: str) -> None:
    config = config_of(tmp_path, max_restarts=0)
    path = tmp_path / in_the_way
    path.parent.mkdir(exist_ok=True)
    path.touch()
    message = str(Setbacks(config).while_making(1, make_tasks(config).draw(), LOST))
    assert message.startswith("learner rank 0 is lost; ") and "; they could not be listed: " in message
