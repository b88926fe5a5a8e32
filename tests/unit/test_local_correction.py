"""Updates on one window and what they leave, on a tiny random student; and the figures of rows made by hand."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import EOS_ID, NUM_TOKENS, load_tiny_model, make_tiny_model, plain_greedy, plain_logprobs
from topd_ray.config.load import load_config
from topd_ray.config.schema import TopdConfig
from topd_ray.engines.look_ahead import LookAhead
from topd_ray.engines.seeds import stable_seed
from topd_ray.errors import ConfigError, NonFiniteLossError
from topd_ray.objective import unfold
from topd_ray.studies.futures import Distances
from topd_ray.studies.local_correction.figures import (
    BEFORE,
    Row,
    draw_picture,
    figures_of,
    notes_of,
    tables_of,
    targets_of,
)
from topd_ray.studies.local_correction.points import (
    GUIDES_ALWAYS,
    Counts,
    Point,
    as_asked,
    point_requests,
    points_to_table,
    table_to_points,
    window_look_ahead,
)
from topd_ray.studies.local_correction.study import (
    ARMS,
    by_identity,
    in_teacher_context,
    learning_rates,
    rows_of_point,
)
from topd_ray.studies.local_correction.updates import Student
from topd_ray.types import SparseTargets, TeacherScores, Trajectory

WINDOW = 6
PREFIX = (10, 11, 12, 20)
RATE = 1e-3
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TopdConfig:
    folder = tmp_path_factory.mktemp("pair")
    make_tiny_model(folder / "student", seed=0)
    make_tiny_model(folder / "teacher", seed=1)
    return load_config(
        Path("jobs/demo.yaml"),
        [
            f"student.model={folder / 'student'}",
            f"teacher.model={folder / 'teacher'}",
            f"near_future.window={WINDOW}",
            f"rollout.temperature={TEMPERATURE}",
            f"learner.learning_rate={RATE}",
            "studies.local_correction={num_updates: 2, num_redraws: 3, other_rates: [0.5]}",
        ],
    )


@pytest.fixture(scope="module")
def student(config: TopdConfig) -> Student:
    return Student(config)


@pytest.fixture(scope="module")
def distances_of(config: TopdConfig) -> Distances:
    return Distances(config)


@pytest.fixture(scope="module")
def point(config: TopdConfig, student: Student, distances_of: Distances) -> Point:
    """The student's own six tokens, and what the teacher's plain forward pass says about them."""
    teacher = load_tiny_model(Path(config.teacher.model))
    drawn = student.draw(np.asarray(PREFIX, np.int32), WINDOW, num_samples=1, seed=5)[0]
    ids = drawn.token_ids
    logprobs = plain_logprobs(teacher, PREFIX, ids.tolist(), TEMPERATURE)
    top = np.argsort(-logprobs, axis=1)[:, :16].astype(np.int32)
    trajectory = Trajectory(
        trajectory_id="p/0/0@1",
        prompt_id="p",
        sample_index=0,
        epoch=0,
        policy_version=0,
        finish_reason="length",
        prompt_ids=np.asarray(PREFIX, np.int32),
        response_ids=ids,
        behaviour_logprobs=drawn.logprobs,
    )
    scores = TeacherScores(
        topk_ids=top,
        topk_logprobs=np.take_along_axis(logprobs, top.astype(np.int64), 1),
        sampled_logprobs=logprobs[np.arange(len(ids)), ids],
    )
    teacher_ids = np.asarray(plain_greedy(teacher, PREFIX, WINDOW), np.int32)
    look_ahead: LookAhead = window_look_ahead(config, distances_of, None)  # type: ignore[arg-type]
    (window,) = look_ahead.fold([as_asked(trajectory, scores, teacher_ids)], GUIDES_ALWAYS)
    return Point(window=window, distance=float(window.windows.distances[0]), teacher_again=0.1, label="")


def weights(student: Student) -> list[torch.Tensor]:
    return [one.detach().clone() for one in student.model.parameters()]


def test_updates_move_the_student_and_leave_the_original_bitwise(student: Student, point: Point) -> None:
    before = weights(student)
    with pytest.raises(KeyError), student.restored():
        losses = student.update(lambda _: point.window, "topd", RATE, 3)
        moved = weights(student)
        raise KeyError
    assert losses[2] < losses[1] < losses[0]
    assert all(not torch.equal(one, other) for one, other in zip(before, moved, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(before, weights(student), strict=True))
    assert all(one.grad is None for one in student.model.parameters())


def test_without_weight_or_targets_topd_is_opd(config: TopdConfig, student: Student, point: Point) -> None:
    def after(chosen: Student, method: str) -> list[torch.Tensor]:
        with chosen.restored():
            chosen.update(lambda _: point.window, method, RATE, 2)  # type: ignore[arg-type]
            return weights(chosen)

    objective = config.objective.model_copy(update={"guidance_weight": 0.0})
    unguided = Student(config.model_copy(update={"objective": objective}))
    opd, topd = after(student, "opd"), after(student, "topd")
    assert all(torch.equal(one, other) for one, other in zip(opd, after(unguided, "topd"), strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(opd, topd, strict=True))


def test_the_loss_is_that_of_the_window_alone(config: TopdConfig, student: Student, point: Point) -> None:
    """By hand from a plain forward pass: reverse KL on the teacher's top 16 and a tail, and the soft targets' KL."""
    ids = point.window.trajectory.response_ids
    of_student = plain_logprobs(load_tiny_model(Path(config.student.model)), PREFIX, ids.tolist(), TEMPERATURE)
    divergences, guidance = [], 0.0
    for t, (logp_V, target) in enumerate(zip(of_student.astype(np.float64), unfold(point.window.targets), strict=True)):
        columns = sorted({*point.window.scores.topk_ids[t].tolist(), int(ids[t])})
        known = {
            **dict(zip(point.window.scores.topk_ids[t].tolist(), point.window.scores.topk_logprobs[t], strict=True))
        }
        known[int(ids[t])] = point.window.scores.sampled_logprobs[t]
        p, q = np.exp(logp_V[columns]), np.exp([float(known[column]) for column in columns])
        p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
        divergences.append(float((p * np.log(p / q)).sum()))
        guidance += sum(share * (np.log(share) - logp_V[token]) for token, share in target.items())
    expected = float(np.mean(divergences))
    with student.restored():
        (opd,) = student.update(lambda _: point.window, "opd", RATE, 1)
    with student.restored():
        (topd,) = student.update(lambda _: point.window, "topd", RATE, 1)
    assert opd == pytest.approx(expected, rel=1e-3)
    assert topd == pytest.approx(expected + config.objective.guidance_weight * guidance / len(ids), rel=1e-3)


def test_draws_are_of_the_student_at_the_temperature(config: TopdConfig, student: Student) -> None:
    plain = load_tiny_model(Path(config.student.model))
    prefix = np.asarray(PREFIX, np.int32)
    *drawn, greedy = student.draw(prefix, WINDOW, num_samples=400, seed=1, greedy=True)
    assert greedy.token_ids.tolist() == plain_greedy(plain, PREFIX, WINDOW)
    for one in drawn[:20]:
        ids = one.token_ids.tolist()
        assert len(ids) == WINDOW or ids[-1] == EOS_ID
        assert EOS_ID not in ids[:-1] and max(ids) < NUM_TOKENS
        logprobs = plain_logprobs(plain, PREFIX, ids, TEMPERATURE)
        np.testing.assert_allclose(one.logprobs, logprobs[np.arange(len(ids)), ids], atol=1e-4)
    first = np.bincount([one.token_ids[0] for one in drawn], minlength=NUM_TOKENS) / len(drawn)
    right = np.exp(plain_logprobs(plain, PREFIX, [0], TEMPERATURE)[0])
    assert np.abs(first - right).max() < 5 * np.sqrt(0.25 / len(drawn))
    again = student.draw(prefix, WINDOW, num_samples=400, seed=1)
    assert [one.token_ids.tolist() for one in again] == [one.token_ids.tolist() for one in drawn]


def test_a_learning_rate_that_bursts_is_named(student: Student, point: Point) -> None:
    message = r"update \d at p/0/0@1: the opd loss is nan at learning rate 1e\+30"
    with pytest.raises(NonFiniteLossError, match=message), student.restored():
        student.update(lambda _: point.window, "opd", 1e30, 3)
    with student.restored():
        assert np.isfinite(student.update(lambda _: point.window, "opd", RATE, 1)).all()


def test_rows_of_a_point(config: TopdConfig, student: Student, point: Point, distances_of: Distances) -> None:
    before = weights(student)
    rows = rows_of_point(config, student, 3, point, distances_of)
    assert all(torch.equal(one, other) for one, other in zip(before, weights(student), strict=True))
    assert learning_rates(config) == (RATE, [RATE / 2, RATE])
    arms = [(arm, rate) for rate in (RATE / 2, RATE) for arm in ARMS]
    assert [(row.arm, row.learning_rate) for row in rows] == [(BEFORE, 0.0), *arms]
    assert {(row.point, row.name) for row in rows} == {(3, "p/0/0@1")}
    assert [len(row.losses) for row in rows] == [0, *[2] * len(arms)]
    plain = load_tiny_model(Path(config.student.model))
    greedy = np.asarray(plain_greedy(plain, PREFIX, WINDOW), np.int32)
    assert rows[0].greedy == pytest.approx(distances_of([greedy], [point.teacher_ids])[0], abs=1e-9)
    drawn = student.draw(point.prefix_ids, WINDOW, num_samples=3, seed=stable_seed(0, "redraw", point.name))
    assert rows[0].distances == pytest.approx(distances_of([one.token_ids for one in drawn], [point.teacher_ids] * 3))
    assert rows[0].starts == [one.token_ids[0] == point.teacher_ids[0] for one in drawn]
    assert rows_of_point(config, student, 3, point, distances_of) == rows
    asked: list[int] = []
    window_at = partial(lambda _, update: asked.append(update) or point.window)  # type: ignore[func-returns-value]
    assert rows_of_point(config, student, 3, point, distances_of, window_at) == rows
    assert asked == [0, 1] * len(arms)


def test_the_identity_learns_the_teachers_token_in_its_place(point: Point) -> None:
    for length in (2, 5, WINDOW):
        teacher_ids = np.arange(30, 30 + length, dtype=np.int32)
        windows = replace(point.window.windows, teacher_ids=teacher_ids)
        targets = by_identity(replace(point.window, windows=windows)).targets
        num_tokens = point.window.trajectory.num_response_tokens
        guided = min(length, num_tokens)
        assert unfold(targets) == [{30 + i: 1.0} for i in range(guided)] + [{}] * (num_tokens - guided)
        assert not targets.entropy.any()


def test_the_teachers_context_is_that_of_training(config: TopdConfig, distances_of: Distances, point: Point) -> None:
    """The branch is the one that near_future.guidance_context=teacher makes, and the window itself guides nothing."""
    near_future = config.near_future.model_copy(update={"guidance_context": "teacher"})
    objective = config.objective.model_copy(update={"method": "topd"})
    look_ahead = LookAhead(near_future, objective, distances_of.embedding_VD, None, config.run.seed)  # type: ignore[arg-type]
    asked = as_asked(point.window.trajectory, point.window.scores, point.teacher_ids)
    (trained,) = look_ahead.fold([asked], GUIDES_ALWAYS)
    ours = in_teacher_context(point.window)
    assert ours.targets.num_guided == trained.targets.num_guided == 0
    for name in ("positions", "indptr", "token_ids"):
        np.testing.assert_array_equal(getattr(ours.branches, name), getattr(trained.branches, name))
    assert unfold(ours.branches.targets) == unfold(trained.branches.targets)
    assert unfold(ours.branches.targets) == [{token: 1.0} for token in point.teacher_ids.tolist()]


def test_the_loss_in_the_teachers_context_is_its_cross_entropy(
    config: TopdConfig, student: Student, point: Point
) -> None:
    """By hand from a plain forward pass: OPD's loss, and the mean of -log p_S of the teacher's tokens after its own."""
    window = in_teacher_context(point.window)
    with student.restored():
        (opd,) = student.update(lambda _: point.window, "opd", RATE, 1)
    with student.restored():
        (loss,) = student.update(lambda _: window, "topd", RATE, 1)
    plain = load_tiny_model(Path(config.student.model))
    ids = point.teacher_ids.tolist()
    logp = plain_logprobs(plain, PREFIX, ids, TEMPERATURE)[np.arange(len(ids)), ids]
    assert loss == pytest.approx(opd + config.objective.guidance_weight * -float(logp.mean()), rel=1e-5)


def test_what_the_targets_teach_is_told(point: Point) -> None:
    """A student that wrote a b against the teacher's b c: b stays b, wherever it stands."""
    targets = SparseTargets(
        indptr=np.array([0, 2, 4]),
        token_ids=np.array([8, 9, 8, 9], np.int32),
        weights=np.array([0.25, 0.75, 0.75, 0.25], np.float32),
        entropy=np.zeros(2, np.float32),
    )
    trajectory = replace(point.window.trajectory, response_ids=np.array([7, 8], np.int32))
    windows = replace(point.window.windows, teacher_ids=np.array([8, 9], np.int32))
    made = replace(point, window=replace(point.window, trajectory=trajectory, targets=targets, windows=windows))
    assert targets_of([made]) == {"point_own": 0.0, "point_teacher": 0.25, "window_own": 0.375}


def test_a_quantile_that_lets_nothing_diverge_is_refused(config: TopdConfig, tmp_path: Path) -> None:
    near_future = config.near_future.model_copy(update={"false_alarm_quantile": 1.0})
    with pytest.raises(ConfigError, match=r"near_future\.false_alarm_quantile: found 1, which lets nothing diverge"):
        point_requests(config.model_copy(update={"near_future": near_future}), print)


def test_points_go_through_parquet(point: Point) -> None:
    counts = Counts(num_trajectories=7, num_candidates=40, num_cut=3, threshold=0.25)
    (read,), found = table_to_points(points_to_table([replace(point, label="choice")], counts))
    assert found == counts
    assert (read.name, read.distance, read.teacher_again, read.label) == (point.name, point.distance, 0.1, "choice")
    np.testing.assert_array_equal(read.prefix_ids, PREFIX)
    np.testing.assert_array_equal(read.teacher_ids, point.teacher_ids)
    assert unfold(read.window.targets) == unfold(point.window.targets)


def made(point: Point, left: dict[str, list[float]]) -> tuple[list[Point], list[Row]]:
    """Points of a prompt each, and rows of two learning rates; at the second, OPD leaves half."""
    num = len(left["opd"])
    trajectories = [replace(point.window.trajectory, prompt_id=f"p{index}") for index in range(num)]
    points = [replace(point, window=replace(point.window, trajectory=one)) for one in trajectories]
    rows = [
        Row(
            point=i,
            name="",
            arm=arm,
            learning_rate=rate,
            distances=[value - 0.1, value + 0.1],
            starts=[True, i == 0],
            greedy=value,
            losses=[],
        )
        for i in reversed(range(num))
        for arm, values in left.items()
        for rate, value in (((0.0, values[i]),) if arm == BEFORE else ((1.0, values[i]), (2.0, values[i] * 0.5)))
    ]
    return points, rows


def test_figures_of_rows_made_by_hand(config: TopdConfig, point: Point, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    opd = rng.uniform(0.2, 0.6, 40)
    left = {
        BEFORE: [0.5] * 40,
        "opd": opd.tolist(),
        "topd": (opd * 0.5).tolist(),
        "identity": (opd * 0.5 + 0.1).tolist(),
        "teacher_context": (opd * 0.25).tolist(),
    }
    left["topd"][0] = opd[0] + 0.2
    points, rows = made(point, left)
    figures = figures_of(points, rows, [1.0, 2.0], 1.0)
    found = figures["distance"]["rates"][1.0]
    topd = np.array(left["topd"])
    assert found["ratio"].value == pytest.approx(topd.mean() / opd.mean())
    assert found["ratio"].low < found["ratio"].value < found["ratio"].high < 0.7
    assert found["topd_minus_opd"].value == pytest.approx((topd - opd).mean())
    assert (found["nearer"].value, found["farther"].value) == (39 / 40, 1 / 40)
    assert found["identity_minus_topd"].value == pytest.approx((np.array(left["identity"]) - topd).mean())
    assert found["teacher_context_ratio"].value == pytest.approx(0.25)
    assert figures["distance"]["rates"][2.0]["opd"].value == pytest.approx(opd.mean() / 2)
    assert figures["distance"]["best_ratio"].value == pytest.approx(found["ratio"].value)
    start = figures["start"]["opd"]
    assert start["share"] == pytest.approx(41 / 80)
    assert start["distance_without"] == pytest.approx(opd[1:].mean() + 0.1)
    assert start["distance_with"] == pytest.approx((opd.sum() - 4.0 + opd[0] + 0.1) / 41)
    assert figures["distance"][BEFORE].value == 0.5 and figures["rollout"].value == pytest.approx(point.distance)
    text = "\n".join(table.text() for table in tables_of(figures, 1.0, WINDOW))
    assert f"{found['ratio'].value:.3f}" in text and "0.583" in text
    draw_picture(tmp_path / "one.png", rows, figures, 1.0)
    draw_picture(tmp_path / "two.png", rows, figures, 1.0)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_windows_of_unequal_length_have_a_row_of_their_own(config: TopdConfig, point: Point) -> None:
    """30 points with as many tokens, 10 with a teacher's window that is one shorter, 1 with a shorter student's."""
    left = {BEFORE: 0.5, "opd": 0.4, "topd": 0.2, "identity": 0.25, "teacher_context": 0.1}
    points, rows = made(point, {arm: [value] * 30 + [value * 1.2] * 10 + [0.6] for arm, value in left.items()})
    teacher_ids = np.append(point.teacher_ids, point.teacher_ids[:1])
    for index, ids in [*((index, teacher_ids[:-2]) for index in range(30, 40)), (40, teacher_ids)]:
        window = points[index].window
        windows = replace(window.windows, teacher_ids=ids, teacher_indptr=np.asarray([0, len(ids)], np.int64))
        points[index] = replace(points[index], window=replace(window, windows=windows))
    figures = figures_of(points, rows, [1.0, 2.0], 1.0)
    lengths = figures["lengths"]
    assert {name: found["opd"].n for name, found in lengths.items()} == {
        "equal": 30,
        "the student's is shorter": 1,
        "the teacher's is shorter": 10,
    }
    found = lengths["the teacher's is shorter"]
    assert (found[BEFORE].value, found["opd"].value) == pytest.approx((0.6, 0.48))
    assert found["identity_minus_topd"].value == pytest.approx(0.06) and found["ratio"].low is None
    assert lengths["equal"]["identity_minus_topd"].value == pytest.approx(0.05)
    (table,) = [table for table in tables_of(figures, 1.0, WINDOW) if table.columns[0] == "windows"]
    assert [row[:2] for row in table.rows] == [[name, str(found["opd"].n)] for name, found in lengths.items()]


def test_too_few_points_are_said_and_get_no_interval(config: TopdConfig, point: Point, tmp_path: Path) -> None:
    arms = {BEFORE: 0.5, "opd": 0.4, "topd": 0.2, "identity": 0.3, "teacher_context": 0.1}
    points, rows = made(point, {arm: [left] * 3 for arm, left in arms.items()})
    figures = figures_of(points, rows, [1.0, 2.0], 1.0)
    ratio = figures["distance"]["rates"][1.0]["ratio"]
    assert (ratio.value, ratio.low, ratio.high, ratio.n) == (pytest.approx(0.5), None, None, 3)
    counts = Counts(num_trajectories=9, num_candidates=12, num_cut=2, threshold=0.1)
    notes = notes_of(config, points, counts, figures["targets"])
    assert [note for note in notes if note.startswith("No more than 3 of 200 points")]
    assert [note for note in notes if note.startswith("No intervals: 3 points of 3 prompts, and an interval needs 20")]
    assert [note for note in notes if note.startswith("2 candidates left out")]
    draw_picture(tmp_path / "few.png", rows, figures, 1.0)


def with_prompts(points: list[Point], num: int) -> list[Point]:
    """The same points, of `num` prompts only."""
    trajectories = [replace(one.window.trajectory, prompt_id=f"p{index % num}") for index, one in enumerate(points)]
    return [
        replace(point, window=replace(point.window, trajectory=one))
        for point, one in zip(points, trajectories, strict=True)
    ]


ARMS_LEFT = {BEFORE: 0.5, "opd": 0.4, "topd": 0.2, "identity": 0.3, "teacher_context": 0.1}
COUNTS = Counts(num_trajectories=40, num_candidates=90, num_cut=0, threshold=0.1)


def test_many_points_of_few_prompts_have_no_interval_and_that_is_said(config: TopdConfig, point: Point) -> None:
    points, rows = made(point, {arm: [left] * 40 for arm, left in ARMS_LEFT.items()})
    points = with_prompts(points, 15)
    figures = figures_of(points, rows, [1.0, 2.0], 1.0)
    assert figures["rollout"].low is None and (figures["num_points"], figures["num_prompts"]) == (40, 15)
    notes = notes_of(config, points, COUNTS, figures["targets"])
    said = "No intervals: 40 points of 15 prompts, and an interval needs 20 prompts."
    assert [note for note in notes if "interval" in note] == [said]


def test_a_group_of_few_prompts_has_no_interval_and_that_is_said(config: TopdConfig, point: Point) -> None:
    """25 harmless points and 25 choices of 5 prompts."""
    points, rows = made(point, {arm: [left] * 50 for arm, left in ARMS_LEFT.items()})
    points = [replace(one, label="harmless") for one in points[:25]] + [
        replace(one, label="choice") for one in with_prompts(points[25:], 5)
    ]
    figures = figures_of(points, rows, [1.0, 2.0], 1.0)
    assert figures["labels"]["choice"]["opd"].low is None and figures["labels"]["harmless"]["opd"].low is not None
    notes = notes_of(config, points, COUNTS, figures["targets"])
    said = 'No intervals for "choice" (25 points of 5 prompts): an interval needs 20 prompts.'
    assert [note for note in notes if "interval" in note] == [said]


def test_windows_within_which_the_response_ended_are_counted(config: TopdConfig, point: Point) -> None:
    points, _ = made(point, {"opd": [0.5] * 3})
    whole = points[0].window.trajectory
    short = replace(whole, response_ids=whole.response_ids[:4], behaviour_logprobs=whole.behaviour_logprobs[:4])
    ended = [replace(points[0], window=replace(points[0].window, trajectory=short)), *points[1:]]
    targets = targets_of(points)
    said, before = (
        [note for note in notes_of(config, some, COUNTS, targets) if note.startswith("The response ends")]
        for some in (ended, points)
    )
    assert len(said) == 1 and not before and said[0].startswith("The response ends within the window of 1 of 3 points")


@pytest.mark.parametrize("field", ["near_future.guidance_context=teacher", "near_future.student_window=resample"])
def test_targets_lie_along_the_window_wherever_training_guides(
    config: TopdConfig, distances_of: Distances, point: Point, field: str
) -> None:
    name, value = field.removeprefix("near_future.").split("=")
    near_future = config.near_future.model_copy(update={name: value})
    elsewhere = config.model_copy(update={"near_future": near_future})
    look_ahead = window_look_ahead(elsewhere, distances_of, None)  # type: ignore[arg-type]
    asked = as_asked(point.window.trajectory, point.window.scores, point.teacher_ids)
    (window,) = look_ahead.fold([asked], GUIDES_ALWAYS)
    assert window.targets.num_guided == WINDOW and not len(window.branches.positions)
    assert unfold(window.targets) == unfold(point.window.targets)
