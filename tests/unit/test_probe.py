"""A probe's figures by their definitions on rows made by hand, and what it refuses before any engine loads."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from topd_ray.cli import main
from topd_ray.config.load import load_config
from topd_ray.config.schema import NearFutureConfig
from topd_ray.data.tokenizer import load_tokenizer
from topd_ray.engines.look_ahead import compare_windows
from topd_ray.errors import DataError
from topd_ray.objective import unit_embeddings
from topd_ray.studies.labelling import find_labeller
from topd_ray.studies.probe.columns import Probed
from topd_ray.studies.probe.examples import Example, examples_page, find_examples
from topd_ray.studies.probe.figures import Figures, false_alarm_share, find_figures
from topd_ray.studies.probe.notes import notes_of
from topd_ray.studies.probe.report import tables
from topd_ray.studies.probe.rows import SCHEMA, choose_positions, coarse_entropy, position_costs
from topd_ray.studies.results import claim_folder
from topd_ray.types import Trajectory

DEMO = load_config(Path("jobs/demo.yaml"))


def row(kind: str, loss: float, distance: float, **changes: object) -> dict[str, object]:
    return {
        "trajectory_id": "p0/0/0",
        "prompt_id": "p0",
        "kind": kind,
        "position": 0,
        "num_response_tokens": 40,
        "finish_reason": "stop",
        "loss": loss,
        "student_logprob": -1.0,
        "teacher_logprob": -loss,
        "teacher_entropy": 0.5,
        "distance": distance,
        "position_cost": 0.25,
        "student_ids": [1, 2],
        "teacher_ids": [3],
        "label": "",
        **changes,
    }


def figures_of(rows: list[dict[str, object]], *overrides: str) -> Figures:
    config = load_config(Path("jobs/demo.yaml"), overrides)
    return find_figures(Probed.of(pa.Table.from_pylist(rows, schema=SCHEMA)), config)


def prompts(num: int) -> list[dict[str, object]]:
    """A high, a random and a low position of each of `num` prompts."""
    rng = np.random.default_rng(0)
    return [
        row(
            kind,
            float(rng.exponential(5.0 if kind == "high" else 1.0)),
            float(rng.uniform(0.1, 0.9)),
            position=place,
            prompt_id=f"p{index}",
            trajectory_id=f"p{index}/0/0",
        )
        for index, (place, kind) in product(range(num), enumerate(("high", "random", "low")))
    ]


def test_false_alarms_lie_below_the_upper_quartile_of_the_low_loss_distances() -> None:
    low = [0.0, 0.1, 0.2, 0.3, 0.4]  # upper quartile 0.3
    high = [0.05, 0.299, 0.3, 0.9]
    distance, is_high = np.array([*low, *high]), np.array([0.0] * 5 + [1.0] * 4)
    assert false_alarm_share(distance, is_high) == 0.5
    rows = [row("low", 0.1, one, position=10 + index) for index, one in enumerate(low)]
    rows += [row("high", 9.0, one, position=20 + index) for index, one in enumerate(high)]
    found = figures_of([*rows, row("random", 1.0, 0.5, position=30)])
    assert found.false_alarm_share.value == 0.5 and found.low_quartile.value == pytest.approx(0.3)
    assert (found.median_distance["low"].value, found.mean_distance["low"].value) == pytest.approx((0.2, 0.2))
    assert found.zero_share["low"].value == 0.2 and found.zero_share["high"].value == 0.0
    assert found.median_distance["high"].value == pytest.approx(0.2995)


def test_a_position_of_two_kinds_is_correlated_once() -> None:
    rows = [row("high", 4.0, 0.9, position=3), row("random", 4.0, 0.9, position=3)]
    rows += [row("random", 1.0, 0.2, position=4), row("low", 0.0, 0.3, position=5)]
    rows += [row("high", 2.0, 0.1, position=3, trajectory_id="p0/0/1"), row("low", 0.0, 0.3, position=1)]
    found = figures_of(rows)
    assert found.pearson["all"].n == 5 and found.counts["distinct_positions"] == 5
    loss, distance = np.array([4.0, 1.0, 0.0, 2.0, 0.0]), np.array([0.9, 0.2, 0.3, 0.1, 0.3])
    assert found.pearson["all"].value == pytest.approx(np.corrcoef(loss, distance)[0, 1])
    assert found.pearson["high"].value == pytest.approx(1.0) and found.pearson["high"].n == 2


def test_a_token_that_the_teacher_rules_out_is_left_out_of_pearson_and_said() -> None:
    rows = [*prompts(30), row("high", math.inf, 0.8, position=9)]
    found = figures_of(rows)
    assert found.pearson["high"].n == 30 and found.spearman["high"].n == 31
    assert math.isfinite(found.pearson["all"].value) and math.isfinite(found.spearman["all"].value)
    assert any(note.startswith("1 positions hold a token that the teacher rules out") for note in notes_of(found))


def test_short_rollouts_and_cut_windows_are_counted_and_count() -> None:
    short = {"trajectory_id": "p0/0/1", "num_response_tokens": 5}
    limited = {"trajectory_id": "p0/0/2", "finish_reason": "length"}
    rows = [
        row("high", 4.0, 0.9, position=32),  # exactly the window of 8
        row("high", 4.0, 0.9, position=33),
        row("random", 1.0, 0.2, position=0, **short),
        row("low", 0.1, 0.2, position=39, **limited),
        row("low", 0.1, 0.4, position=4, **short),
    ]
    found = figures_of(rows)
    counts = found.counts
    assert (counts["trajectories"], counts["shorter_than_window"], counts["ended_by_limit"]) == (3, 1, 1)
    assert counts["cut_windows"] == {
        "high": {"by_end": 1, "by_limit": 0},
        "random": {"by_end": 1, "by_limit": 0},
        "low": {"by_end": 1, "by_limit": 1},
    }
    assert counts["positions"] == {"high": 2, "random": 1, "low": 2} and counts["response_tokens"] == 85
    assert found.median_distance["low"].value == pytest.approx(0.3), "cut windows are among the figures"
    assert found.full_windows is None, "no random position has a full window"
    notes = notes_of(found)
    assert notes[0].startswith("1 of 3 rollouts are shorter than a window of 8 tokens; 4 of 5 windows are cut")
    assert "No figures of full windows: found none of random, low loss; right would be longer responses." in notes


def test_full_windows_alone_stand_beside() -> None:
    """Short windows at the end of the responses: the same figures as if they had never been looked at."""
    whole = prompts(25)
    short = [{**one, "distance": 0.01, "position": 33 + index % 7} for index, one in enumerate(prompts(25))]
    found, alone = figures_of([*whole, *short]), figures_of(whole)
    assert found.full_windows is not None and alone.full_windows is not None
    assert found.full_windows.to_json() == alone.full_windows.to_json() == {**alone.to_json(), "full_windows": None}
    assert found.median_distance["high"].value < alone.median_distance["high"].value
    (table,) = tables(found)
    assert table.columns == ("", "here [95 %]", "full windows", "paper")
    assert [row[2] for row in table.rows] == [row[1] for row in tables(alone)[0].rows]
    assert found.to_json()["full_windows"]["counts"]["positions"] == {"high": 25, "random": 25, "low": 25}


def test_too_few_prompts_for_an_interval_are_said_and_not_computed() -> None:
    few, enough = figures_of(prompts(19)), figures_of(prompts(20))
    assert any(note.startswith("No intervals: 19 prompts") for note in notes_of(few))
    assert few.median_distance["high"].low is None and few.false_alarm_share.low is None
    assert not any("No intervals" in note for note in notes_of(enough))
    assert enough.median_distance["high"].low is not None and enough.spearman["all"].low is not None


def test_resamples_without_a_low_loss_row_are_left_out_and_thin_columns_are_said() -> None:
    """Of 30 prompts 3 have a low-loss position with a full window, and one in 25 resamples draws none of these."""
    rows = [
        {**one, "position": 33 if one["kind"] == "low" and int(one["prompt_id"][1:]) >= 3 else one["position"]}
        for one in map(dict, prompts(30))
    ]
    found = figures_of(rows)
    full = found.full_windows
    assert full is not None and full.counts["positions"] == {"high": 30, "random": 30, "low": 3}
    assert full.false_alarm_share.low is not None and full.low_quartile.low is None
    (note,) = [note for note in notes_of(found) if note.startswith("No interval")]
    assert note == (
        "No interval where fewer than 20 prompts have such positions, or half of the resamples leave a figure "
        "undefined: full windows low quartile; full windows median distance low; full windows mean distance low; "
        "full windows zero share low."
    )
    assert not np.isfinite([false_alarm_share(np.ones(2), one) for one in (np.ones(2), np.zeros(2))]).any()


def test_full_windows_of_few_prompts_are_said_as_a_whole_with_notes_of_their_own() -> None:
    rows = [
        {**one, "position": 33 + int(one["position"]), "distance": 0.3 + float(one["distance"])}
        if int(one["prompt_id"][1:]) >= 5
        else {**one, "distance": 0.0 if one["kind"] == "low" else one["distance"]}
        for one in map(dict, prompts(30))
    ]
    notes = notes_of(figures_of(rows))
    assert [note.endswith("full windows (5 prompts).") for note in notes if note.startswith("No interval")] == [True]
    assert sum("low-loss distances of full windows is 0" in note for note in notes) == 1
    assert not any("low-loss distances is 0" in note for note in notes)


def test_losses_that_are_all_infinite_stop_nothing() -> None:
    found = figures_of([{**one, "loss": math.inf} if one["kind"] == "high" else one for one in prompts(25)])
    assert math.isnan(found.pearson["high"].value) and found.pearson["high"].n == 0
    assert found.pearson["random"].low is not None


def test_identical_low_loss_futures_make_the_papers_share_empty_and_that_is_said() -> None:
    rows = [one if one["kind"] != "low" else {**one, "distance": 0.0} for one in prompts(5)]
    found = figures_of(rows)
    assert found.false_alarm_share.value == 0.0
    assert any("upper quartile of the low-loss distances is 0" in note for note in notes_of(found))
    rows_of_table = {row[0]: (row[1], row[-1]) for row in tables(found)[0].rows}
    assert rows_of_table["false alarms among high-loss positions"] == ("-", "29.23 %")


def test_a_kind_without_positions_is_refused() -> None:
    with pytest.raises(DataError, match="found no low-loss position in 1 rollouts of at most 40 tokens"):
        figures_of([row("high", 1.0, 0.5), row("random", 1.0, 0.5)])


def test_the_histogram_counts_every_position_once() -> None:
    found = figures_of([row("high", 1.0, 0.3), row("low", 1.0, 0.019), row("random", 1.0, 0.0)]).histogram
    edges = found["edges"]
    assert edges[:3] == [0.0, 0.02, 0.04] and edges[-1] >= 0.3
    assert [sum(found[kind]) for kind in ("high", "random", "low")] == [1, 1, 1]
    assert found["low"][0] == 1 and found["high"][-1] == 1


def labelled() -> list[dict[str, object]]:
    """5 forks, one of them nearer than 0.2; 3 harmless mismatches, one of them at 0.2; and two undecided ones."""
    decided = {0.1: "error", 0.2: "harmless", 0.4: "harmless", 0.5: "harmless", 0.6: "choice", 0.7: "choice"}
    decided |= {0.8: "error", 0.9: "error"}
    rows = [
        row("high", loss, distance, position=index, label=label, position_cost=1.0 - distance)
        for index, (loss, (distance, label)) in enumerate(zip((9, 1, 2, 3, 8, 7, 6, 5), decided.items(), strict=True))
    ]
    rows += [row("high", 4.0, one, position=20 + index, label="undecided") for index, one in enumerate((0.95, 1.0))]
    return [*rows, row("random", 1.0, 0.5, position=30), row("low", 1.0, 0.5, position=31)]


def test_detection_by_hand() -> None:
    found = figures_of(labelled(), "near_future.false_alarm_quantile=0.12").detection
    assert found is not None
    assert found["labels"] == {"harmless": 3, "choice": 2, "error": 3, "undecided": 2}
    assert 0.2 <= found["threshold"] < 0.4
    assert found["precision"].value == pytest.approx(4 / 6) and found["recall"].value == pytest.approx(4 / 5)
    assert found["fork_share"].value == pytest.approx(5 / 8)
    assert found["auc"]["loss"].value == 1.0
    assert found["auc"]["distance"].value == pytest.approx(12 / 15)
    assert found["auc"]["position_cost"].value == pytest.approx(3 / 15)


def test_false_alarms_are_crossed_with_labels() -> None:
    """Low-loss distances up to 0.5, their upper quartile: below it an error and two harmless mismatches."""
    figures = figures_of(labelled(), "near_future.false_alarm_quantile=0.12")
    assert figures.detection is not None
    alarms, unguided = figures.detection["false_alarms"], figures.detection["unguided"]
    assert alarms["labels"] == {"harmless": 2, "choice": 0, "error": 1, "undecided": 0}
    assert alarms["harmless"].value == pytest.approx(2 / 3)
    assert unguided["labels"] == {"harmless": 1, "choice": 0, "error": 1, "undecided": 0}
    assert unguided["harmless"].value == pytest.approx(1 / 2)
    shown = dict(row[:2] for row in tables(figures)[1].rows)
    assert (shown["harmless at or below it"], shown["harmless among false alarms"]) == ("50.0 %", "66.7 %")


def test_each_label_has_its_own_areas_and_losses() -> None:
    rows = [{**one, "loss": 2.5 if one["loss"] == 8 else one["loss"]} for one in labelled()]  # a choice below a wording
    found = figures_of(rows)
    detection = found.detection
    assert detection is not None
    assert detection["auc_of"]["choice"]["distance"].value == 1.0
    assert detection["auc_of"]["choice"]["loss"].value == pytest.approx(5 / 6)
    assert detection["auc_of"]["error"]["distance"].value == pytest.approx(6 / 9)
    assert detection["auc_of"]["error"]["loss"].value == 1.0
    assert {key: one.value for key, one in detection["loss_quantiles"]["error"].items()} == {
        "0.05": 5.0,
        "0.5": 6.0,
        "0.95": 9.0,
    }
    _, of_forks, losses = tables(found)
    assert dict(row[:2] for row in of_forks.rows)["AUC of loss, choice against harmless"] == "0.833"
    assert losses.columns == ("", "positions", "5 %", "50 %", "95 %")
    assert [row[:3] for row in losses.rows] == [
        ("harmless", "3", "1.000"),
        ("choice", "2", "2.500"),
        ("error", "3", "5.000"),
    ]


def test_labels_have_intervals_and_a_label_of_few_prompts_is_said() -> None:
    """30 prompts with a harmless mismatch that is near and cheap, 10 of them with a choice that is far and dear."""
    rows = prompts(30)
    rows = [one if one["kind"] != "high" else {**one, "label": "harmless", "distance": 0.01} for one in rows]
    of = [(f"p{index}", f"p{index}/0/0") for index in range(10)]
    rows += [
        row("high", 99.0, 0.95, prompt_id=prompt, trajectory_id=name, position=5, label="choice") for prompt, name in of
    ]
    found = figures_of(rows)
    detection = found.detection
    assert detection is not None
    assert detection["unguided"]["harmless"].low == detection["false_alarms"]["harmless"].high == 1.0
    assert detection["auc_of"]["choice"]["loss"].low == 1.0
    assert detection["loss_quantiles"]["harmless"]["0.5"].low is not None
    (note,) = [note for note in notes_of(found) if note.startswith("No interval")]
    assert note.split("undefined: ")[1].split("; ") == [
        "detection loss quantiles choice",
        "full windows detection loss quantiles choice",
        "unequal windows loss quantiles choice.",
    ]


def test_windows_of_unequal_length_are_detected_by_themselves() -> None:
    """The rows made here have windows of two tokens and of one; others, as long as each other, change nothing."""
    equal = [
        {**row("high", 1.0, 0.15 * index, label="error", position=index, trajectory_id="p0/0/1"), "teacher_ids": [3, 4]}
        for index in range(5)
    ]
    unequal, found = figures_of(labelled()), figures_of([*labelled(), *equal])
    assert unequal.unequal_detection == unequal.detection == found.unequal_detection
    assert found.detection is not None and found.detection["labels"]["error"] == 8
    table = tables(found)[1]
    assert table.columns == ("", "here [95 %]", "full windows", "unequal windows")
    assert table.rows[0] == ("positions", "15", "15", "10")
    assert figures_of([*equal, *prompts(3)[1:3]]).unequal_detection is None


def test_nothing_is_detected_where_nothing_is_labelled() -> None:
    assert figures_of(prompts(3)).detection is None


def test_positions_are_those_of_training_and_as_many_of_the_other_kinds() -> None:
    losses_T = np.arange(40, dtype=np.float32)[::-1].copy()
    losses_T[20:] = 0.0
    config = NearFutureConfig(candidate_fraction=0.1)
    draws = [choose_positions(losses_T, config, np.random.default_rng(seed)) for seed in range(200)]
    assert all(one["high"].tolist() == [0, 1, 2, 3] for one in draws)
    assert all(len(set(one[kind].tolist())) == 4 for one in draws for kind in ("random", "low"))
    assert all(losses_T[one["low"]].max() == 0.0 for one in draws)
    lowest = np.bincount(np.concatenate([one["low"] for one in draws]), minlength=40)[20:]
    drawn = np.bincount(np.concatenate([one["random"] for one in draws]), minlength=40)
    assert lowest.min() > 15 and lowest.max() < 70, "of equal losses one is drawn, not the earliest"
    assert drawn.min() > 5 and drawn[:4].sum() > 40, "random ones may be high ones"
    tiny = choose_positions(np.array([1.0], np.float32), config, np.random.default_rng(0))
    assert [tiny[kind].tolist() for kind in ("high", "random", "low")] == [[0], [0], []]


def test_the_position_wise_cost_is_the_mean_of_the_diagonal() -> None:
    embedding = unit_embeddings(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]))
    compared = compare_windows(
        [np.array([0, 1, 2], np.int32), np.array([0], np.int32)],
        [np.array([0, 2, 1, 1], np.int32), np.array([1, 1], np.int32)],
        embedding,
        NearFutureConfig(window=4),
    )
    cosine = (embedding @ embedding.T).numpy()
    assert position_costs(compared) == pytest.approx([2 * (1 - cosine[1, 2]) / 3, 1 - cosine[0, 1]], abs=1e-6)


def test_the_coarse_entropy_is_the_whole_one_where_nothing_is_left_out() -> None:
    probabilities = np.array([0.5, 0.25, 0.125, 0.125])
    logs = np.log(probabilities).astype(np.float32)
    assert coarse_entropy(logs) == pytest.approx(-(probabilities * np.log(probabilities)).sum(), abs=1e-6)
    assert coarse_entropy(logs[:2]) == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4), abs=1e-6)
    assert coarse_entropy(np.array([0.0, -np.inf], np.float32)) == 0.0


def test_examples_are_the_most_striking_one_a_prompt() -> None:
    high = [
        (9.0, 0.1, "p0"),
        (8.0, 0.2, "p0"),
        (3.0, 0.15, "p1"),
        (7.0, 0.8, "p2"),
        (9.5, 0.9, "p3"),
        (1.0, 0.95, "p4"),
    ]
    rows = [
        row("high", loss, distance, prompt_id=prompt, trajectory_id=f"{prompt}/0/0", position=2)
        for loss, distance, prompt in high
    ]
    rows += [row("low", 0.0, 0.0), row("random", 0.0, 0.0)]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    of = {f"p{index}/0/0": trajectory(f"p{index}") for index in range(5)}
    found = find_examples(table, Probed.of(table), 0.4, 2, of, lambda ids: "".join(chr(97 + one) for one in ids))
    assert [(one.sort, one.trajectory_id) for one in found] == [
        ("false alarm", "p0/0/0"),
        ("false alarm", "p1/0/0"),
        ("real fork", "p3/0/0"),
        ("real fork", "p2/0/0"),
    ]
    assert (found[0].prefix, found[0].student, found[0].teacher) == ("klabd"[:2] + "ab", "bc", "d")


def test_examples_agree_with_their_labels_and_contradictions_stand_by_themselves() -> None:
    decided = [  # as near as 0.4 by the quantile that follows
        (9.0, 0.10, "error"),
        (8.0, 0.20, "harmless"),
        (7.0, 0.30, "harmless"),
        (6.0, 0.40, "choice"),
        (9.5, 0.60, "harmless"),
        (9.2, 0.90, "error"),
        (9.3, 0.95, "error"),
        (2.0, 0.70, "choice"),
    ]
    rows = [
        row("high", loss, distance, prompt_id=f"p{i}", trajectory_id=f"p{i}/0/0", position=2, label=label)
        for i, (loss, distance, label) in enumerate(decided)
    ]
    table = pa.Table.from_pylist([*rows, row("low", 0.0, 0.0), row("random", 0.0, 0.0)], schema=SCHEMA)
    of = {f"p{index}/0/0": trajectory(f"p{index}") for index in range(8)}
    found = find_examples(table, Probed.of(table), 0.45, 2, of, str)
    assert [(one.sort, one.label, one.distance) for one in found] == [
        ("false alarm", "harmless", pytest.approx(0.2)),
        ("false alarm", "harmless", pytest.approx(0.3)),
        ("real fork", "error", pytest.approx(0.95)),
        ("real fork", "choice", pytest.approx(0.7)),
        ("missed error", "error", pytest.approx(0.1)),
    ]
    page = examples_page(found)
    assert (
        page.index("## False alarms\n") < page.index("### 2. ") < page.index("## Real forks\n") < page.index("### 3. ")
    )
    assert page.index("near by distance, and an error all the same") < page.index("### 5. Missed error: loss 9.00 nats")


def trajectory(prompt_id: str) -> Trajectory:
    return Trajectory(
        trajectory_id=f"{prompt_id}/0/0",
        prompt_id=prompt_id,
        sample_index=0,
        epoch=0,
        policy_version=0,
        finish_reason="stop",
        prompt_ids=np.array([10, 11], np.int32),
        response_ids=np.array([0, 1, 1, 2], np.int32),
        behaviour_logprobs=np.zeros(4, np.float32),
    )


def test_text_with_fences_stays_whole_on_the_page() -> None:
    one = Example(
        sort="real fork",
        trajectory_id="p0/0/0",
        position=3,
        loss=9.0,
        distance=0.5,
        label="choice",
        prefix="~~~~\n# title",
        student="a",
        teacher="b",
    )
    page = examples_page([one])
    assert "~~~~~text\n~~~~\n# title\n~~~~~\n" in page
    assert "## 1. Real fork: loss 9.00 nats, distance 0.500, labelled choice" in page


def test_worded_arithmetic_is_labelled_and_other_tasks_are_not() -> None:
    worded = load_config(Path("jobs/worded.yaml"))
    tokenizer = load_tokenizer(worded.student)
    assert find_labeller(DEMO, load_tokenizer(DEMO.student)) is None
    assert find_labeller(load_config(Path("jobs/worded.yaml"), ["data.train=own.jsonl"]), tokenizer) is None
    labeller = find_labeller(worded, tokenizer)
    assert labeller is not None
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "(2+3)*(6-4)"}], add_generation_prompt=True, tokenize=False
    )

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)

    def labelled(student: str, teacher: str) -> str:
        response = encode("so ")
        one = trajectory("p0")
        rollout = {name: getattr(one, name) for name in one.__dataclass_fields__}
        changed = Trajectory(**{**rollout, "prompt_ids": encode(prompt), "response_ids": response})
        return labeller(changed, len(response), encode(student).tolist(), encode(teacher).tolist())

    assert labelled("2+3=5 giving 5", "simply 2 plus 3 is 5 leaves 5*") == "harmless"
    assert labelled("2+3=5", "6-4=2") == "choice"
    assert labelled("2+3=6", "2+3=5") == "error"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["probe", *arguments]) == 2
    printed = capsys.readouterr()
    assert "loading" not in printed.out
    return printed.err


def test_vocabularies_that_differ_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "probe"
    message = refused(capsys, "jobs/demo.yaml", "teacher.model=topd_ray/demo/worded_pair/teacher", "--out", str(out))
    assert "the vocabularies of student.model" in message and "Right would be two models of one tokenizer" in message
    assert not out.exists()


def test_a_folder_of_another_config_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    claim_folder(tmp_path, "probe", load_config(Path("jobs/demo.yaml"), ["near_future.window=9"]))
    message = refused(capsys, "jobs/demo.yaml", "--out", str(tmp_path))
    assert "near_future.window: 9 there, 8 here" in message


def test_a_ranking_without_a_loss_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, "jobs/demo.yaml", "near_future.ranking=random", "--out", str(tmp_path / "probe"))
    assert "near_future.ranking: found random" in message and not (tmp_path / "probe").exists()
