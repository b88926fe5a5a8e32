"""Checkpoints are whole or refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from topd_ray.errors import CheckpointError
from topd_ray.pipeline.checkpoint import Checkpoints, RunState


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


@pytest.mark.parametrize("damage", ["truncate", "remove", "add"])
def test_a_torn_checkpoint_is_refused_and_the_good_one_named(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state(1), write())
    weights = checkpoints.save(state(2), write()) / "learner" / "rank-0.pt"
    if damage == "truncate":
        weights.write_text("wei")
    elif damage == "remove":
        weights.unlink()
    else:
        weights.with_name("rank-1.pt").write_text("stranger")
    with pytest.raises(CheckpointError, match=r"step-000002 is torn: learner/rank-\d.pt.*go on from step-000001"):
        checkpoints.load()
