"""A small ablation of the embedded pair: stopped, with a run that fails, finished, and not run again."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from topd_ray.config.load import load_config
from topd_ray.errors import TopdError
from topd_ray.studies.comparison.runs import LOG
from topd_ray.studies.comparison.study import compare_arms
from topd_ray.studies.results import load_results

ROOT = Path(__file__).parents[2]
STEPS = 24
ARMS = ("opd", "topd", "broken")
SMALL = (
    f"run.steps={STEPS}",
    "rollout.prompts_per_step=8",
    "rollout.max_new_tokens=64",
    "data.arithmetic.num_heldout=16",
    "data.arithmetic.num_train=256",
    f"evaluation.every={STEPS // 2}",
    "evaluation.sampled_runs=2",
    "teacher.verify=false",
    "metrics.tensorboard=false",
    "studies.arms.seeds=[0]",
    "studies.arms.only=[topd]",
    "studies.arms.runs_at_once=2",
)


BROKEN = ("studies.arms.only=[topd,broken]", "studies.arms.more={broken: [learner.weight_decay=0.1]}")


def test_stopped_failed_finished_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    out, opd, topd, broken = (tmp_path / name for name in ("small", *(f"small/{arm}-seed0" for arm in ARMS)))
    said: list[str] = []

    def study(*overrides: str) -> str:
        config = load_config(Path("jobs/demo.yaml"), [*SMALL, f"run.root={tmp_path}", *overrides])
        return compare_arms("ablation", config, out, said.append, command="topd study ablation jobs/demo.yaml")

    stop_the_study_once_it_learns(topd, tmp_path)
    stopped_at = int((topd / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert not (topd / "summary.json").exists()
    broken.mkdir()
    with (broken / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TopdError, match=r"1 of 3 runs failed(?s:.)*broken-seed0 ended with 2: error: another pro"):
            study(*BROKEN)
    assert f"resumed at update {stopped_at} of {STEPS}" in (topd / LOG).read_text()
    assert load_results(out)["notes"][-1] == "no finished run of broken (seeds 0)"
    logs = [(folder / LOG).stat().st_size for folder in (opd, topd)]
    shown = study()
    assert [(folder / LOG).stat().st_size for folder in (opd, topd)] == logs
    assert said[-2] == "2 of 2 runs are finished already"
    assert [line.split()[0] for line in shown.splitlines()[1:5]] == ["arm", "start", "opd", "topd"]
    figures = load_results(out)["figures"]
    assert (figures["num_updates"], figures["num_prompts"]) == (STEPS, 16)
    assert figures["arms"]["topd"]["curve"]["steps"][-1] == STEPS and figures["arms"]["topd"]["windows"] > 0
    for folder in (opd, topd):
        summary = json.loads((folder / "summary.json").read_text())["accuracy"]
        measures = figures["arms"][folder.name.removesuffix("-seed0")]["pass_at_1"]
        assert measures["greedy"]["value"] == pytest.approx(summary["after"])
        assert measures["sampled"]["value"] == pytest.approx(summary["after_sampled"])


def stop_the_study_once_it_learns(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "topd_ray", "study", "ablation", "jobs/demo.yaml", *SMALL]
    process = subprocess.Popen(
        [*command, f"run.root={tmp_path}", "--out", str(tmp_path / "small")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 400
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and "loss/total" in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert not psutil.wait_procs(children, timeout=10)[1], "no run goes on without its study"
