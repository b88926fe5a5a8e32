"""Checkpoints: written under a temporary name, synced, renamed, then pointed at.

checkpoints/step-000050/learner/...     DeepSpeed's state of every rank
checkpoints/step-000050/state.json      the driver's state
checkpoints/step-000050/manifest.json   the size of every file above, written last
checkpoints/latest                      name of the newest complete one
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from topd_ray.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What the driver must remember from one step to the next. JSON only."""

    step: int = 0
    """updates made"""
    policy_version: int = 0
    schedule: dict[str, Any] = field(default_factory=dict)
    """of the PromptSchedule"""
    quantile: dict[str, Any] = field(default_factory=dict)
    """of the RunningQuantile of transport distances"""
    trained_tokens: int = 0
    """response tokens the learner has seen"""
    driver_payload_bytes: int = 0
    """arrays and Arrow buffers that training steps have brought to the driver"""
    seconds: float = 0.0
    """wall time of all sessions of the run, the start of the workers excepted"""
    accuracy: dict[str, float] = field(default_factory=dict)
    """pass@1 of the teacher and of the student before; at the end also after"""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, state: RunState, write_learner: Callable[[Path], None]) -> Path:
        """Write a checkpoint and point at it; then delete the oldest ones.

        Raises CheckpointError if it cannot be written; the checkpoints before it stay as they are.
        """
        target = self._folder / f"step-{state.step:06d}"
        unfinished = self._folder / f".{target.name}.tmp"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            (unfinished / "learner").mkdir(parents=True)
            write_learner(unfinished / "learner")
            _write_json(unfinished / "state.json", {"format": FORMAT, **asdict(state)})
            _write_json(unfinished / "manifest.json", _sizes(unfinished))
            _sync_tree(unfinished)
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
            self._point_at(target.name)
        except Exception as error:  # each writer has errors of its own for a full disk
            shutil.rmtree(unfinished, ignore_errors=True)
            last = self._newest()
            kept = f"the last complete one is {last}" if last else "there is no earlier one"
            message = f"the checkpoint of step {state.step} could not be written: {error}; {kept}"
            raise CheckpointError(message) from error
        abandoned = [path for path in self._all() if path.name > target.name]
        older = [path for path in self._all() if path.name < target.name]
        for path in [*abandoned, *older[: len(older) + 1 - self._keep]]:
            shutil.rmtree(path)
        return target

    def load(self) -> tuple[RunState, Path] | None:
        """The newest checkpoint's state and its learner folder; None if there is none.

        Raises CheckpointError if a file of it is missing or has another size than when it was written.
        """
        newest = self._newest()
        if newest is None:
            return None
        try:
            manifest = json.loads((newest / "manifest.json").read_text())
            raw = json.loads((newest / "state.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {newest} cannot be read: {error}. {self._other(newest)}") from error
        if _sizes(newest) != manifest:
            found = _sizes(newest)
            wrong = sorted(name for name in {*manifest, *found} if manifest.get(name) != found.get(name))
            raise CheckpointError(f"checkpoint {newest} is torn: {', '.join(wrong)}. {self._other(newest)}")
        if raw.pop("format", None) != FORMAT:
            raise CheckpointError(f"checkpoint {newest} was written by another version of topd_ray")
        return RunState(**raw), newest / "learner"

    def _newest(self) -> Path | None:
        pointer = self._folder / "latest"
        return self._folder / pointer.read_text().strip() if pointer.exists() else None

    def _other(self, bad: Path) -> str:
        earlier = [path for path in self._all() if path != bad]
        if not earlier:
            return "There is no other checkpoint: start again with run.resume=never and another run.name"
        return f"To go on from {earlier[-1].name}, write that name into {self._folder / 'latest'}"

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))

    def _point_at(self, name: str) -> None:
        write_whole(self._folder / "latest", name + "\n")
        _sync(self._folder)


def write_whole(path: Path, text: str) -> None:
    """Replace a file's content: whoever reads it finds the old or the new one, whole."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text)
    _sync(unfinished)
    unfinished.rename(path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder`, the manifest itself excepted."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
