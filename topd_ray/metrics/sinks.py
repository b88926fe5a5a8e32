"""Where metrics are written: always `metrics.jsonl`, and what the config asks for."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from topd_ray.config.schema import MetricsConfig
from topd_ray.metrics.step_lines import StepLines


class Sink(Protocol):
    """Takes the figures of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object a line (`StepLines`); figures that are not finite become null."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._lines = StepLines(path, resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._lines.write(step, {key: value if math.isfinite(value) else None for key, value in values.items()})

    def close(self) -> None:
        self._lines.close()


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
