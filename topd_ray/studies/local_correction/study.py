"""`topd study local-correction`: what a few updates at one divergent point leave of it (the paper's figure 5).

For each point on its own, from the same weights: M updates by each arm, then the continuation drawn again after the
same prefix, and its optimal-transport distance to the teacher's window, which stays what it was.

How we read "M consecutive updates on the window": its tokens stay those of the rollout (`reuse`, as in training), so
all but the first update are of a policy that has moved on a little. The other reading draws the window anew from the
updated policy before each update, and scores it again: `studies.local_correction.redraw_window`.

What a point would have left without any update is drawn anew too (`before`). Points are chosen for the distance of
their rollout, so another draw from the very same policy is nearer on average, and that is nobody's merit.

    rollouts  ->  divergent points  ->  updates and redraws, point by point  ->  results.json, picture

All in `Parts` of the folder rows/, so that what is there is not made again.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from topd_ray.actors.parts import threads
from topd_ray.config.load import dump_config
from topd_ray.config.schema import TopdConfig
from topd_ray.data.tokenizer import check_same_vocabulary
from topd_ray.engines.seeds import stable_seed
from topd_ray.errors import DataError
from topd_ray.objective import fold_windows, identity_plans, pad_windows
from topd_ray.pipeline.plan import Say
from topd_ray.studies.futures import Distances, open_teacher
from topd_ray.studies.local_correction.figures import (
    BEFORE,
    PAPER,
    ROW_SCHEMA,
    Row,
    draw_picture,
    figures_of,
    notes_of,
    num_ended,
    tables_of,
)
from topd_ray.studies.local_correction.points import (
    GUIDES_ALWAYS,
    POINT_COLUMNS,
    Counts,
    Point,
    as_asked,
    find_points,
    point_requests,
    points_to_table,
    table_to_points,
    window_look_ahead,
)
from topd_ray.studies.local_correction.updates import Method, Student
from topd_ray.studies.parts import Parts
from topd_ray.studies.results import Results, claim_folder, save_results
from topd_ray.studies.statistics import plain
from topd_ray.types import Branches, GuidedTrajectory, SparseTargets, Trajectory

STUDY = "local-correction"
POINTS_A_PART = 10
PICTURE = "local-correction.png"
UNRELATED = (
    *("run.name", "run.root", "run.steps", "run.epochs", "run.resume", "run.checkpoint_every", "run.keep_checkpoints"),
    *("data.heldout", "data.arithmetic.num_heldout", "near_future.quantile_window", "near_future.plan"),
    *("near_future.student_window", "near_future.guidance_context"),
    *("objective.method", "objective.cap", "objective.importance_horizon"),
    *("learner.schedule", "learner.warmup_fraction"),
    *("learner.dtype", "learner.zero_stage", "learner.num_ranks", "learner.max_tokens_per_micro_batch"),
    *("buffer", "pipeline", "faults", "weights", "evaluation", "metrics", "resources"),
    *("teacher.verify", "teacher.num_workers", "rollout.num_workers", "studies.probe", "studies.arms"),
)
"""Fields that nothing here depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A way to learn from a window."""

    method: Method
    guided: Callable[[GuidedTrajectory], GuidedTrajectory] = lambda window: window
    """the window with the guidance of this arm"""


def by_identity(window: GuidedTrajectory) -> GuidedTrajectory:
    """Position i learns the teacher's i-th token, and nothing beyond the shorter window: what transport adds to."""
    num_tokens, teacher_ids = window.trajectory.num_response_tokens, window.windows.teacher_ids
    width = max(num_tokens, len(teacher_ids))
    plan, lengths = identity_plans([num_tokens], [len(teacher_ids)], width)
    targets = fold_windows(plan, pad_windows([teacher_ids], width)[0], [0], num_tokens, lengths, lengths)
    return replace(window, targets=targets)


def in_teacher_context(window: GuidedTrajectory) -> GuidedTrajectory:
    """The teacher's window is learnt after the prefix and the teacher's own tokens (guidance_context=teacher)."""
    teacher_ids = window.windows.teacher_ids
    num_tokens = len(teacher_ids)
    plan, _ = identity_plans([num_tokens], [num_tokens], num_tokens)
    branch = Branches(
        positions=np.zeros(1, np.int32),
        indptr=np.asarray([0, num_tokens], np.int64),
        token_ids=teacher_ids,
        targets=fold_windows(plan, teacher_ids[None], [0], num_tokens),
    )
    return replace(window, targets=SparseTargets.empty(window.trajectory.num_response_tokens), branches=branch)


ARMS = {
    "opd": Arm(method="opd"),
    "topd": Arm(method="topd"),
    "identity": Arm(method="topd", guided=by_identity),
    "teacher_context": Arm(method="topd", guided=in_teacher_context),
}


def local_correction(config: TopdConfig, folder: Path, command: str, say: Say) -> Results:
    """Measure, or go on measuring, in `folder`; print the tables and write results.json.

    Raises ConfigError for a folder of another config or vocabularies that differ, DataError where there is no divergent
    point at all, NonFiniteLossError for a learning rate under which the student bursts.
    """
    check_same_vocabulary(config.student, config.teacher)
    requests = point_requests(config, say)
    claim_folder(folder, STUDY, config, UNRELATED)
    found = Parts(folder / "rows", "points", 1, POINT_COLUMNS)
    if found.missing():
        points, counts = find_points(config, requests, folder / "rows", say)
        if not points:
            raise DataError(
                f"{counts.num_candidates} candidates of {counts.num_trajectories} rollouts: none is divergent; right "
                "would be a pair whose futures part, or more studies.local_correction.num_points"
            )
        found.write(0, points_to_table(points, counts))
    points, counts = table_to_points(found.read(0))
    say(f"{len(points)} divergent points of {counts.num_candidates} candidates")
    measured = Parts(folder / "rows", "corrected", math.ceil(len(points) / POINTS_A_PART), ROW_SCHEMA.names)
    _measure(config, measured, points, say)
    rows = [Row(**values) for values in measured.read_all().to_pylist()]
    results = _conclude(config, folder, command, points, counts, rows, [found, measured])
    for table in results.tables:
        say(f"\n{table.text()}\n")
    for note in results.notes:
        say(note)
    say(f"{folder}/: results.json, {PICTURE}; {results.seconds:.0f} s")
    return results


def learning_rates(config: TopdConfig) -> tuple[float, list[float]]:
    """The rate whose figures stand first, and all of them, ascending."""
    study = config.studies.local_correction
    rate = study.learning_rate or config.learner.learning_rate
    return rate, sorted({rate, *(float(f"{rate * factor:.6g}") for factor in study.other_rates)})


def rows_of_point(
    config: TopdConfig,
    student: Student,
    index: int,
    point: Point,
    distances_of: Distances,
    redrawn: Callable[[Point, int], GuidedTrajectory] | None = None,
) -> list[Row]:
    """Everything that is measured at one point; the student's weights are afterwards what they were before.

    `redrawn(point, update)` is the window to learn from instead of the rollout's own.
    """
    study = config.studies.local_correction
    draw = partial(
        student.draw,
        point.prefix_ids,
        config.near_future.window,
        num_samples=study.num_redraws,
        seed=stable_seed(config.run.seed, "redraw", point.name),
        greedy=True,
    )
    measured: list[tuple[str, float, list[float]]] = [(BEFORE, 0.0, [])]
    continuations = draw()
    for rate in learning_rates(config)[1]:
        for name, arm in ARMS.items():
            with student.restored():

                def window_at(update: int, arm: Arm = arm) -> GuidedTrajectory:
                    return arm.guided(redrawn(point, update) if redrawn else point.window)

                losses = student.update(window_at, arm.method, rate, study.num_updates)
                continuations += draw()
            measured.append((name, rate, losses))
    distances = distances_of([one.token_ids for one in continuations], [point.teacher_ids] * len(continuations))
    distances = distances.reshape(len(measured), -1)
    starts = np.reshape([one.token_ids[0] == point.teacher_ids[0] for one in continuations], distances.shape)
    return [
        Row(
            point=index,
            name=point.name,
            arm=arm,
            learning_rate=rate,
            distances=distances[i, :-1].tolist(),
            starts=starts[i, :-1].tolist(),
            greedy=float(distances[i, -1]),
            losses=losses,
        )
        for i, (arm, rate, losses) in enumerate(measured)
    ]


def _measure(config: TopdConfig, parts: Parts, points: Sequence[Point], say: Say) -> None:
    """Make the parts that are missing."""
    missing = parts.missing()
    if not missing:
        return
    parts.begin()
    # As many as the student's vLLM engine had, by which torch's number is settled on a CPU.
    torch.set_num_threads(threads(config, "rollout"))
    say(f"loading {config.student.model}, which is corrected")
    with ExitStack() as stack:
        student, distances_of = Student(config), Distances(config)
        redrawn = None
        if config.studies.local_correction.redraw_window:
            redrawn = stack.enter_context(_Redrawing(config, student, distances_of))
        progress = stack.enter_context(
            tqdm(total=len(points), desc="correcting", unit="point", disable=None, leave=False)
        )
        progress.update(len(points) - sum(len(points[_of_part(part)]) for part in missing))
        for part in missing:
            rows = []
            for index in range(len(points))[_of_part(part)]:
                rows += rows_of_point(config, student, index, points[index], distances_of, redrawn)
                progress.update()
            parts.write(part, pa.Table.from_pylist([asdict(row) for row in rows], schema=ROW_SCHEMA))


def _of_part(part: int) -> slice:
    return slice(part * POINTS_A_PART, (part + 1) * POINTS_A_PART)


class _Redrawing:
    """Windows drawn from the student as it is, with the teacher's scores of them; holds the teacher's engine open."""

    def __init__(self, config: TopdConfig, student: Student, distances_of: Distances) -> None:
        self._config, self._student, self._distances_of = config, student, distances_of
        self._stack = ExitStack()

    def __enter__(self) -> "_Redrawing":
        self._teacher = self._stack.enter_context(open_teacher(self._config))
        self._look_ahead = window_look_ahead(self._config, self._distances_of, self._teacher)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, point: Point, update: int) -> GuidedTrajectory:
        whole = point.window.trajectory
        seed = stable_seed(self._config.run.seed, "window", point.name, update)
        (drawn,) = self._student.draw(whole.prompt_ids, self._config.near_future.window, num_samples=1, seed=seed)
        window: Trajectory = replace(whole, response_ids=drawn.token_ids, behaviour_logprobs=drawn.logprobs)
        (scores,) = self._teacher.score([(window.prompt_ids, window.response_ids)])
        (guided,) = self._look_ahead.fold([as_asked(window, scores, point.teacher_ids)], GUIDES_ALWAYS)
        return guided


def _conclude(
    config: TopdConfig,
    folder: Path,
    command: str,
    points: Sequence[Point],
    counts: Counts,
    rows: Sequence[Row],
    made: Sequence[Parts],
) -> Results:
    rate, rates = learning_rates(config)
    figures: dict[str, Any] = figures_of(points, rows, rates, rate)
    figures["num_ended"] = num_ended(points, config.near_future.window)
    tables = tables_of(figures, rate, config.near_future.window)
    draw_picture(folder / PICTURE, rows, figures, rate)
    results = Results(
        study=STUDY,
        command=command,
        seeds=[config.run.seed],
        seconds=sum(parts.seconds() for parts in made),
        commits=set.union(*(parts.commits() for parts in made)),
        figures=plain({**asdict(counts), "learning_rate": rate, "paper": PAPER, **figures}),
        tables=tables,
        pictures=[PICTURE],
        notes=notes_of(config, points, counts, figures["targets"]),
        config=dump_config(config),
    )
    save_results(folder, results)
    return results
