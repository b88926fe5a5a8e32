"""Where metrics are written: always `metrics.jsonl`, and what the config asks for."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from topd_ray.config.schema import MetricsConfig
from topd_ray.errors import DataError


class Sink(Protocol):
    """Takes the figures of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object a line, `step` first, written through at once; figures that are not finite become null.

    Opening cuts off what a run that is resumed at `resume_step` will write again: all lines from the first later step
    on, and a last line that was not finished. Raises DataError for a file with other lines than its own.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open("r+b") as file:
                file.truncate(_kept_bytes(path, resume_step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        figures = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """TensorBoard events; those of steps after `resume_step` that an earlier session wrote are hidden."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        started = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=started))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        figures = [self._summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=figures)))

    def close(self) -> None:
        self._writer.close()


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    @classmethod
    def open(cls, config: MetricsConfig, folder: Path, *, resume_step: int = 0, more: Sequence[Sink] = ()) -> "Sinks":
        """The sinks of the run in `folder`, which goes on after update `resume_step`, and `more`."""
        sinks: list[Sink] = [JsonlSink(folder / "metrics.jsonl", resume_step)]
        if config.tensorboard:
            sinks.append(TensorBoardSink(folder / "tensorboard", resume_step))
        return cls([*sinks, *more])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, values)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def _kept_bytes(path: Path, resume_step: int) -> int:
    """Length of the file up to the first line of a later step."""
    kept = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}:{number}: found a line that is no figures of a step; move the file away"
                ) from error
            if step > resume_step:
                break
            kept += len(line)
    return kept
