"""Numbered Parquet parts of a study: each is written whole or not at all, so what is there need not be made again."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from topd_ray.errors import ConfigError
from topd_ray.provenance import UNKNOWN, commit

_SECONDS, _COMMIT = b"topd_ray.seconds", b"topd_ray.commit"


class Parts:
    """The files `NAME-00000.parquet` and so on of one folder. Making one counts from the end of the one before."""

    def __init__(self, folder: Path, name: str, num_parts: int, columns: Sequence[str]) -> None:
        """`columns`: names of those that every part has."""
        self._folder = folder
        self._name = name
        self._num_parts = num_parts
        self._columns = columns
        self._begun = time.monotonic()

    def missing(self) -> list[int]:
        """Numbers of the parts still to make."""
        return [index for index in range(self._num_parts) if not self._path(index).exists()]

    def begin(self) -> None:
        """Now begins the making of the next part."""
        self._begun = time.monotonic()

    def write(self, index: int, table: pa.Table) -> None:
        """Keep `table`, with the seconds it took and the commit that made it, as part `index`."""
        seconds = time.monotonic() - self._begun
        metadata = {
            **(table.schema.metadata or {}),
            _SECONDS: f"{seconds:.3f}".encode(),
            _COMMIT: (commit() or UNKNOWN).encode(),
        }
        path = self._path(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.tmp")
        pq.write_table(table.replace_schema_metadata(metadata), unfinished)
        with unfinished.open("rb+") as handle:
            os.fsync(handle.fileno())
        unfinished.rename(path)
        self.begin()

    def read(self, index: int) -> pa.Table:
        """Part `index`, as it was written. Raises ConfigError for a file that is none, or has other columns."""
        table = self._read(index)
        metadata = {
            key: value for key, value in (table.schema.metadata or {}).items() if key not in (_SECONDS, _COMMIT)
        }
        return table.replace_schema_metadata(metadata)

    def read_all(self) -> pa.Table:
        """All parts, in order."""
        return pa.concat_tables([self.read(index) for index in range(self._num_parts)]).combine_chunks()

    def seconds(self) -> float:
        """What the making of all parts took."""
        return sum(float(pq.read_schema(self._path(index)).metadata[_SECONDS]) for index in range(self._num_parts))

    def commits(self) -> set[str]:
        """Of the source that made the parts: more than one where a study went on under other code."""
        found = (pq.read_schema(self._path(index)).metadata for index in range(self._num_parts))
        return {metadata.get(_COMMIT, UNKNOWN.encode()).decode() for metadata in found}

    def _read(self, index: int) -> pa.Table:
        path = self._path(index)
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise ConfigError(f"{path} cannot be read ({error}); delete it, and it is made again") from error
        if set(table.column_names) != set(self._columns) or _SECONDS not in (table.schema.metadata or {}):
            raise ConfigError(
                f"{path}: found columns {', '.join(table.column_names)} of another version or program, right would be "
                f"{', '.join(self._columns)}; delete it, and it is made again"
            )
        return table

    def _path(self, index: int) -> Path:
        return self._folder / f"{self._name}-{index:05d}.parquet"
