"""`topd study local-correction`: what a few updates at one divergent point leave of it (the paper's figure 5).

For each point on its own, from the same weights: M updates by each arm, then the continuation drawn again after the
same prefix, and its optimal-transport distance to the teacher's window, which stays what it was.

How we read "M consecutive updates on the window": its tokens stay those of the rollout (`reuse`, as in training), so
all but the first update are of a policy that has moved on a little. The other reading draws the window anew from the
updated policy before each update, and scores it again: `studies.local_correction.redraw_window`.

What a point would have left without any update is drawn anew too (`before`). Points are chosen for the distance of
their rollout, so another draw from the very same policy is nearer on average, and that is nobody's merit.

    folder/points.parquet      the points; written once
    folder/rows/00000.parquet  what was measured at the first ten; a point that is in a file is not done again
    folder/results.json, *.png
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from topd_ray.actors.parts import threads
from topd_ray.config.load import dump_config
from topd_ray.config.schema import TopdConfig
from topd_ray.data.tokenizer import check_same_vocabulary
from topd_ray.engines.seeds import stable_seed
from topd_ray.errors import DataError
from topd_ray.pipeline.plan import Say
from topd_ray.studies.correction import Method, Student
from topd_ray.studies.correction_figures import BEFORE, Row, draw_picture, figures_of, notes_of, tables_of
from topd_ray.studies.divergent_points import (
    GUIDES_ALWAYS,
    Counts,
    Point,
    as_asked,
    find_points,
    load_points,
    save_points,
    window_look_ahead,
)
from topd_ray.studies.futures import Distances, open_teacher
from topd_ray.studies.results import Results, claim_folder, save_results
from topd_ray.types import GuidedTrajectory, SparseTargets, Trajectory

STUDY = "local-correction"
POINTS_A_FILE = 10
SECONDS = b"seconds"
PICTURE = "local-correction.png"
ELSEWHERE = (
    *("run.name", "run.root", "run.steps", "run.epochs", "run.resume", "run.checkpoint_every", "run.keep_checkpoints"),
    *("evaluation", "metrics", "buffer", "pipeline", "faults", "weights", "resources", "studies.probe", "studies.arms"),
)
"""Parts of the config that change nothing here: a folder goes on under other values of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A way to learn from a window."""

    method: Method
    targets: Callable[[GuidedTrajectory], SparseTargets] = lambda window: window.targets


def identity_targets(window: GuidedTrajectory) -> SparseTargets:
    """Position i learns the teacher's i-th token, and nothing beyond the shorter window: what transport adds to."""
    num_tokens, teacher_ids = window.trajectory.num_response_tokens, window.windows.teacher_ids
    num_guided = min(num_tokens, len(teacher_ids))
    return SparseTargets(
        indptr=np.minimum(np.arange(num_tokens + 1, dtype=np.int64), num_guided),
        token_ids=teacher_ids[:num_guided],
        weights=np.ones(num_guided, np.float32),
        entropy=np.zeros(num_tokens, np.float32),
    )


ARMS = {
    "opd": Arm(method="opd"),
    "topd": Arm(method="topd"),
    "identity": Arm(method="topd", targets=identity_targets),
}


def local_correction(config: TopdConfig, folder: Path, command: str, say: Say) -> None:
    """Measure, or go on measuring, in `folder`; print the tables and write results.json.

    Raises ConfigError for a folder of another config or vocabularies that differ, DataError where there is no divergent
    point at all, NonFiniteLossError for a learning rate under which the student bursts.
    """
    check_same_vocabulary(config.student, config.teacher)
    claim_folder(folder, config, ELSEWHERE)
    distances_of = Distances(config)
    path = folder / "points.parquet"
    if path.exists():
        points, counts = load_points(path)
        say(f"{path}: {len(points)} points")
    else:
        points, counts = find_points(config, distances_of, say)
        if not points:
            raise DataError(
                f"{counts.num_candidates} candidates of {counts.num_trajectories} rollouts: none is divergent; right "
                "would be a pair whose futures part, or more studies.local_correction.num_points"
            )
        save_points(path, points, counts)
        say(f"{len(points)} divergent points of {counts.num_candidates} candidates")
    seconds = _measure(config, folder / "rows", points, distances_of, say)
    rows = [row for file in sorted((folder / "rows").glob("*.parquet")) for row in _load_rows(file)]
    _conclude(config, folder, command, points, counts, rows, seconds + counts.seconds)


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
                    window = redrawn(point, update) if redrawn else point.window
                    return replace(window, targets=arm.targets(window))

                losses = student.update(window_at, arm.method, rate, study.num_updates)
                continuations += draw()
            measured.append((name, rate, losses))
    distances = distances_of([one.token_ids for one in continuations], [point.teacher_ids] * len(continuations))
    *sampled, greedy = distances.reshape(len(measured), -1).T
    return [
        Row(
            point=index,
            name=point.name,
            arm=arm,
            learning_rate=rate,
            distance=float(np.mean([column[i] for column in sampled])),
            greedy=float(greedy[i]),
            losses=losses,
        )
        for i, (arm, rate, losses) in enumerate(measured)
    ]


def _measure(config: TopdConfig, folder: Path, points: Sequence[Point], distances_of: Distances, say: Say) -> float:
    """Write the files that are missing; the seconds that all of them took."""
    folder.mkdir(exist_ok=True)
    files = {folder / f"{start // POINTS_A_FILE:05d}.parquet": start for start in range(0, len(points), POINTS_A_FILE)}
    missing = {file: start for file, start in files.items() if not file.exists()}
    if missing:
        with ExitStack() as stack:
            torch.set_num_threads(threads(config, "learner"))
            student = Student(config)
            redrawn = None
            if config.studies.local_correction.redraw_window:
                redrawn = stack.enter_context(_Redrawing(config, student, distances_of))
            say(f"correcting {len(points)} points, {len(files) - len(missing)} of {len(files)} files are there")
            for file, start in tqdm(missing.items(), desc="correcting", unit="file", disable=None, leave=False):
                started = time.monotonic()
                rows = [
                    row
                    for index, point in enumerate(points[start : start + POINTS_A_FILE], start)
                    for row in rows_of_point(config, student, index, point, distances_of, redrawn)
                ]
                _save_rows(file, rows, time.monotonic() - started)
    return sum(float(pq.read_schema(file).metadata[SECONDS]) for file in files)


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


def _save_rows(path: Path, rows: Sequence[Row], seconds: float) -> None:
    table = pa.Table.from_pylist([asdict(row) for row in rows]).replace_schema_metadata(
        {SECONDS: repr(seconds).encode()}
    )
    unfinished = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, unfinished)
    unfinished.rename(path)


def _load_rows(path: Path) -> Iterator[Row]:
    for values in pq.read_table(path).to_pylist():
        yield Row(**values)


def _conclude(
    config: TopdConfig,
    folder: Path,
    command: str,
    points: Sequence[Point],
    counts: Counts,
    rows: Sequence[Row],
    seconds: float,
) -> None:
    rate, rates = learning_rates(config)
    figures: dict[str, Any] = figures_of(points, rows, rates)
    tables = tables_of(figures, rate, config.near_future.window)
    draw_picture(folder / PICTURE, rows, figures, rate)
    notes = notes_of(config, points, counts)
    save_results(
        folder,
        Results(
            study=STUDY,
            command=command,
            seeds=[config.run.seed],
            seconds=seconds,
            figures=_plain({**asdict(counts), "learning_rate": rate, **figures}),
            tables=tables,
            pictures=[PICTURE],
            notes=notes,
            config=dump_config(config),
        ),
    )
    print("\n\n".join(["", *(table.text() for table in tables), *notes, f"{seconds:.0f} s; {folder}/"]))


def _plain(figure: Any) -> Any:
    """Figures as JSON holds them."""
    if isinstance(figure, dict):
        return {str(key): _plain(value) for key, value in figure.items()}
    return figure.to_json() if hasattr(figure, "to_json") else figure
