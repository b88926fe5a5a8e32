"""Metrics: reduction, and where they are written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from topd_ray.config.schema import MetricsConfig
from topd_ray.errors import DataError
from topd_ray.metrics.records import reduce
from topd_ray.metrics.sinks import JsonlSink, Sinks, TensorBoardSink
from topd_ray.types import Metric


def lines(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(folder: Path, key: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def test_reduce_weighs_by_count() -> None:
    metrics = [
        Metric(key="loss", sum=1.0, count=1),
        Metric(key="tokens", sum=5),
        Metric(key="loss", sum=1.0, count=3),
        Metric(key="never", sum=0.0, count=0),
    ]
    assert reduce(metrics) == {"loss": 0.5, "tokens": 5.0}
    assert reduce([]) == {}


def test_jsonl_is_written_through(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "run" / "metrics.jsonl")
    sink.write(1, {"loss": 0.5, "norm": float("nan"), "rate": float("inf")})
    assert lines(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "norm": None, "rate": None}]
    sink.close()


def test_jsonl_cuts_off_what_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": step}) + "\n" for step in (0, 1, 2, 2, 3, 4)) + '{"st')
    sink = JsonlSink(path, resume_step=2)
    sink.write(3, {"loss": 9.0})
    sink.close()
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(0, 0), (1, 1), (2, 2), (2, 2), (3, 9.0)]


def test_jsonl_drops_an_unfinished_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    JsonlSink(path, resume_step=5).close()
    assert path.read_text() == '{"step": 1}\n'


def test_jsonl_leaves_foreign_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2: found a line without the step it belongs to"):
        JsonlSink(path, resume_step=5)
    assert path.read_text() == '{"step": 1}\nhello\n{"step": 2}\n'


def test_tensorboard(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path)
    for step in (1, 2, 3, 4):
        first.write(step, {"loss/total": step / 2})
    first.close()
    second = TensorBoardSink(tmp_path, resume_step=2)
    second.write(3, {"loss/total": 9.0})
    second.close()
    assert scalars(tmp_path, "loss/total") == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_sinks_by_config(tmp_path: Path) -> None:
    for tensorboard in (True, False):
        folder = tmp_path / str(tensorboard)
        sinks = Sinks.open(MetricsConfig(tensorboard=tensorboard), folder, resume_step=0)
        sinks.write(1, {"loss": 0.25})
        sinks.close()
        assert lines(folder / "metrics.jsonl") == [{"step": 1, "loss": 0.25}]
        assert (folder / "tensorboard").exists() is tensorboard
    assert scalars(tmp_path / "True" / "tensorboard", "loss") == [(1, 0.25)]


def test_sinks_do_not_load_torch(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from topd_ray.metrics.sinks import TensorBoardSink\n"
        f"TensorBoardSink(pathlib.Path({str(tmp_path)!r})).close()\n"
        "print('torch' in sys.modules, 'tensorflow' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "False False\n"
