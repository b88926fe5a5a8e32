"""A probe of the embedded pair with real engines: what its rows hold, and that an interruption changes nothing."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from topd_ray.cli import main
from topd_ray.config.load import load_config
from topd_ray.config.schema import TopdConfig
from topd_ray.data.tokenizer import load_tokenizer
from topd_ray.studies.parts import Parts
from topd_ray.studies.probe.study import probe
from topd_ray.studies.results import load_results
from topd_ray.studies.rollouts import first_requests

OVERRIDES = (
    "studies.probe.num_trajectories=22",
    "studies.probe.trajectories_per_part=8",
    "studies.probe.num_examples=2",
    "data.arithmetic.num_train=60",
    "rollout.max_new_tokens=48",
)
NUM_PARTS = 3


@dataclass(frozen=True)
class Probes:
    whole: Path
    """of a probe that ran through"""
    resumed: Path
    """of one that was stopped twice"""
    config: TopdConfig
    said: list[list[str]]
    """by the sessions of the latter"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probes]:
    root = tmp_path_factory.mktemp("probes")
    config = load_config(Path("jobs/demo.yaml"), OVERRIDES)
    assert main(["probe", "jobs/demo.yaml", *OVERRIDES, "--out", str(root / "whole")]) == 0
    said = [stopped(config, root / "resumed", after) for after in ("rollouts-00001", "positions-00000")]
    said.append([])
    probe(config, root / "resumed", "topd probe jobs/demo.yaml", said[-1].append)
    yield Probes(root / "whole", root / "resumed", config, said)


def stopped(config: TopdConfig, folder: Path, after: str) -> list[str]:
    """A session that ends when the part `after` is written; what it said."""
    said: list[str] = []
    write = Parts.write

    def write_and_stop(self: Parts, index: int, table: pa.Table) -> None:
        write(self, index, table)
        if (folder / "rows" / f"{after}.parquet").exists():
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Parts, "write", write_and_stop)
        probe(config, folder, "topd probe jobs/demo.yaml", said.append)
    return said


def rows_of(folder: Path) -> list[dict[str, object]]:
    parts = sorted((folder / "rows").glob("positions-*.parquet"))
    assert len(parts) == NUM_PARTS
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def test_an_interrupted_probe_ends_as_one_left_alone(probes: Probes) -> None:
    assert rows_of(probes.resumed) == rows_of(probes.whole)
    whole, resumed = load_results(probes.whole), load_results(probes.resumed)
    for key in ("figures", "tables", "notes", "pictures", "seeds", "config"):
        assert resumed[key] == whole[key], key
    for name in ("examples.md", *whole["pictures"]):
        assert (probes.resumed / name).read_bytes() == (probes.whole / name).read_bytes(), name


def test_nothing_is_drawn_or_looked_at_twice(probes: Probes) -> None:
    loaded = [[line.split(", ")[-1] for line in said if line.startswith("loading")] for said in probes.said]
    assert loaded == [
        ["which draws 22 rollouts"],
        ["which draws 6 rollouts", "which looks ahead"],
        ["which looks ahead"],
    ]


def test_the_rollouts_are_the_first_that_training_would_draw(probes: Probes) -> None:
    requests = first_requests(probes.config, load_tokenizer(probes.config.student), 22, lambda _: None)
    rows = rows_of(probes.whole)
    assert list(dict.fromkeys(row["trajectory_id"] for row in rows)) == [one.trajectory_id for one in requests]


def test_rows_hold_the_windows_from_their_position(probes: Probes) -> None:
    rollouts = {
        row["trajectory_id"]: row
        for part in sorted((probes.whole / "rows").glob("rollouts-*.parquet"))
        for row in pq.read_table(part).to_pylist()
    }
    window = probes.config.near_future.window
    for row in rows_of(probes.whole):
        response = rollouts[row["trajectory_id"]]["response_ids"]
        assert row["student_ids"] == response[row["position"] : row["position"] + window]
        assert 1 <= len(row["teacher_ids"]) <= window
        assert row["loss"] == -row["teacher_logprob"] and row["label"] == ""
        assert row["student_logprob"] == rollouts[row["trajectory_id"]]["behaviour_logprobs"][row["position"]]
        same = sorted(row["student_ids"]) == sorted(row["teacher_ids"])
        assert (row["distance"] == 0.0) == same and row["distance"] <= 2.0
        if len(row["student_ids"]) == len(row["teacher_ids"]):
            assert row["distance"] <= row["position_cost"] + 1e-6, "the best plan costs no more than the identity"
    kinds = [row["kind"] for row in rows_of(probes.whole)]
    assert kinds.count("high") == kinds.count("random") == kinds.count("low") > 22


def test_results_are_plain_json_with_every_figure(probes: Probes) -> None:
    assert load_results(probes.whole)["command"] == " ".join(["topd probe jobs/demo.yaml", *OVERRIDES])
    found = json.loads((probes.whole / "results.json").read_text(), parse_constant=pytest.fail)
    figures = found["figures"]
    assert figures["counts"]["trajectories"] == 22 and figures["counts"]["prompts"] == 22
    assert figures["detection"] is None and figures["paper"]["false_alarm_share"] == 0.2923
    assert figures["median_distance"]["high"]["value"] > figures["median_distance"]["low"]["value"]
    assert figures["median_distance"]["high"]["low"] is not None
    sorts = [one["sort"] for one in figures["examples"]]
    assert sorts == ["false alarm"] * 2 + ["real fork"] * 2
    assert all(one["prefix"] and one["student"] and one["teacher"] for one in figures["examples"])
    assert found["seconds"] > 0 and found["pictures"] == ["scatter.png", "distances.png"]
    for name in found["pictures"]:
        assert (probes.whole / name).read_bytes().startswith(b"\x89PNG")
