"""Saves a checkpoint in child processes, each killed with SIGKILL before another call into the operating system.

python kill_at.py FOLDER: for k = 1, 2, ... copy FOLDER/before, save step 2 there and die at the k-th call; print, as
JSON, for each k the step that the copy's checkpoints give afterwards, and whether saving again then works.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType

from topd_ray.pipeline.checkpoint import Checkpoints, RunState

FILE_METHODS = {"write", "flush", "close", "open", "truncate", "readinto", "fileno"}


def write_learner(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(b"weights" * 10)
    (folder / "b.safetensors").write_bytes(b"moments" * 10)


def die_at(count: int) -> None:
    """Kill this process before its `count`-th call of a function of `posix` or method of a file."""
    left = count

    def profile(frame: FrameType, event: str, function: object) -> None:
        nonlocal left
        if event != "c_call":
            return
        if getattr(function, "__module__", None) == "posix" or getattr(function, "__name__", "") in FILE_METHODS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


def save_and_die(folder: Path, step: int, count: int) -> bool:
    """Whether the child was killed; False if it was through before."""
    child = os.fork()
    if child == 0:
        die_at(count)
        Checkpoints(folder, keep=2).save(RunState(step=step), write_learner)
        sys.setprofile(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the child failed: {status}"
    return os.WIFSIGNALED(status)


def main(root: Path, step: int) -> None:
    outcomes = []
    killed, count = True, 0
    while killed:
        count += 1
        folder = root / "after"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / "before", folder)
        killed = save_and_die(folder, step, count)
        checkpoints = Checkpoints(folder, keep=2)
        loaded = checkpoints.load()
        faults = [one.name for one in checkpoints.examine() if one.fault]
        checkpoints.save(RunState(step=3), write_learner)
        again = checkpoints.load()
        entries = sorted(path.name for path in folder.iterdir())
        outcomes.append(
            {
                "killed": killed,
                "loaded": loaded and loaded[0].step,
                "faults": faults,
                "again": again and again[0].step,
                "hidden": [name for name in entries if name.startswith(".step")],
                "kept": len([name for name in entries if name.startswith("step")]),
            }
        )
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
