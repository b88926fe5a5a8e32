"""Checkpoints: written under a temporary name, synced, renamed, then pointed at.

checkpoints/step-000050/learner/...     weights and moments, a share from every rank
checkpoints/step-000050/state.json      the driver's state
checkpoints/step-000050/manifest.json   size and CRC-32 of every file above, and whose they are; written last
checkpoints/latest                      name of the newest complete one

A folder is only ever seen whole: it gets its name when all of it is on the disk, and loses it before it is deleted.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from topd_ray.errors import CheckpointError, WorkerLostError
from topd_ray.pipeline.manifest import Identity, fault, write_manifest

NAME = re.compile(r"step-(\d{6,})(\.1)?")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What the driver must remember from one step to the next. JSON only."""

    step: int = 0
    """updates made"""
    begun: str = ""
    """date and time of the run's first session, for chat templates that write them; empty in checkpoints without it"""
    total_updates: int | None = None
    """where the run was to end; None in checkpoints that do not say"""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """A checkpoint, and what is wrong with it."""

    name: str
    is_latest: bool
    fault: str | None
    """the end of a sentence that begins with the name; None where all is well"""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        identity: Identity | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`identity` is written into each checkpoint, and those of another one are refused; unset, any is taken."""
        self._folder = folder
        self._keep = keep
        self._identity = identity
        self._say = say

    def save(self, state: RunState, write_learner: Callable[[Path], None]) -> Path:
        """Write a checkpoint and point at it; then delete the oldest ones.

        A process that is killed at any point leaves the checkpoint before, or this one, to `load`. What cannot be
        deleted is said, and tried again by the next save. Raises CheckpointError if it cannot be written, and
        WorkerLostError if a learner rank is lost meanwhile; the checkpoints before it stay as they are.
        """
        target = self._folder / self._free_name(state.step)
        for leftover in self._folder.glob(".step-*"):
            self._delete(leftover)
        unfinished = self._hidden(target.name, "tmp")
        try:
            (unfinished / "learner").mkdir(parents=True)
            write_learner(unfinished / "learner")
            (unfinished / "state.json").write_text(json.dumps(asdict(state), indent=1, sort_keys=True) + "\n")
            write_manifest(unfinished, self._identity or {})
            _sync_tree(unfinished)
            if target.exists():
                self._delete(target)
            unfinished.rename(target)
            _sync(self._folder)
            self._point_at(target.name)
        except WorkerLostError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        except Exception as error:  # each writer has errors of its own for a full disk
            shutil.rmtree(unfinished, ignore_errors=True)
            latest = self.latest()
            kept = f"the last complete one is {self._folder / latest}" if latest else "there is no earlier one"
            message = f"the checkpoint of step {state.step} could not be written: {error}; {kept}"
            raise CheckpointError(message) from error
        names = self._names()
        place = names.index(target.name)
        for name in [*names[: max(0, place + 1 - self._keep)], *names[place + 1 :]]:
            self._delete(self._folder / name)
        return target

    def load(self) -> tuple[RunState, Path] | None:
        """The newest checkpoint's state and its learner folder; None if there is none.

        Reads all of it. Raises CheckpointError, with the last good checkpoint and how to go on from it, for one that is
        not what was written, is of an older format, or is of another run.
        """
        latest = self.latest()
        if latest is None:
            return None
        folder = self._folder / latest
        if found := self._fault(latest):
            raise CheckpointError(f"checkpoint {folder} {found}. {self._advice(latest)}")
        try:
            state = RunState(**json.loads((folder / "state.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"checkpoint {folder} cannot be read: {error}. {self._advice(latest)}") from error
        return state, folder / "learner"

    def latest(self) -> str | None:
        """The name that the pointer holds, whatever it is; None without a pointer."""
        pointer = self._folder / "latest"
        return pointer.read_text(errors="replace").strip() if pointer.exists() else None

    def examine(self) -> list[Examined]:
        """Every checkpoint, and what `latest` names if that is none, the newest first. Reads all of them."""
        latest = self.latest()
        names = self._names()[::-1]
        if latest is not None and latest not in names:
            names.insert(0, latest)
        return [Examined(name=name, is_latest=name == latest, fault=self._fault(name)) for name in names]

    def command(self, name: str) -> str:
        """What to type to make a run go on from another checkpoint."""
        return f"echo {name} > {self._folder / 'latest'}"

    def _fault(self, name: str) -> str | None:
        if NAME.fullmatch(name) is None:
            return "is no name of a checkpoint"
        return fault(self._folder / name, self._identity)

    def _advice(self, bad: str) -> str:
        for name in reversed(self._names()):
            if name != bad and self._fault(name) is None:
                return f"The last good one is {name}; to go on from it: {self.command(name)}"
        return "No other checkpoint is whole and of this run: begin again under another run.name"

    def _names(self) -> list[str]:
        """Oldest first."""
        names = (path.name for path in self._folder.glob("step-*") if NAME.fullmatch(path.name))
        return sorted(names, key=lambda name: (step_of(name), name))

    def _free_name(self, step: int) -> str:
        """Another than the latest one's, which stays until the new one is pointed at."""
        name = f"step-{step:06d}"
        return f"{name}.1" if self.latest() == name else name

    def _hidden(self, name: str, ending: str) -> Path:
        """A name that is free, whatever could not be deleted."""
        paths = (self._folder / f".{name}.{number}.{ending}" for number in count())
        return next(path for path in paths if not path.exists())

    def _delete(self, folder: Path) -> None:
        """A checkpoint loses its name before its files."""
        try:
            if NAME.fullmatch(folder.name):
                folder = folder.rename(self._hidden(folder.name, "old"))
            shutil.rmtree(folder)
        except OSError as error:
            self._say(f"{folder} cannot be deleted ({error}); the next checkpoint will try again")

    def _point_at(self, name: str) -> None:
        write_whole(self._folder / "latest", name + "\n")
        _sync(self._folder)


def step_of(name: str) -> int:
    """The update that a checkpoint was written after."""
    match = NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name!r} is no name of a checkpoint, right would be step-000050")
    return int(match[1])


def write_whole(path: Path, text: str) -> None:
    """Replace a file's content: whoever reads it finds the old or the new one, whole."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text)
    _sync(unfinished)
    unfinished.rename(path)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
