"""The collector of `make bench`, and what the sides of the end-to-end comparison share."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

import bench.__main__ as collector
from bench.end_to_end import compare, task
from bench.report import Row, is_met

ROW: Row = {
    "name": "one",
    "ours": 2.0,
    "peer": 4.0,
    "peer_version": "torch 2",
    "unit": "s",
    "ratio": 0.5,
    "goal": 0.6,
    "repeats": 3,
    "spread": [0.4, 0.6],
}
PLAIN_KEYS = ["name", "ours", "peer", "peer_version", "unit", "ratio", "goal", "repeats", "spread"]


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `bench.tiny`, a part whose measure() runs the given body, in at most two seconds."""

    def make(body: str) -> str:
        (tmp_path / "bench").mkdir()
        (tmp_path / "bench" / "tiny.py").write_text(f"def measure():\n    {body}\n")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path.cwd()}")
        monkeypatch.setitem(collector.PARTS, "tiny", 2)
        return "tiny"

    return make


@pytest.mark.parametrize(
    ("unit", "ratio", "goal", "met"),
    [
        ("s", 0.6, 0.6, True),
        ("s", 0.61, 0.6, False),
        ("tokens/s", 1.0, 1.0, True),
        ("tokens/s", 0.99, 1.0, False),
        ("tokens/s", 0.1, None, True),
    ],
)
def test_a_cost_is_to_be_small_and_a_rate_large(unit: str, ratio: float, goal: float | None, met: bool) -> None:
    assert is_met({**ROW, "unit": unit, "ratio": ratio, "goal": goal}) is met


def test_a_part_gives_its_rows(part: Any) -> None:
    assert collector.run_part(part(f"return [{ROW!r}]")) == [ROW]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no peer here')", "exit code 1\n.*no peer here"),
        ("import time; time.sleep(60)", "more than 2 s"),
        ("return []", "no rows"),
        (f"return [{ {k: v for k, v in ROW.items() if k != 'goal'}!r}]", "row one lacks goal"),
        (f"return [{ {**ROW, 'ratio': None}!r}]", "right would be finite numbers"),
    ],
)
def test_a_part_that_cannot_run_is_an_error(part: Any, body: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(collector.PartError, match=f"(?s){message}"):
        collector.run_part(part(body))
    assert time.monotonic() - started < 20


def test_results_replace_the_table_between_the_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{collector.BEGIN}old\n{collector.END}after\n")
    monkeypatch.setattr(collector, "README", readme)
    monkeypatch.setattr(collector, "FOLDER", tmp_path / "results")
    missed: Row = {**ROW, "name": "two", "ratio": 0.7, "floor": 1.0}
    collector.write_results([ROW, missed], 12.3)
    rows = json.loads((tmp_path / "results" / "cpu.json").read_text())
    assert [list(row) for row in rows] == [PLAIN_KEYS, PLAIN_KEYS]
    assert rows[0] == ROW
    about = json.loads((tmp_path / "results" / "cpu_about.json").read_text())
    assert about["floors"] == {"two": 1.0} and about["seconds"] == 12 and "torch" in about["versions"]
    text = readme.read_text()
    assert text.startswith(f"before\n{collector.BEGIN}") and text.endswith(f"{collector.END}after\n")
    assert "| `one` | s | 2 | 4 (torch 2) | 0.5 [0.4, 0.6] | ≤ 0.6 | met |  |\n" in text
    assert "| `two` | s | 2 | 4 (torch 2) | 0.7 [0.4, 0.6] | ≤ 0.6 | **missed** | 2 |\n" in text
    assert "old" not in text


@pytest.mark.parametrize("name", ["short", "long"])
def test_prompts_of_a_case_are_answered_and_fit(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from topd_ray.demo.tokenizer import render_prompt

    case = task.CASES[name]
    task.write_files(case, 3, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    rows = task.read_rows(tmp_path / "train.jsonl")
    heldout = task.read_rows(tmp_path / "heldout.jsonl")
    assert len(rows) == 3 * task.PROMPTS_PER_UPDATE and len(heldout) == case.num_heldout
    assert len({row["prompt"] for row in rows + heldout}) == len(rows) + len(heldout)
    for row in rows + heldout:
        assert eval(row["prompt"]) == int(row["answer"])
        assert len(render_prompt(tokenizer, row["prompt"])) <= case.max_prompt_tokens
    assert case.max_prompt_tokens + case.max_new_tokens < task.MAX_POSITIONS


def test_a_comparison_becomes_rows_of_paired_medians() -> None:
    turns = [
        {
            "seconds": seconds,
            "num_tokens": 640,
            "num_updates": 2,
            "num_cut": 32,
            "stages": {"learn": 0.5},
            "lengths": [],
        }
        for seconds in (1.0, 2.0, 8.0)
    ]
    side = compare.side_result(turns, {"num_tokens": 60}, accuracy=0.25)
    assert side == {
        "tokens_per_second": 320,
        "seconds_per_update": 1.0,
        "stages": {"learn": 0.25, "other": 0.75},
        "mean_length": 5.0,
        "cut_share": 0.25,
        "trained_tokens": 1980,
        "accuracy": 0.25,
    }
    result = {
        "case": "short",
        "floor_tokens_per_second": 900,
        "sides": {"opd": side, "topd": side, "trl": side},
        "rates": [{"opd": 4.0, "topd": 1.0, "trl": 2.0}, {"opd": 3.0, "topd": 2.0, "trl": 2.0}],
    }
    opd, topd = compare.rows(result, goal=1.0, peer_version="trl 1.16.0")
    assert (opd["name"], opd["ratio"], opd["spread"], opd["goal"]) == ("end_to_end_vs_trl_short", 1.75, [1.5, 2.0], 1.0)
    assert (topd["name"], topd["ratio"], topd["goal"]) == ("end_to_end_topd_vs_trl_short", 0.75, None)
