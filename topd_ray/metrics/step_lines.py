"""A file of JSON objects, one a line, each with the step it belongs to."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from topd_ray.errors import DataError


class StepLines:
    """Appends lines, `step` first, written through at once.

    Opening cuts off what a run that is resumed at `resume_step` will write again: all lines from the first later step
    on, and a last line that was not finished. Raises DataError for a file with other lines than its own.
    """

    def __init__(self, path: Path, resume_step: int = 0, *, synced: bool = False) -> None:
        """`synced`: a line is on the disk, not just with the operating system, when `write` returns."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open("r+b") as file:
                file.truncate(_kept_bytes(path, resume_step))
        self._file = path.open("a", encoding="utf-8")
        self._synced = synced

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._synced:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The finished lines; one that a killed process left unfinished is no line. Raises DataError for other lines."""
    for line, _ in _lines(path):
        yield line


def _kept_bytes(path: Path, resume_step: int) -> int:
    """Length of the file up to the first line of a later step."""
    kept = 0
    for line, end in _lines(path):
        if line["step"] > resume_step:
            break
        kept = end
    return kept


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each finished line, and where it ends (bytes)."""
    end = 0
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
                step = line["step"]
            except (ValueError, KeyError, TypeError):
                step = None
            if not isinstance(step, int):
                raise DataError(f"{path}:{number}: found a line without the step it belongs to; move the file away")
            end += len(text)
            yield line, end
