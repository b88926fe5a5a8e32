"""Whole runs of the embedded pair through the command line: what they write, how they stop, how they go on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from topd_ray.metrics.figures import FIGURES

ROOT = Path(__file__).parents[2]
SMALL = (
    "run.steps=3",
    "rollout.prompts_per_step=8",
    "rollout.max_new_tokens=64",
    "learner.max_tokens_per_micro_batch=256",
    "data.arithmetic.num_heldout=16",
    "data.arithmetic.num_train=64",
)

BROADCAST = ("weights.channel=broadcast", "resources.gpus_per_learner=0", "resources.gpus_per_rollout=0")


def command(root: Path, name: str, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "-m", "topd_ray", "run", "jobs/demo.yaml"),
        *(f"run.root={root}", f"run.name={name}", *SMALL, *overrides),
    ]


def topd(root: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(root, name, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(folder / "export" / "model.safetensors").items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def deterministic(root: Path) -> Path:
    """A run under Ray with everything fixed, left alone."""
    topd(root, "alone", "run.deterministic=true")
    return root / "alone"


def test_the_run_folder_holds_what_is_promised(deterministic: Path) -> None:
    summary = json.loads((deterministic / "summary.json").read_text())
    assert summary["objective"] == "topd"
    assert set(summary["accuracy"]) == {"before", "after", "teacher"}
    assert summary["num_prompts"] == 16
    assert summary["steps"] == 3
    assert summary["trained_tokens"] > 3 * 8 * 5
    assert summary["seconds"] > 0
    assert (deterministic / "config.yaml").exists()
    assert (deterministic / "checkpoints" / "latest").read_text() == "step-000003\n"
    assert list(deterministic.glob("**/events.out.tfevents*"))


def test_every_figure_is_in_the_table_of_figures(deterministic: Path) -> None:
    written = {key for record in records(deterministic) for key in record}
    assert len(written) > 40 and written - set(FIGURES) == set()


def test_no_payload_passes_through_the_driver(deterministic: Path) -> None:
    summary = json.loads((deterministic / "summary.json").read_text())
    assert summary["driver_payload_bytes"] == 0
    messages = records(deterministic)[-2]["run/driver_message_bytes"]
    assert messages < 3 * 8 * 2000 + 40_000, "counts and handles alone: under 2 kB a trajectory"


def test_the_student_moves_and_each_step_is_on_policy(deterministic: Path) -> None:
    steps = [record for record in records(deterministic) if "loss/total" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert [record["run/policy_version"] for record in steps] == [1, 2, 3]
    assert all(record["mismatch/abs_logprob"] < 1e-3 for record in steps), "rollout and learner score alike in fp32"
    before = load_file(ROOT / "topd_ray/demo/pair/student/model.safetensors")
    after = load_file(deterministic / "export" / "model.safetensors")
    assert set(before) == set(after)
    assert any((before[name] != after[name]).any() for name in before)


def test_the_export_loads_in_transformers(deterministic: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(deterministic / "export")
    model = AutoModelForCausalLM.from_pretrained(deterministic / "export")
    logits = model(torch.tensor([tokenizer.encode("1+2")])).logits
    assert logits.isfinite().all()


def test_inline_gives_the_bitwise_same_student_and_goes_on_to_more_updates(root: Path, deterministic: Path) -> None:
    topd(root, "inline", "run.deterministic=true", "evaluation.every=2", "--inline")
    assert weights(root / "inline") == weights(deterministic)
    evaluated = [record for record in records(root / "inline") if "evaluation/student/pass_at_1" in record]
    assert [record["step"] for record in evaluated] == [0, 2, 3]
    done = topd(root, "inline", "run.deterministic=true", "run.steps=4", "evaluation.every=2", "--inline")
    assert "resumed at update 3 of 4" in done.stdout
    assert json.loads((root / "inline" / "summary.json").read_text())["steps"] == 4
    assert weights(root / "inline") != weights(deterministic)


def test_eval_of_the_export_through_vllm(deterministic: Path) -> None:
    arguments = ["eval", "jobs/demo.yaml", *SMALL, "--model", str(deterministic / "export")]
    done = subprocess.run(
        [sys.executable, "-m", "topd_ray", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    summary = json.loads((deterministic / "summary.json").read_text())
    assert result["pass_at_1"] == summary["accuracy"]["after"]
    assert (result["num_prompts"], result["num_runs"]) == (16, 1)


def test_a_signal_writes_a_checkpoint_leaves_nothing_behind_and_the_same_command_goes_on(
    root: Path, deterministic: Path
) -> None:
    """And new weights by broadcast are the same as those by way of the object store."""
    settings = ("run.deterministic=true", "run.checkpoint_every=0", *BROADCAST)
    process = start(root, "stopped", *settings, until="loss/total")
    family = family_of(process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "checkpoint of update" in output
    assert_gone(family)
    stopped_at = int((root / "stopped" / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert 1 <= stopped_at <= 3
    topd(root, "stopped", *settings)
    assert weights(root / "stopped") == weights(deterministic)


def test_a_worker_that_fails_too_often_ends_the_run_with_one_line_and_leaves_nothing_behind(root: Path) -> None:
    process = start(root, "died", "run.steps=500", "faults.max_restarts=0", until="loss/total")
    family = family_of(process)
    only("Teacher", family).kill()
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 1, output
    assert "error: TeacherError: teacher worker 0 has failed more than faults.max_restarts=0 times within" in output
    assert "the last checkpoint is step-" in output and "Traceback" not in output
    assert_gone(family)
    (bundle,) = (root / "died" / "post-mortem").iterdir()
    assert list((bundle / "logs").rglob("TeacherWorker-*"))


def only(worker: str, family: list[psutil.Process]) -> psutil.Process:
    """The process of the only worker of a kind."""
    (found,) = [one for one in family if f"ray::{worker}Worker" in " ".join(one.cmdline())]
    return found


def start(root: Path, name: str, *overrides: str, until: str) -> subprocess.Popen[str]:
    """A run that has written `until` into its metrics."""
    process = subprocess.Popen(
        command(root, name, *overrides), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = root / name / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and until in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    return process


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def assert_gone(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, alive


def test_a_non_finite_loss_stops_the_run_and_keeps_the_batch(root: Path) -> None:
    exploding = ("learner.learning_rate=1e30", "learner.gradient_clipping=0", "learner.warmup_fraction=0")
    done = subprocess.run(
        command(root, "exploded", *exploding, "evaluation.before=false", "evaluation.teacher=false"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: NonFiniteLossError" in done.stderr and "Traceback" not in done.stderr
    (saved,) = (root / "exploded" / "failed_batch").glob("*.parquet")
    assert str(saved) in done.stderr
    assert pq.read_table(saved).num_rows == 8
