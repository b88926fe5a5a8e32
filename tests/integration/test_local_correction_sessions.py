"""`topd study local-correction` on the demo pair: engines, updates, files, and going on where it stopped."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from topd_ray.cli import main

COMMAND = ["study", "local-correction", "jobs/demo.yaml"]
SMALL = [
    "studies.local_correction={num_points: 2, num_updates: 2, num_redraws: 2, other_rates: [], redraw_window: true}"
]


def test_a_study_ends_goes_on_and_refuses_another_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With windows drawn anew, so that the teacher's engine and the student's updates share the process."""
    out = ["--out", str(tmp_path)]
    assert main([*COMMAND, *out, *SMALL]) == 0
    assert "No intervals: 2 points" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    (rate,) = results["figures"]["distance"]["rates"]
    assert set(results["figures"]["distance"]["rates"][rate]) >= {"opd", "topd", "teacher_context", "ratio"}
    assert results["command"] == f"topd study local-correction jobs/demo.yaml '{SMALL[0]}'"
    assert (tmp_path / "local-correction.png").stat().st_size > 0
    points = pq.read_table(tmp_path / "rows" / "points-00000.parquet")
    assert points.num_rows == 2 and min(points["distance"].to_pylist()) > results["figures"]["threshold"]

    corrected = tmp_path / "rows" / "corrected-00000.parquet"
    rows = pq.read_table(corrected).to_pylist()
    assert [row["arm"] for row in rows] == ["before", "opd", "topd", "identity", "teacher_context"] * 2
    written = corrected.stat().st_mtime_ns
    assert main([*COMMAND, *out, *SMALL]) == 0
    assert corrected.stat().st_mtime_ns == written, "what is there is not measured again"
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["figures"] == results["figures"] and again["seconds"] == results["seconds"]

    capsys.readouterr()
    assert main([*COMMAND, *out, *SMALL, "objective.guidance_weight=0.5"]) == 2
    assert "objective.guidance_weight: 0.3 there, 0.5 here" in capsys.readouterr().err
