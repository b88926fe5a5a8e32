"""Runs in one process, with workers that have no engines."""

import json
from pathlib import Path

import pytest

from tests.stand_ins import Orders, workers
from topd_ray.config.load import load_config
from topd_ray.errors import RolloutError, RunInterrupted
from topd_ray.metrics.step_lines import read_lines
from topd_ray.pipeline import inline
from topd_ray.pipeline.ledger import read_ledger
from topd_ray.pipeline.plan import Plan, Say, plan_run
from topd_ray.pipeline.run import run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Orders:
    folder = tmp_path / "orders"
    folder.mkdir()
    kinds = workers(folder)
    for role, name in (("rollout", "RolloutWorker"), ("teacher", "TeacherWorker"), ("learner", "LearnerWorker")):
        monkeypatch.setattr(inline, name, kinds[role])
    return Orders(folder)


def planned(root: Path, say: Say, *overrides: str) -> Plan:
    fixed = (
        *(f"run.root={root}", "run.name=run", "run.steps=null", "run.epochs=1", "run.checkpoint_every=0"),
        *("rollout.prompts_per_step=4", "data.arithmetic.num_train=40", "data.heldout=null"),
        *("rollout.num_workers=2", "teacher.num_workers=2", "metrics.tensorboard=false"),
    )
    return plan_run(load_config(ROOT / "jobs" / "demo.yaml", (*fixed, *overrides)), say)


def go(root: Path, *overrides: str) -> list[str]:
    said: list[str] = []
    run(planned(root, said.append, *overrides), inline.InlineFleet, said.append)
    return said


@pytest.mark.parametrize(
    "overrides", [("run.deterministic=true",), ("pipeline.max_staleness=0",), ("pipeline.max_staleness=3",)]
)
def test_an_interrupted_run_goes_on(orders: Orders, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """The signal comes while the learner learns: that update still counts, and is in the checkpoint."""
    orders("learner0-learn-5", "once interrupt")
    with pytest.raises(RunInterrupted):
        go(tmp_path, *overrides)
    folder = tmp_path / "run"
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    (state,) = checkpoint.rglob("rank-0")
    assert checkpoint.name == "step-000006" and state.read_text() == "6"
    assert "resumed at update 6 of 10" in go(tmp_path, *overrides)
    report = read_ledger(folder / "ledger.jsonl")
    assert (report.trained_once, report.lost, report.doubled) == (40, 0, 0)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 10


def test_a_run_that_goes_on_takes_the_quantile_that_it_is_told_now(orders: Orders, tmp_path: Path) -> None:
    orders("learner0-learn-5", "once interrupt")
    with pytest.raises(RunInterrupted):
        go(tmp_path)
    before = planned(tmp_path, print).distances
    after = planned(tmp_path, print, "near_future.false_alarm_quantile=0.9", "near_future.quantile_window=7").distances
    assert (before.quantile, before.window, len(before.state()["distances"])) == (0.3, 4096, 24)
    assert (after.quantile, after.window) == (0.9, 7)
    assert after.state()["distances"] == before.state()["distances"][-7:]


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize(("prompts_per_step", "steps"), [(2, 14), (3, 11), (4, 10), (8, 8)])
def test_an_epoch_ends_with_its_prompts_also_in_updates_of_another_size(
    orders: Orders, tmp_path: Path, staleness: int, prompts_per_step: int, steps: int
) -> None:
    """24 of 40 prompts are trained on by the interrupt, 4 an update, and with a staleness of 2 eight more are open."""
    overrides = f"pipeline.max_staleness={staleness}", "rollout.samples_per_prompt=2"
    orders("learner0-learn-5", "once interrupt")
    with pytest.raises(RunInterrupted):
        go(tmp_path, *overrides)
    go(tmp_path, *overrides, f"rollout.prompts_per_step={prompts_per_step}")
    report = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert (report.steps, report.faults, report.open) == (steps, (), 0)
    assert report.prompts == report.trained_once == {(3, 0): 39, (3, 2): 38}.get((prompts_per_step, staleness), 40)


@pytest.mark.parametrize("staleness", [0, 1])
def test_evaluations_and_checkpoints_are_no_time_that_workers_wait(
    orders: Orders, tmp_path: Path, staleness: int
) -> None:
    for moment in ("rollout-evaluate", "learner0-save"):
        orders(moment, "pause")
    go(
        tmp_path,
        *("run.steps=4", "run.checkpoint_every=1", f"pipeline.max_staleness={staleness}"),
        *("data.heldout=arithmetic", "evaluation.num_prompts=5", "evaluation.every=1"),
    )
    lines = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert sum(line.get("seconds/evaluation", 0.0) for line in lines) > 5.0
    assert sum(line.get("waiting/rollout", 0.0) for line in lines) < 2.5


def test_what_is_written_before_an_evaluation_takes_its_time(orders: Orders, tmp_path: Path) -> None:
    """Each of 40 trajectories takes a fifth of a second, many of them while the engines are drained."""
    for prompt in planned(tmp_path, print).train:
        orders(f"rollout-write-{prompt.prompt_id}", "pause")
    evaluation = "data.heldout=arithmetic", "evaluation.num_prompts=1", "evaluation.every=1"
    go(tmp_path, "pipeline.max_staleness=1", "rollout.samples_per_prompt=1", *evaluation)
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "seconds/step" in line]
    assert sum(line["seconds/step"] for line in lines) >= 40 * 0.2


def test_the_threshold_of_an_update_is_the_one_its_windows_met(orders: Orders, tmp_path: Path) -> None:
    """All distances are 0.1, and before the first update there are none."""
    go(tmp_path, "run.steps=3")
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "seconds/step" in line]
    assert [line["near_future/threshold"] for line in lines] == pytest.approx([0.0, 0.1, 0.1])


def test_what_was_loaded_is_shut_down_when_another_worker_cannot_be(orders: Orders, tmp_path: Path) -> None:
    orders("teacher-setup", "raise RolloutError: no such model")
    with pytest.raises(RolloutError, match=r"^no such model$"):
        go(tmp_path)
    assert (tmp_path / "orders" / "rollout-ended").exists() and not (tmp_path / "orders" / "teacher-ended").exists()
    (bundle,) = (tmp_path / "run" / "post-mortem").iterdir()
    assert "no such model" in (bundle / "error.txt").read_text()
