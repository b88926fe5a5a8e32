"""Whole runs under a real Ray whose workers, without engines, fail as they are told: sessions, one after the other."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from tests.stand_ins import Orders
from topd_ray.actors.fleet import RayFleet
from topd_ray.config.load import load_config
from topd_ray.errors import RunInterrupted, TeacherError, TopdError, WorkerLostError
from topd_ray.metrics.step_lines import read_lines
from topd_ray.pipeline.checkpoint import RunState
from topd_ray.pipeline.ledger import read_ledger
from topd_ray.pipeline.plan import plan_run
from topd_ray.pipeline.run import run

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 40


@pytest.fixture
def go(address: str, orders: Orders, tmp_path: Path) -> Callable[..., tuple[RunState, list[str]]]:
    """Runs, or goes on with, a run in `tmp_path / "run"`; returns its end and what it said."""
    ray.shutdown()

    def go(*overrides: str) -> tuple[RunState, list[str]]:
        said: list[str] = []
        fixed = (
            *(f"run.root={tmp_path}", "run.name=run", "run.steps=null", "run.epochs=1", "run.checkpoint_every=2"),
            *("rollout.prompts_per_step=4", f"data.arithmetic.num_train={NUM_PROMPTS}", "data.heldout=null"),
            *("resources.threads_per_learner=1", f"resources.ray_address={address}", "metrics.tensorboard=false"),
        )
        config = load_config(ROOT / "jobs" / "demo.yaml", (*fixed, *overrides))
        return run(plan_run(config, said.append), RayFleet, said.append), said

    return go


def assert_each_trained_once(folder: Path) -> None:
    report = read_ledger(folder / "ledger.jsonl")
    assert (report.trained_once, report.lost, report.doubled) == (NUM_PROMPTS, 0, 0)
    assert json.loads((folder / "summary.json").read_text())["steps"] == NUM_PROMPTS // 4
    assert (folder / "export" / "student").read_text() == str(NUM_PROMPTS // 4)


def restarts(said: list[str]) -> list[str]:
    return [line for line in said if "all workers start again" in line]


Go = Callable[..., tuple[RunState, list[str]]]


@pytest.mark.parametrize("order", ["once die", "once stop"])
def test_the_learner_is_lost_before_the_first_checkpoint(go: Go, orders: Orders, tmp_path: Path, order: str) -> None:
    orders("learner0-learn", order)
    _, said = go("faults.stall_seconds=4", "pipeline.max_staleness=1")
    reason = "is lost: The actor died" if order == "once die" else "does not answer: learn took longer than faults.st"
    (line,) = restarts(said)
    assert line.startswith(f"learner rank 0 {reason}") and line.endswith("from the last checkpoint")
    assert_each_trained_once(tmp_path / "run")


def test_the_learner_is_lost_after_a_checkpoint_and_while_one_or_the_export_is_written(
    go: Go, orders: Orders, tmp_path: Path
) -> None:
    orders("learner0-pack_weights-3", "once die")
    orders("learner0-save", "once die")
    orders("learner0-export", "once die")
    _, said = go("pipeline.max_staleness=1")
    assert len(restarts(said)) == 3
    assert_each_trained_once(tmp_path / "run")


def test_the_last_restart_has_a_post_mortem_and_one_clear_line(go: Go, orders: Orders, tmp_path: Path) -> None:
    orders("learner0-learn", "die")
    with pytest.raises(WorkerLostError) as error:
        go("faults.max_restarts=1")
    assert str(error.value).startswith(
        "the run had to begin again more than faults.max_restarts=1 times within faults.window_seconds=600, the last "
        "time: learner rank 0 is lost: The actor died unexpectedly"
    )
    (bundle,) = (tmp_path / "run" / "post-mortem").iterdir()
    assert "learner rank 0 is lost" in (bundle / "error.txt").read_text()
    assert not ray.is_initialized()


def test_an_input_that_kills_the_learner_ends_the_run_however_slowly_and_is_among_those_named(
    go: Go, orders: Orders, tmp_path: Path
) -> None:
    orders("learner0-learn-2", "die")
    with pytest.raises(WorkerLostError) as error:
        go("faults.max_restarts=1", "faults.window_seconds=0.01")
    folder = tmp_path / "run"
    message = str(error.value)
    assert message.startswith(
        "the run had to begin again more than faults.max_restarts=1 times without progress, the last time: learner "
        "rank 0 is lost: The actor died unexpectedly"
    )
    assert "; it was loss 2 while the learner made update 3 of 4 trajectories (prompt/epoch/sample): " in message
    assert message.endswith(f"; all are listed in {folder}/failed_batch/update-000003.jsonl")
    lines = [json.loads(line) for line in (folder / "failed_batch" / "update-000003.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["trajectory_id"] in message for line in lines)
    (bundle,) = (folder / "post-mortem").iterdir()
    assert (bundle / "failed_batch" / "update-000003.jsonl").exists()
    assert "while the learner made update 3" in (bundle / "error.txt").read_text()


def test_losses_of_the_learner_with_progress_in_between_are_forgotten(go: Go, orders: Orders, tmp_path: Path) -> None:
    for version in (1, 4):
        orders(f"learner0-learn-{version}", "once die")
    _, said = go("faults.max_restarts=1", "faults.window_seconds=0.01")
    assert len(restarts(said)) == 2 and all("it was loss 1 while the learner made" in line for line in restarts(said))
    assert_each_trained_once(tmp_path / "run")
    assert not (tmp_path / "run" / "failed_batch").exists()


def test_a_worker_that_cannot_start_has_a_post_mortem_with_logs(go: Go, orders: Orders, tmp_path: Path) -> None:
    orders("teacher-setup", "die")
    with pytest.raises(TeacherError, match=r"^teacher worker 0 has failed more than faults\.max_restarts=0 times"):
        go("faults.max_restarts=0")
    (bundle,) = (tmp_path / "run" / "post-mortem").iterdir()
    assert json.loads((bundle / "about.json").read_text())["left_out"] == []
    assert not ray.is_initialized()


def test_a_rollout_worker_is_lost_during_an_evaluation(go: Go, orders: Orders, tmp_path: Path) -> None:
    orders("rollout-evaluate", "once die")
    every = ("data.heldout=arithmetic", "data.arithmetic.num_heldout=4", "evaluation.every=5")
    state, said = go(*every)
    assert len(restarts(said)) == 1 and set(state.accuracy) == {"teacher", "before", "after"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if "evaluation/student/pass_at_1" in line]
    assert evaluated == [0, 5, 10]
    assert_each_trained_once(tmp_path / "run")


@pytest.mark.parametrize("staleness", [0, 2])
def test_an_interrupt_leaves_a_checkpoint_from_which_the_run_goes_on(
    go: Go, orders: Orders, tmp_path: Path, staleness: int
) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"

    def interrupt() -> None:
        while not (metrics.exists() and metrics.read_text().count("loss/total") >= 3):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    overrides = ("run.checkpoint_every=0", f"pipeline.max_staleness={staleness}")
    orders("learner0-learn", "pause")
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(RunInterrupted, match="stopped by SIGTERM"):
        go(*overrides)
    thread.join()
    stopped_at = int((tmp_path / "run" / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert 3 <= stopped_at < NUM_PROMPTS // 4
    _, said = go(*overrides)
    assert any(line == f"resumed at update {stopped_at} of 10" for line in said)
    assert_each_trained_once(tmp_path / "run")


def test_an_evaluation_that_an_interrupt_broke_off_is_made_when_the_run_goes_on(
    go: Go, orders: Orders, tmp_path: Path
) -> None:
    def interrupt() -> None:
        while not (orders.folder / "rollout-evaluate.done").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    evaluation = ("evaluation.every=5", "evaluation.before=false", "data.arithmetic.num_heldout=4")
    orders("rollout-evaluate", "once wait end")
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(RunInterrupted, match="stopped by SIGTERM"):
        go("data.heldout=arithmetic", *evaluation)
    thread.join()
    orders("end")
    for _ in range(2):
        go("data.heldout=arithmetic", *evaluation)
        lines = read_lines(tmp_path / "run" / "answers.jsonl")
        assert [line["step"] for line in lines if line["key"] == "step_5"] == [5]


def test_errors_of_the_config_while_workers_start_stay_what_they_are(go: Go, orders: Orders, tmp_path: Path) -> None:
    orders("rollout-setup", "raise ConfigError: no such model")
    with pytest.raises(TopdError, match=r"^no such model$") as error:
        go()
    assert type(error.value).__name__ == "ConfigError" and not (tmp_path / "run" / "post-mortem").exists()
