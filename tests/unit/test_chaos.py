"""The verdict on runs that were killed: every kind of harm is seen."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos import Outcome, is_unharmed, summary

WELL = Outcome(
    mode="deterministic",
    kills=3,
    survived=3,
    prompts=8,
    trained_once=8,
    lost=0,
    doubled=0,
    bitwise_equal=True,
    failure=None,
    seconds=1.0,
)


def verdict(folder: Path, *outcomes: Outcome) -> bool:
    (folder / "kills.jsonl").write_text(json.dumps({"phase": "writing", "killed": ["driver"]}) + "\n")
    return is_unharmed(summary(folder, list(outcomes)))


def test_runs_that_are_well(tmp_path: Path) -> None:
    assert verdict(tmp_path, WELL, replace(WELL, mode="asynchronous", bitwise_equal=None))


@pytest.mark.parametrize(
    "harm",
    [
        {"survived": 2},
        {"trained_once": 7, "lost": 1},
        {"trained_once": 7, "doubled": 1},
        {"bitwise_equal": False},
        {"bitwise_equal": None},
        {"failure": "the cursor went back"},
    ],
    ids=lambda harm: next(iter(harm)),
)
def test_runs_that_are_not(tmp_path: Path, harm: dict[str, object]) -> None:
    assert not verdict(tmp_path, replace(WELL, **harm))  # type: ignore[arg-type]
