"""What the doctor finds in run folders, well and damaged ones."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest

from tests.tiny import make_tiny_model
from topd_ray.cli import main
from topd_ray.config.load import dump_config, load_config
from topd_ray.data.tokenizer import load_tokenizer
from topd_ray.doctor.finding import Finding
from topd_ray.doctor.run import report
from topd_ray.metrics.step_lines import StepLines
from topd_ray.pipeline.checkpoint import Checkpoints, RunState
from topd_ray.pipeline.identity import run_identity
from topd_ray.pipeline.ledger import Ledger

NUM_PROMPTS, SAMPLES = 4, 2


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four updates of two prompts, as it stands at its end; the models and checkpoints are real, but tiny."""
    root = tmp_path_factory.mktemp("runs")
    student = make_tiny_model(root / "student", seed=0)
    overrides = [f"student.model={student}", "run.name=healthy", f"rollout.samples_per_prompt={SAMPLES}"]
    config = load_config(Path("jobs/demo.yaml"), overrides)
    folder = root / "healthy"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / ".lock").touch()
    ledger = Ledger.open(folder / "ledger.jsonl", 0, num_prompts=NUM_PROMPTS, samples_per_prompt=SAMPLES)
    metrics = StepLines(folder / "metrics.jsonl")
    metrics.write(0, {"preflight/learner_difference": 1e-6})
    identity = run_identity(config, load_tokenizer(config.student))
    checkpoints = Checkpoints(folder / "checkpoints", keep=3, identity=identity)
    for step in (1, 2, 3, 4):
        epoch, first = divmod(2 * (step - 1), NUM_PROMPTS)
        trained = [(epoch, f"p{first + place}", sample, step - 1) for place in (0, 1) for sample in (0, 1)]
        ledger.write(step, policy_version=step, trained=trained, position=2 * step, num_open=0)
        metrics.write(step, {"loss/total": 1.0 / step})
        if step % 2 == 0:
            state = RunState(step=step, policy_version=step, schedule={"position": 2 * step})
            checkpoints.save(state, lambda learner: (learner / "part.safetensors").write_bytes(b"weights"))
    ledger.close()
    metrics.close()
    shutil.copytree(student, folder / "export")
    (folder / "summary.json").write_text(json.dumps({"steps": 4}))
    return folder


@pytest.fixture
def folder(healthy: Path, tmp_path: Path) -> Path:
    shutil.copytree(healthy, tmp_path / "healthy")
    return tmp_path / "healthy"


def troubles(folder: Path) -> list[Finding]:
    return [finding for finding in report(folder) if finding.state != "ok"]


def only(folder: Path) -> Finding:
    (finding,) = troubles(folder)
    return finding


def test_a_run_that_is_well(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["doctor", str(folder)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in printed] == [
        "ok config topd, run.seed 0",
        "ok lock free, no process trains here",
        "ok step-000004 whole, the latest, the last good one",
        "ok step-000002 whole",
        "ok metrics 5 lines, up to update 4",
        "ok ledger 4 updates, 8 prompts drawn x 2 samples, 8 trained on once, 0 lost, 0 doubled, 0 quarantined, "
        "0 dropped, 0 open, staleness up to 0",
        "ok progress update 4 is safe",
        f"ok export whole, {len(list_tensors(folder))} tensors",
        "",
        "8 looked at, 0 missing, 0 wrong, 0 to note",
    ]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before, "it changes nothing"


def list_tensors(folder: Path) -> list[str]:
    header = (folder / "export" / "model.safetensors").read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    return [name for name in names if name != "__metadata__"]


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "found no config.yaml, right would be the folder of a run" in capsys.readouterr().err


def test_a_torn_latest_checkpoint_names_the_last_good_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "checkpoints" / "step-000004" / "learner" / "part.safetensors").write_bytes(b"weighty")
    assert main(["doctor", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "the latest, is torn: learner/part.safetensors has other content than was written" in printed
    assert f"-> go on from the last good one: echo step-000002 > {folder / 'checkpoints' / 'latest'}" in printed
    (folder / "checkpoints" / "latest").write_text("step-000002\n")
    older = only(folder)
    assert older.mend == f"delete it: rm -r {folder / 'checkpoints' / 'step-000004'}"
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    assert troubles(folder) == []
    (progress,) = [finding.found for finding in report(folder) if finding.subject == "progress"]
    assert progress == "update 2 is safe, 2 later ones would be done again"


def test_checkpoints_without_a_pointer_would_be_forgotten(folder: Path) -> None:
    (folder / "checkpoints" / "latest").unlink()
    assert only(folder).found == "none of them is pointed at, the run would begin at its start"
    assert only(folder).mend == f"echo step-000004 > {folder / 'checkpoints' / 'latest'}"


def test_a_checkpoint_of_another_run_is_found(folder: Path) -> None:
    config = load_config(folder / "config.yaml", ["run.seed=7"])
    (folder / "config.yaml").write_text(dump_config(config))
    assert {finding.found for finding in troubles(folder)} == {
        "the latest, is of another run: run.seed is 0 there, 7 in this run",
        "is of another run: run.seed is 0 there, 7 in this run",
    }


def test_a_lost_and_a_doubled_trajectory_are_found(folder: Path) -> None:
    path = folder / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[4]["trained"][0] = lines[4]["trained"][1]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [finding.found for finding in troubles(folder)] == [
        "1 samples of complete epochs are missing, and 0 are open",
        "1 trajectories are lost",
        "1 trajectories were trained on twice: p2 (epoch 1, sample 1)",
    ]


def test_files_that_do_not_agree_are_found(folder: Path) -> None:
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(whole[:4]))
    (found,) = [finding for finding in troubles(folder) if finding.subject == "progress"]
    assert found.found == "metrics.jsonl ends at update 3, the latest checkpoint is of 4"
    assert found.mend == f"go on from an earlier one: echo step-000002 > {folder / 'checkpoints' / 'latest'}"
    metrics.write_text("".join([*whole[:2], *whole[3:]]))
    assert only(folder).found == "updates [2] are missing"
    metrics.write_text("".join(whole[:2]) + "garbage\n")
    assert only(folder).found.endswith(
        "metrics.jsonl:3: found a line without the step it belongs to; move the file away"
    )
    metrics.write_text("".join(whole) + '{"step": 5, "lo')
    assert troubles(folder) == [], "a killed process leaves unfinished lines"
    state = folder / "checkpoints" / "step-000004"
    shutil.rmtree(state)
    shutil.copytree(folder / "checkpoints" / "step-000002", state)
    assert only(folder).found == "the ledger's cursor at update 4 is 8, the checkpoint's 4"


def test_a_ledger_that_is_behind_or_absent_is_found(folder: Path) -> None:
    path = folder / "ledger.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert only(folder).found == "2 updates, 4 in metrics.jsonl"
    path.unlink()
    assert only(folder).found == "there is none, and updates were made"


def test_a_torn_or_absent_export_is_found(folder: Path) -> None:
    weights = folder / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert only(folder).found.startswith("torn: ")
    shutil.rmtree(folder / "export")
    assert (only(folder).found, only(folder).state) == ("gone", "wrong")
    (folder / "summary.json").unlink()
    assert (only(folder).found, only(folder).state) == ("none yet, the run has not ended", "note")


def test_a_run_under_way_and_what_failures_left_are_noted(folder: Path) -> None:
    (folder / "failed_batch").mkdir()
    (folder / "failed_batch" / "version-000003-rank-0.parquet").write_bytes(b"PAR1")
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = troubles(folder)
    assert [(finding.subject, finding.state) for finding in found] == [("lock", "note"), ("failed_batch", "note")]
    assert found[1].found == "1 files: the batch of a loss that was not finite, or that the learner was lost with"


def test_a_run_that_has_just_begun_is_well(folder: Path) -> None:
    for name in ("checkpoints", "export"):
        shutil.rmtree(folder / name)
    for name in ("metrics.jsonl", "ledger.jsonl", "summary.json"):
        (folder / name).unlink()
    assert {finding.state for finding in troubles(folder)} == {"note"}
    (folder / "config.yaml").write_text("rolout: {}\n")
    (config,) = [finding for finding in troubles(folder) if finding.state == "wrong"]
    assert "rollout" in config.found
