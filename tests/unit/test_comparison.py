"""Arms against each other: known differences are found, paired by seed and prompt; run folders are read as they are."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from topd_ray.errors import DataError
from topd_ray.studies.comparison.arms import ABLATION
from topd_ray.studies.comparison.learning import Floats, Learning, Point, read_learning
from topd_ray.studies.comparison.report import draw, paper_notes, tables
from topd_ray.studies.comparison.study import compare
from topd_ray.studies.statistics import bootstrap_crossed, coverage_of_seeds

NUM_PROMPTS = 300
SEEDS = range(5)


def learning(marks_P: Floats, tokens: int = 1000) -> Learning:
    """A run from nothing right to `marks_P`, in a straight line."""
    points = [
        Point(step=step, tokens=tokens * step // 2, seconds=float(step), marks_P=marks_P * step / 2)
        for step in range(3)
    ]
    return Learning(
        curve=tuple(points),
        sampled_before_P=0 * marks_P,
        sampled_after_P=marks_P,
        teacher=1.0,
        seconds=3.0,
        commit="abc",
        scored_tokens=tokens,
        num_windows=0,
        capped=0.0,
    )


def slower(marks_P: Floats) -> Learning:
    """The same in one and a half times the seconds."""
    found = learning(marks_P)
    return replace(found, curve=tuple(replace(point, seconds=1.5 * point.seconds) for point in found.curve))


@pytest.fixture
def opd() -> list[Floats]:
    """Marks of five seeds on prompts that differ much in difficulty."""
    rng = np.random.default_rng(0)
    chances_P = rng.beta(0.5, 0.5, NUM_PROMPTS)
    return [(rng.random(NUM_PROMPTS) < chances_P).astype(np.float64) for _ in SEEDS]


def better(marks_P: Floats, share: float, seed: int) -> Floats:
    """`marks_P` with a share of the wrong answers right."""
    rng = np.random.default_rng(seed)
    return np.maximum(marks_P, rng.random(NUM_PROMPTS) < share)


def test_a_known_difference_is_found_and_is_surer_for_being_paired(opd: list[Floats]) -> None:
    topd = [better(marks_P, 0.1, seed) for seed, marks_P in enumerate(opd)]
    figures = compare(
        ABLATION,
        {"opd": dict(enumerate(map(learning, opd))), "topd": dict(enumerate(map(learning, topd)))},
        paper={"topd": 52.2},
    )
    found = figures["arms"]["topd"]["minus"]["opd"]["greedy"]
    assert found["value"] == pytest.approx(np.mean(topd) - np.mean(opd))
    assert 0.0 < found["low"] < found["value"] < found["high"] and found["n"] == 5
    assert (found["seeds_above"], found["seeds_below"]) == (5, 0)
    assert found["per_seed"]["3"] == pytest.approx(float(np.mean(topd[3] - opd[3])))
    alone = figures["arms"]["topd"]["pass_at_1"]["greedy"]
    assert found["high"] - found["low"] < (alone["high"] - alone["low"]) / 2, "what both share cancels out"
    assert figures["arms"]["opd"]["minus"]["topd"]["greedy"]["value"] == pytest.approx(-found["value"])
    assert figures["arms"]["start"]["pass_at_1"]["greedy"]["value"] == 0.0
    assert [*figures["arms"]] == ["start", "opd", "topd"] and figures["arms"]["topd"]["paper"] == 52.2


def test_no_difference_is_no_difference(opd: list[Floats]) -> None:
    shuffled = [np.roll(marks_P, 1) for marks_P in opd]
    interval = bootstrap_crossed(np.array(opd) - np.array(shuffled))
    assert interval.value == pytest.approx(0.0, abs=1e-12) and interval.low is not None and interval.high is not None
    assert interval.low < 0.0 < interval.high


def test_below_three_seeds_differences_without_intervals(opd: list[Floats]) -> None:
    arms = {name: {seed: learning(opd[seed]) for seed in range(2)} for name in ("opd", "topd")}
    found = compare(ABLATION, arms, paper={})["arms"]["topd"]["minus"]["opd"]["greedy"]
    assert (found["value"], found["low"], found["high"], found["n"]) == (0.0, None, None, 2)


def test_a_point_that_one_seed_lacks_is_left_out_of_the_curve(opd: list[Floats]) -> None:
    runs = {seed: learning(opd[seed]) for seed in SEEDS}
    runs[2] = replace(runs[2], curve=(runs[2].curve[0], runs[2].curve[2]))
    curve = compare(ABLATION, {"opd": runs}, paper={})["arms"]["opd"]["curve"]
    assert curve["steps"] == [0, 2] and curve["tokens"] == [0.0, 1000.0]
    assert curve["mean"][1] == pytest.approx(np.mean(opd)) and curve["lowest"][1] <= curve["mean"][1]


def test_only_seeds_that_both_have_are_paired(opd: list[Floats]) -> None:
    arms = {
        "opd": {seed: learning(opd[seed]) for seed in SEEDS},
        "topd": {seed: learning(better(opd[seed], 0.5, seed)) for seed in (1, 2, 4)},
    }
    found = compare(ABLATION, arms, paper={})["arms"]["topd"]["minus"]["opd"]["greedy"]
    assert found["n"] == 3 and [*found["per_seed"]] == ["1", "2", "4"] and found["low"] > 0.0


@pytest.mark.parametrize(("seed_spread", "answer_spread"), [(0.05, 0.1), (0.0, 0.5)])
def test_the_interval_holds_the_true_mean_about_as_often_as_it_says(seed_spread: float, answer_spread: float) -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        values_SP = 0.1 + seed_spread * rng.standard_normal((5, 1)) + 0.3 * rng.standard_normal((1, 100))
        values_SP = values_SP + answer_spread * rng.standard_normal((5, 100))
        found = bootstrap_crossed(values_SP)
        assert found.low is not None and found.high is not None
        held += found.low <= 0.1 <= found.high
    assert 0.85 <= held / 200 <= 1.0


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_few_seeds_promise_less_than_95_percent_and_that_is_known(num_seeds: int) -> None:
    rng = np.random.default_rng(2)
    held = 0
    for index in range(400):
        seeds_S = rng.standard_normal(num_seeds)
        found = bootstrap_crossed(np.tile(seeds_S[:, None], 2), seed=index)
        assert found.low is not None and found.high is not None
        held += found.low <= 0.0 <= found.high
    assert held / 400 == pytest.approx(coverage_of_seeds(num_seeds), abs=0.06)


def test_a_table_without_prompts_is_refused() -> None:
    with pytest.raises(DataError, match=r"shape \(5, 0\), want seeds x prompts"):
        bootstrap_crossed(np.zeros((5, 0)))


def test_equal_tokens_is_where_the_shortest_run_of_arm_and_opd_ended(opd: list[Floats]) -> None:
    arms = {
        "opd": {seed: learning(opd[seed], 1000) for seed in SEEDS},
        "topd": {seed: learning(opd[seed], 1600) for seed in SEEDS},
        "topd-low-cap": {seed: learning(opd[seed], 600 if seed == 1 else 900) for seed in SEEDS},
        "opd-low-cap": {seed: learning(opd[seed], 2400) for seed in SEEDS},
    }
    found = {name: row.get("equal_tokens") for name, row in compare(ABLATION, arms, paper={})["arms"].items()}
    assert found["opd"]["tokens"] == 1000 and found["opd"]["minus_opd"] is None
    assert found["topd"]["tokens"] == 1000 and found["topd-low-cap"]["tokens"] == 600
    difference = found["topd"]["minus_opd"]
    assert difference["value"] == pytest.approx(-0.375 * np.mean(opd)), "the longer run had 1000 of 1600 tokens by then"
    longest = [0.6 if seed == 1 else 600 / 900 for seed in SEEDS]
    assert found["topd-low-cap"]["minus_opd"]["value"] == pytest.approx(
        np.mean([(1.0 if seed == 1 else longest[seed]) * opd[seed].mean() - 0.6 * opd[seed].mean() for seed in SEEDS])
    )
    assert found["opd-low-cap"] is None, "its first evaluation on the way is at 1200 tokens"
    with pytest.raises(DataError, match="found 1001 trained tokens, right would be 0 to 1000"):
        learning(opd[0], 1000).at(1001)


def test_the_tables_and_the_pictures(opd: list[Floats], tmp_path: Path) -> None:
    topd = [better(marks_P, 0.1, seed) for seed, marks_P in enumerate(opd)]
    arms = {"opd": dict(enumerate(map(learning, opd))), "topd": dict(enumerate(map(slower, topd)))}
    figures = json.loads(json.dumps(compare(ABLATION, arms, paper={"topd": 52.2})))
    end, work, others = tables(figures)
    assert end.title == "pass@1 (%) on 300 prompts after 2 updates, and points above OPD; teacher 100.0"
    rows = {row[0]: dict(zip(end.columns[1:4], row[1:4], strict=True)) | {"paper": row[-1]} for row in end.rows}
    assert [*rows] == ["start", "opd", "topd"] and rows["opd"]["- OPD"] == "-"
    found = figures["arms"]["topd"]["minus"]["opd"]["greedy"]
    assert rows["topd"] == {
        "greedy": f"{100 * np.mean(topd):.1f}",
        "- OPD": f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]",
        "seeds above": "5 of 5",
        "paper": "52.2",
    }
    assert [row[0] for row in work.rows] == ["opd", "topd"]
    assert work.rows[0][:6] == ("opd", "1,000", f"{100 * np.mean(opd):.1f}", "-", "-", "1,000")
    (against_topd,) = others.rows
    assert against_topd[0] == "opd" and against_topd[1].startswith(f"{-100 * found['value']:+.1f} [-")
    assert against_topd[2] == "0 of 5"
    order = "topd > opd > start"
    assert paper_notes(figures) == [
        f"order here, whether by much or not: {order}",
        f"order in the paper: {order}",
        "TOPD's updates take 1.50 times OPD's seconds, in the paper 1.41.",
    ]
    assert all((tmp_path / name).stat().st_size > 5000 for name in draw(figures, tmp_path))


def write_run(folder: Path) -> None:
    """Two updates, an evaluation between them, and one of answers drawn twice a prompt; prompts are three.

    All is written before the first update, and half of it guided then.
    """
    guided = {"rollout/response_tokens": 10.0, "teacher/tokens": 40}
    first = {"rollout/tokens": 80, "near_future/windows": 2.5, **guided}
    second = {"rollout/tokens": 0, "near_future/windows": 1.5, **guided}
    metrics = [
        {"step": 0, "evaluation/student/pass_at_1": 0.0},
        {"step": 1, "run/trained_tokens": 40, "seconds/step": 1.5, **first},
        {"step": 1, "evaluation/student/pass_at_1": 0.3},
        {"step": 2, "run/trained_tokens": 90, "seconds/step": 2.0, **second},
    ]
    answers = [
        {"step": 0, "key": "teacher", "correct": ["111"]},
        {"step": 0, "key": "before", "correct": ["000"]},
        {"step": 0, "key": "before_sampled", "correct": ["000", "001"]},
        {"step": 1, "key": "step_1", "correct": ["010"]},
        {"step": 2, "key": "after", "correct": ["011"]},
        {"step": 2, "key": "after_sampled", "correct": ["011", "001"]},
    ]
    for name, rows in (("metrics", metrics), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"steps": 2, "seconds": 5.0, "accuracy": {"teacher": 1.0, "after": 2 / 3}}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_run_folder_is_placed_on_updates_tokens_and_seconds(tmp_path: Path) -> None:
    write_run(tmp_path)
    found = read_learning(tmp_path)
    assert [(one.step, one.tokens, one.seconds) for one in found.curve] == [(0, 0, 0.0), (1, 40, 1.5), (2, 90, 3.5)]
    assert [one.marks_P.tolist() for one in found.curve] == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert found.sampled_before_P.tolist() == [0, 0, 0.5] and found.sampled_after_P.tolist() == [0, 0.5, 1]
    assert (found.scored_tokens, found.num_windows, found.teacher) == (80, 16, 1.0)
    assert found.at(65).tolist() == [0, 1, 0.5] and found.at(40).tolist() == [0, 1, 0]
    assert found.at(39) is None, "a straight line from the untrained student tells nothing"


def test_a_run_folder_with_missing_updates_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match="found 1 updates, right would be 1 to 2"):
        read_learning(tmp_path)


def test_a_run_that_was_not_a_studys_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(line for line in lines if "after_sampled" not in line))
    with pytest.raises(DataError, match="found no 'after_sampled' in what the run wrote"):
        read_learning(tmp_path)
