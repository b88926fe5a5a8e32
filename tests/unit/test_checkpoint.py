"""Checkpoints are whole or refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_tiny_model
from topd_ray.config.load import load_config
from topd_ray.data.tokenizer import load_tokenizer
from topd_ray.errors import CheckpointError, WorkerLostError
from topd_ray.pipeline.checkpoint import Checkpoints, RunState, step_of
from topd_ray.pipeline.identity import run_identity
from topd_ray.pipeline.manifest import write_manifest


def write(content: str = "weights") -> object:
    return lambda folder: (folder / "rank-0.pt").write_text(content)


def state(step: int) -> RunState:
    return RunState(step=step, policy_version=step, schedule={"epoch": 1}, accuracy={"before": 0.25})


def test_gives_back_the_newest_state(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.load() is None
    for step in (1, 2, 3):
        checkpoints.save(state(step), write(f"weights {step}"))
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded[0] == state(3)
    assert (loaded[1] / "rank-0.pt").read_text() == "weights 3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000002", "step-000003"]


def test_a_state_without_the_runs_end_is_read(tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    folder = checkpoints.save(state(1), write())
    content = json.loads((folder / "state.json").read_text())
    del content["total_updates"]
    (folder / "state.json").write_text(json.dumps(content))
    (folder / "manifest.json").unlink()
    write_manifest(folder, {})
    loaded = checkpoints.load()
    assert loaded is not None and loaded[0] == state(1)


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state(1), write())

    def disk_full(folder: Path) -> None:
        (folder / "rank-0.pt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step 2 could not be written.*No space left.*step-000001"):
        checkpoints.save(state(2), disk_full)
    loaded = checkpoints.load()
    assert loaded is not None and loaded[0] == state(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]


def test_a_disk_that_fills_up_under_torch_is_reported_the_same_way(tmp_path: Path) -> None:
    """torch.save raises RuntimeError on a full disk; the size limit of a process makes a real one."""
    script = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from topd_ray.pipeline.checkpoint import Checkpoints, RunState\n"
        "from topd_ray.errors import CheckpointError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)\n"
        "save = lambda size: lambda folder: torch.save(torch.zeros(size), folder / 'rank-0.pt')\n"
        "checkpoints.save(RunState(step=1), save(10))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: checkpoints.save(RunState(step=2), save(1_000_000))\n"
        "except CheckpointError as error: print(error)\n"
        "print(checkpoints.load()[0].step, sorted(p.name for p in Path(sys.argv[1]).iterdir()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "the checkpoint of step 2 could not be written" in done.stdout, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "1 ['latest', 'step-000001']"


@pytest.mark.parametrize("stubborn", ["old", "tmp"])
def test_what_cannot_be_deleted_is_said_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubborn: str
) -> None:
    """Old checkpoints, and what a save that failed or was killed has left; also under the same step's name."""
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=1, say=said.append)
    real = shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not path.name.endswith(f".{stubborn}"):
            real(path)
        elif not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))

    def disk_full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "rmtree", busy)
    checkpoints.save(state(1), write())
    checkpoints.save(state(2), write())
    with pytest.raises(CheckpointError):
        checkpoints.save(state(3), disk_full)
    shutil.copytree(tmp_path / "step-000002", tmp_path / "step-000001")
    for step in (3, 4):
        checkpoints.save(state(step), write())
        loaded = checkpoints.load()
        assert loaded is not None and loaded[0] == state(step)
    lasting = tmp_path / (".step-000001.0.old" if stubborn == "old" else ".step-000003.0.tmp")
    assert said.count(
        f"{lasting} cannot be deleted ([Errno 16] Device or resource busy: '{lasting}'); the next checkpoint will try "
        "again"
    ) == (4 if stubborn == "old" else 2)
    assert (tmp_path / ".step-000001.1.old").exists() == (stubborn == "old")
    monkeypatch.undo()
    checkpoints.save(state(5), write())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]


def test_a_checkpoint_that_keeps_its_name_is_deleted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state(1), write())
    real = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path.name == "step-000001":
            raise OSError(16, "Device or resource busy", str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    checkpoints.save(state(2), write())
    loaded = checkpoints.load()
    assert loaded is not None and loaded[0] == state(2)
    monkeypatch.undo()
    checkpoints.save(state(3), write())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000003"]


def test_going_on_from_an_earlier_checkpoint_drops_the_abandoned_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 5):
        Checkpoints(tmp_path, keep=5).save(state(step), write())
    (tmp_path / "latest").write_text("step-000001\n")
    checkpoints.save(state(2), write())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000002"]


def test_a_kill_before_the_pointer_moves_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state(1), write())

    def killed(folder: Path) -> None:
        (folder / "rank-0.pt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(state(2), killed)
    loaded = checkpoints.load()
    assert loaded is not None and loaded[0] == state(1)
    checkpoints.save(state(2), write())
    again = checkpoints.load()
    assert again is not None and again[0] == state(2)


@pytest.mark.parametrize(("steps", "step"), [((), 2), ((0, 1), 2), ((1, 2), 2)], ids=["first", "next", "same"])
def test_a_kill_at_any_call_into_the_system_leaves_a_checkpoint_to_load(
    tmp_path: Path, steps: tuple[int, ...], step: int
) -> None:
    """Also while the checkpoint that is pointed at is written again, and while an old one is deleted."""
    (tmp_path / "before").mkdir()
    for earlier in steps:
        Checkpoints(tmp_path / "before", keep=2).save(state(earlier), write())
    script = Path(__file__).with_name("kill_at.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(step)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert [one["killed"] for one in outcomes] == [True] * (len(outcomes) - 1) + [False]
    assert len(outcomes) > 60, "a save makes at least so many calls"
    before = steps[-1] if steps else None
    loaded = [one["loaded"] for one in outcomes]
    first_new = loaded.index(step)
    assert set(loaded[:first_new]) <= {before} and set(loaded[first_new:]) == {step}
    assert not any(one["faults"] for one in outcomes), "what has a checkpoint's name is whole"
    assert {one["again"] for one in outcomes} == {3}
    assert {tuple(one["hidden"]) for one in outcomes} == {()}
    assert all(one["kept"] <= 2 for one in outcomes)


def save_two(folder: Path) -> Path:
    """Checkpoints of steps 1 and 2; the weights of the second."""
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(state(1), write())
    return checkpoints.save(state(2), write()) / "learner" / "rank-0.pt"


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        ("truncate", r"is torn: learner/rank-0.pt has 3 bytes instead of 7\."),
        ("remove", r"is torn: learner/rank-0.pt is missing\."),
        ("add", r"is torn: learner/rank-1.pt does not belong there\."),
        ("flip", r"is torn: learner/rank-0.pt has other content than was written \(CRC-32 \w{8} instead of \w{8}\)\."),
        ("unlist", r"cannot be read: FileNotFoundError: .*manifest.json'\."),
        ("garble", r"cannot be read: JSONDecodeError: "),
        ("vanish", r"is not there\."),
        ("older", r"has the format 1, this topd_ray reads 2: end the run with the version that began it"),
    ],
)
def test_what_is_not_what_was_written_is_refused_and_the_last_good_one_named(
    tmp_path: Path, damage: str, finding: str
) -> None:
    weights = save_two(tmp_path)
    manifest = weights.parents[1] / "manifest.json"
    if damage == "truncate":
        weights.write_text("wei")
    elif damage == "remove":
        weights.unlink()
    elif damage == "add":
        weights.with_name("rank-1.pt").write_text("stranger")
    elif damage == "flip":
        weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    elif damage == "unlist":
        manifest.unlink()
    elif damage == "garble":
        manifest.write_text("{")
    elif damage == "vanish":
        shutil.rmtree(manifest.parent)
    else:
        manifest.write_text(json.dumps({"learner/rank-0.pt": 7, "state.json": 200}))
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.raises(CheckpointError, match=f"step-000002 {finding}") as error:
        checkpoints.load()
    command = f"echo step-000001 > {tmp_path / 'latest'}"
    assert str(error.value).endswith(f"The last good one is step-000001; to go on from it: {command}")
    subprocess.run(command, shell=True, check=True)
    loaded = checkpoints.load()
    assert loaded is not None and loaded[0] == state(1)


def test_a_bad_one_is_never_named_as_the_last_good_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        Checkpoints(tmp_path, keep=3).save(state(step), write())
    for step in (2, 3):
        (tmp_path / f"step-00000{step}" / "state.json").write_text("{}")
    checkpoints = Checkpoints(tmp_path, keep=3)
    with pytest.raises(CheckpointError, match=r"step-000003 is torn.*The last good one is step-000001;"):
        checkpoints.load()
    assert [(one.name, one.is_latest, one.fault is None) for one in checkpoints.examine()] == [
        ("step-000003", True, False),
        ("step-000002", False, False),
        ("step-000001", False, True),
    ]
    (tmp_path / "step-000001" / "learner" / "rank-0.pt").write_text("other")
    with pytest.raises(CheckpointError, match="No other checkpoint is whole and of this run"):
        checkpoints.load()


def test_the_pointer_leads_nowhere_else(tmp_path: Path) -> None:
    save_two(tmp_path / "run")
    save_two(tmp_path / "stranger")
    (tmp_path / "run" / "latest").write_text("../stranger/step-000002\n")
    with pytest.raises(CheckpointError, match=r"is no name of a checkpoint\. The last good one is step-000002;"):
        Checkpoints(tmp_path / "run", keep=2).load()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    mine = {"student.hidden_size": 64, "student.num_hidden_layers": 2, "run.seed": 0}
    Checkpoints(tmp_path, keep=2, identity=mine).save(state(1), write())
    Checkpoints(tmp_path, keep=2, identity={**mine, "student.hidden_size": 128, "run.seed": 7}).save(state(2), write())
    right = (
        r"is of another run: run.seed is 7 there, 0 in this run; student.hidden_size is 128 there, 64 in this run\. "
        "The last good one is step-000001;"
    )
    with pytest.raises(CheckpointError, match=right):
        Checkpoints(tmp_path, keep=2, identity=mine).load()


def test_the_identity_is_the_students_architecture_vocabulary_and_the_seed(tmp_path: Path) -> None:
    def identity(folder: Path, *overrides: str) -> dict[str, object]:
        config = load_config(Path("jobs/demo.yaml"), [f"student.model={folder}", *overrides])
        return run_identity(config, load_tokenizer(config.student))

    one = identity(make_tiny_model(tmp_path / "one", seed=0))
    assert one == identity(make_tiny_model(tmp_path / "retrained", seed=1), "learner.learning_rate=1e-3")
    other = identity(make_tiny_model(tmp_path / "wider", seed=0, num_rows=104), "run.seed=3")
    assert {key for key in {*one, *other} if one.get(key) != other.get(key)} == {"student.vocab_size", "run.seed"}
    tokenizer = load_tokenizer(load_config(Path("jobs/demo.yaml"), [f"student.model={tmp_path / 'one'}"]).student)
    tokenizer.add_tokens(["<new>"])
    config = load_config(Path("jobs/demo.yaml"), [f"student.model={tmp_path / 'one'}"])
    assert run_identity(config, tokenizer)["vocabulary"] != one["vocabulary"]


def test_as_many_are_kept_as_asked(tmp_path: Path) -> None:
    for step in range(1, 8):
        Checkpoints(tmp_path, keep=5).save(state(step), write())
        assert len(list(tmp_path.glob("step-*"))) == min(step, 5)
    assert step_of("step-1000000") == 1_000_000
    Checkpoints(tmp_path, keep=5).save(state(1_000_000), write())
    loaded = Checkpoints(tmp_path, keep=5).load()
    assert loaded is not None and loaded[0].step == 1_000_000
    assert (tmp_path / "step-000004").exists()


def test_a_lost_rank_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state(1), write())

    def lose(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise WorkerLostError("learner rank 0 is lost")

    with pytest.raises(WorkerLostError):
        checkpoints.save(state(2), lose)
    assert [path.name for path in tmp_path.iterdir() if "step" in path.name] == ["step-000001"]
