"""Rows of prompt files, each with the place it stands at."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from topd_ray.config.text import expanded
from topd_ray.errors import DataError

Row = tuple[str, Any]
"""(file and line or row number, counted from 1; the row)"""

COLUMNS = ("prompt", "messages", "answer", "id")
"""What is read of tables: others may hold what Python has no value for, such as nanoseconds."""

_DAMAGED = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What Arrow raises for files it cannot read: OSError also for damaged pages and for compressed data."""


def read_rows(source: str, split: str) -> Iterator[Row]:
    """The rows of a .jsonl file, a .parquet file, or a folder written by `datasets.save_to_disk`.

    A folder of several splits is read at `split`. Raises DataError, with the place, for a source that is missing, of
    another kind, empty or malformed.
    """
    path = Path(expanded(source))
    if not path.exists():
        raise DataError(f"{source}: found no such file or folder")
    if path.is_dir():
        rows = _read_folder(path, split)
    elif path.suffix == ".jsonl":
        rows = _read_jsonl(path)
    elif path.suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        raise DataError(f"{source}: found a file that is neither .jsonl nor .parquet")
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{source}: found no rows, right would be a prompt a row")


def _read_jsonl(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _parsed(line, where)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: found bytes that are not UTF-8 text at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: found no valid JSON ({error}), right would be one object a line") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            yield from _numbered(path, file.iter_batches(columns=COLUMNS))
    except _DAMAGED as error:
        raise DataError(f"{path}: found no valid Parquet: {error}") from error


def _read_folder(folder: Path, split: str) -> Iterator[Row]:
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = _read_json(splits).get("splits", [])
        if split not in names:
            raise DataError(f"{folder}: found the splits {', '.join(map(str, names))}; name one, as {folder}/train")
        folder = folder / split
    if not (folder / "state.json").is_file():
        raise DataError(f"{folder}: found no state.json, right would be a folder written by datasets.save_to_disk")
    try:
        files = [folder / str(one["filename"]) for one in _read_json(folder / "state.json")["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder}/state.json: found no list of data files") from error
    number = 0
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: found no such file, though {folder}/state.json names it")
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                for row in _numbered(folder, stream, start=number + 1):
                    number += 1
                    yield row
        except _DAMAGED as error:
            raise DataError(f"{path}: found no valid Arrow stream: {error}") from error


def _numbered(path: Path, batches: Any, start: int = 1) -> Iterator[Row]:
    number = start
    for batch in batches:
        for row in batch.select([name for name in COLUMNS if name in batch.schema.names]).to_pylist():
            yield f"{path} row {number}", row
            number += 1


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: found no readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: found JSON that is not an object")
    return value
