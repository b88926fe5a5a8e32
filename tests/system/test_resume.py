"""A run is stopped, its checkpoints are damaged, and it goes on with other numbers of workers and ranks."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from topd_ray.cli import main
from topd_ray.pipeline.ledger import read_ledger

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 128
SETTINGS = (
    "run.epochs=1",
    "run.steps=null",
    "run.checkpoint_every=2",
    f"data.arithmetic.num_train={NUM_PROMPTS}",
    "data.heldout=null",
    "rollout.prompts_per_step=8",
    "rollout.max_new_tokens=64",
    "pipeline.max_staleness=1",
    "teacher.verify=false",
    "metrics.tensorboard=false",
    "resources.threads_per_learner=1",
)
pytestmark = pytest.mark.slow


def arguments(root: Path, *overrides: str) -> list[str]:
    return ["run", "jobs/demo.yaml", *SETTINGS, f"run.root={root}", "run.name=run", *overrides]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one worker and one rank that SIGTERM has stopped half-way."""
    root = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "topd_ray", *arguments(root), "--inline"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = root / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and '{"step": 5,' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 128 + signal.SIGTERM, output
    return root


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray that has as many CPUs as it says, whatever the machine has."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    command = ["ray", "start", "--head", "--block", "--port=0", "--num-cpus=6", "--include-dashboard=false"]
    process = subprocess.Popen(
        [Path(sys.executable).with_name(command[0]), *command[1:], "--disable-usage-stats"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    found = next((match[1] for line in process.stdout if (match := re.search(r"address='([\d.:]+)'", line))), None)
    assert found, "Ray has not said where it is"
    family = psutil.Process(process.pid).children(recursive=True)
    yield found
    process.terminate()
    process.communicate(timeout=150)
    psutil.wait_procs(family, timeout=20)


def checkpoints(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(("damage", "said"), [("tear", "is torn: "), ("swap", "is of another run: run.seed is 5")])
def test_a_damaged_checkpoint_is_refused_and_the_last_good_one_named(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, said: str
) -> None:
    shutil.copytree(stopped / "run", tmp_path / "run")
    *_, good, newest = checkpoints(tmp_path)
    folder = tmp_path / "run" / "checkpoints" / newest
    if damage == "tear":
        largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["identity"]["run.seed"] = 5
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(arguments(tmp_path)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: CheckpointError: checkpoint {folder} {said}")
    assert f"The last good one is {good}; to go on from it: echo {good} > {folder.parent}/latest" in error


def test_goes_on_with_other_numbers_of_workers_and_ranks(stopped: Path, tmp_path: Path, address: str) -> None:
    """From the last checkpoint but one, as the refusal of a torn one advises."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    good = checkpoints(tmp_path)[-2]
    (tmp_path / "run" / "checkpoints" / "latest").write_text(good)
    workers = ("rollout.num_workers=2", "teacher.num_workers=2", "learner.num_ranks=2")
    command = [sys.executable, "-m", "topd_ray", *arguments(tmp_path, *workers, f"resources.ray_address={address}")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed at update {int(good.removeprefix('step-'))} of {NUM_PROMPTS // 8}" in done.stdout
    report = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert (report.trained_once, report.lost, report.doubled, report.faults) == (NUM_PROMPTS, 0, 0, ())
