"""Figures, tables and the picture of `topd study local-correction`, from its rows.

Axes: P points, R learning rates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from topd_ray.config.schema import TopdConfig
from topd_ray.objective import unfold
from topd_ray.studies.local_correction.points import Counts, Point
from topd_ray.studies.pictures import BLUE, GREY, RED, picture
from topd_ray.studies.statistics import FEWEST, Floats, Interval, bootstrap
from topd_ray.studies.tables import Table, shown

BEFORE = "before"
NAMES = {
    "opd": "OPD",
    "topd": "TOPD",
    "identity": "TOPD, the identity as plan",
    "teacher_context": "TOPD, the teacher's context",
}
SHORT = {"opd": "OPD", "topd": "TOPD", "identity": "identity", "teacher_context": "teacher's context"}
"""The same where there is little room."""
PAPER = {"rollout": 0.538, "opd": 0.350, "topd": 0.204, "ratio": 0.204 / 0.350}
"""The paper's figure 5; it does not say whether its "before" is the rollout's own window, or drawn again."""
COLOURS = {"opd": RED, "topd": BLUE, "identity": "#edae49", "teacher_context": "#3c8d5a"}
Kind = Literal["distance", "greedy", "start"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one arm left of one point."""

    point: int
    """its number"""
    name: str
    """trajectory@position"""
    arm: str
    """`before`, or one of NAMES"""
    learning_rate: float
    """0 for `before`"""
    distances: list[float]
    """of the continuations drawn again, to the teacher's window"""
    starts: list[bool]
    """whether each begins with the teacher's first token"""
    greedy: float
    """of the student's most likely continuation"""
    losses: list[float]
    """before each update (nats a token)"""

    @property
    def distance(self) -> float:
        return float(np.mean(self.distances))

    @property
    def start(self) -> float:
        """Share of the continuations that begin with the teacher's first token."""
        return float(np.mean(self.starts))


ROW_SCHEMA = pa.schema(
    {
        "point": pa.int64(),
        "name": pa.string(),
        "arm": pa.string(),
        "learning_rate": pa.float64(),
        "distances": pa.list_(pa.float64()),
        "starts": pa.list_(pa.bool_()),
        "greedy": pa.float64(),
        "losses": pa.list_(pa.float64()),
    }
)


def columns_of(rows: Sequence[Row], kind: Kind) -> dict[tuple[str, float], Floats]:
    """[P] values of a row's field by arm and learning rate, in the order of the points."""
    columns: dict[tuple[str, float], list[float]] = {}
    for row in sorted(rows, key=lambda row: row.point):
        columns.setdefault((row.arm, row.learning_rate), []).append(getattr(row, kind))
    return {key: np.asarray(column) for key, column in columns.items()}


def figures_of(points: Sequence[Point], rows: Sequence[Row], rates: Sequence[float], rate: float) -> dict[str, Any]:
    """Means with 95 % intervals; those below `rates` are by learning rate, for both kinds of continuation.

    Of a rate: the mean that each arm leaves, `topd_minus_opd` and `identity_minus_topd` (paired), `ratio` (mean left by
    TOPD over mean left by OPD), `teacher_context_ratio` (the same of learning in the teacher's context), the shares of
    points at which TOPD leaves less (`nearer`) and more (`farther`).
    `best_ratio`: TOPD's with either method at the rate that suits it best, which is chosen again in each resample;
    `teacher_context_best_ratio`: the same in the teacher's context.
    `labels`: those of `rate` by what the mismatches mean, where that is known; `lengths`: by which of the rollout's and
    the teacher's windows is shorter. `start`, of `rate`: the share of continuations that begin with the teacher's first
    token, and the mean distance of those that do and do not. `targets`: see `targets_of`. Resamples are of prompts.
    """
    clusters = clusters_of(points)
    figures: dict[str, Any] = {
        "num_points": len(points),
        "num_prompts": num_prompts_of(points),
        "rollout": bootstrap(_mean, [point.distance for point in points], clusters=clusters),
        "teacher_again": bootstrap(_mean, [point.teacher_again for point in points], clusters=clusters),
        "targets": targets_of(points),
        "start": {key[0]: _by_start(rows, *key) for key in ((BEFORE, 0.0), *((arm, rate) for arm in NAMES))},
    }
    kinds: tuple[Kind, ...] = ("distance", "greedy")
    for kind in kinds:
        columns = columns_of(rows, kind)
        opd, topd, in_context = ([columns[arm, one] for one in rates] for arm in ("opd", "topd", "teacher_context"))
        figures[kind] = {
            BEFORE: bootstrap(_mean, columns[BEFORE, 0.0], clusters=clusters),
            "rates": {one: _of_rate({arm: columns[arm, one] for arm in NAMES}, clusters) for one in rates},
            "best_ratio": bootstrap(_best_ratio, *opd, *topd, clusters=clusters),
            "teacher_context_best_ratio": bootstrap(_best_ratio, *opd, *in_context, clusters=clusters),
        }
    columns = columns_of(rows, "distance")
    left = {arm: columns[arm, rate] for arm in NAMES}
    for name, groups in (
        ("labels", [point.label for point in points]),
        ("lengths", [point.lengths for point in points]),
    ):
        figures[name] = _by_group(groups, columns[BEFORE, 0.0], left, clusters)
    return figures


def _by_group(
    groups: Sequence[str], before: Floats, left: Mapping[str, Floats], clusters: NDArray[np.int64]
) -> dict[str, dict[str, Interval]]:
    """The figures of the points of each group that has a name."""
    found = {}
    for group in sorted({*groups} - {""}):
        own = np.asarray(groups) == group
        found[group] = {
            BEFORE: bootstrap(_mean, before[own], clusters=clusters[own]),
            **_of_rate({arm: values[own] for arm, values in left.items()}, clusters[own]),
        }
    return found


def _by_start(rows: Sequence[Row], arm: str, rate: float) -> dict[str, float | None]:
    own = [row for row in rows if (row.arm, row.learning_rate) == (arm, rate)]
    starts = np.concatenate([row.starts for row in own]).astype(bool)
    distances = np.concatenate([row.distances for row in own])
    return {
        "share": float(starts.mean()),
        "distance_with": float(distances[starts].mean()) if starts.any() else None,
        "distance_without": float(distances[~starts].mean()) if not starts.all() else None,
    }


def targets_of(points: Sequence[Point]) -> dict[str, float]:
    """What TOPD's soft targets teach: their mean weight on the student's own token and on the teacher's first one, at
    the divergent point (`point_own`, `point_teacher`), and on the student's own over whole windows (`window_own`).

    A token of the student that occurs anywhere in the teacher's window costs nothing to move there: its target may be
    itself.
    """
    targets = [unfold(point.window.targets) for point in points]
    ids = [point.window.trajectory.response_ids.tolist() for point in points]
    own = [
        [target.get(token, 0.0) for target, token in zip(*pair, strict=True)] for pair in zip(targets, ids, strict=True)
    ]
    teacher = [rows[0].get(int(point.teacher_ids[0]), 0.0) for rows, point in zip(targets, points, strict=True)]
    return {
        "point_own": float(np.mean([weights[0] for weights in own])),
        "point_teacher": float(np.mean(teacher)),
        "window_own": float(np.mean([weight for weights in own for weight in weights])),
    }


def clusters_of(points: Sequence[Point]) -> NDArray[np.int64]:
    """[P], the number of each point's prompt."""
    prompts = [point.window.trajectory.prompt_id for point in points]
    return np.unique(prompts, return_inverse=True)[1].astype(np.int64)


def num_prompts_of(points: Sequence[Point]) -> int:
    return len({point.window.trajectory.prompt_id for point in points})


def num_ended(points: Sequence[Point], window: int) -> int:
    """Points within whose window the response ends, so that it has fewer tokens."""
    return sum(point.window.trajectory.num_response_tokens < window for point in points)


def _of_rate(left: Mapping[str, Floats], clusters: NDArray[np.int64]) -> dict[str, Interval]:
    difference = left["topd"] - left["opd"]
    over = partial(bootstrap, clusters=clusters)
    return {
        **{arm: over(_mean, left[arm]) for arm in NAMES},
        "topd_minus_opd": over(_mean, difference),
        "identity_minus_topd": over(_mean, left["identity"] - left["topd"]),
        "ratio": over(_ratio, left["topd"], left["opd"]),
        "teacher_context_ratio": over(_ratio, left["teacher_context"], left["opd"]),
        "nearer": over(_mean, (difference < 0).astype(np.float64)),
        "farther": over(_mean, (difference > 0).astype(np.float64)),
    }


def tables_of(figures: Mapping[str, Any], rate: float, window: int) -> list[Table]:
    """The paper's figure beside ours at `rate`, and all rates."""
    sampled = figures["distance"]
    ours = sampled["rates"][rate]
    beside = [
        ("the rollout's own window", figures["rollout"], PAPER["rollout"]),
        ("drawn again before", sampled[BEFORE], None),
        ("after OPD", ours["opd"], PAPER["opd"]),
        ("after TOPD", ours["topd"], PAPER["topd"]),
        *((f"after {NAMES[arm]}", ours[arm], None) for arm in ("identity", "teacher_context")),
        ("the teacher, drawn again", figures["teacher_again"], None),
        ("TOPD / OPD", ours["ratio"], PAPER["ratio"]),
        ("the same in the teacher's context", ours["teacher_context_ratio"], None),
        ("TOPD - OPD, paired", ours["topd_minus_opd"], PAPER["topd"] - PAPER["opd"]),
        ("identity - TOPD, paired", ours["identity_minus_topd"], None),
    ]
    num_points = figures["num_points"]
    title = f"OT distance to the teacher's {window} tokens at {num_points} divergent points, learning rate {rate:g}"
    first = Table(
        title=title,
        columns=["", "this pair", "paper"],
        rows=[[label, shown(value), shown(paper)] for label, value, paper in beside],
    )
    left = f"Left at learning rate {rate:g} by"
    groups = [
        _of_groups(f"{left} what the mismatch means", "mismatch", figures["labels"]),
        _of_groups(f"{left} the lengths of the rollout's and the teacher's windows", "windows", figures["lengths"]),
    ]
    starts = Table(
        title=f"Continuations at learning rate {rate:g} that begin with the teacher's first token, and mean distances",
        columns=["", "begin so", "distance of those", "of the others"],
        rows=[
            [NAMES.get(arm, arm), shown(of["share"], "%"), shown(of["distance_with"]), shown(of["distance_without"])]
            for arm, of in figures["start"].items()
        ],
    )
    return [
        first,
        starts,
        *(table for table in groups if table.rows),
        _by_rate("Left by learning rate, continuations drawn again", sampled),
        _by_rate("Left by learning rate, greedy continuations", figures["greedy"]),
    ]


def _by_rate(title: str, figures: Mapping[str, Any]) -> Table:
    columns = ["learning rate", *SHORT.values(), "TOPD / OPD", "context / OPD", "TOPD - OPD", "nearer, farther"]
    rows = [["none", *[shown(figures[BEFORE])] * len(SHORT), "", "", "", ""]]
    for rate, found in figures["rates"].items():
        shares = f"{shown(found['nearer'].value, '%')}, {shown(found['farther'].value, '%')}"
        keys = (*SHORT, "ratio", "teacher_context_ratio", "topd_minus_opd")
        rows.append([f"{rate:g}", *(shown(found[key]) for key in keys), shares])
    best = [shown(figures[key]) for key in ("best_ratio", "teacher_context_best_ratio")]
    rows.append(["each at its best", *[""] * len(SHORT), *best, "", ""])
    return Table(title=title, columns=columns, rows=rows)


def _of_groups(title: str, name: str, figures: Mapping[str, Any]) -> Table:
    columns = [name, "points", "before", *SHORT.values(), "TOPD / OPD", "identity - TOPD"]
    keys = (BEFORE, *SHORT, "ratio", "identity_minus_topd")
    rows = [[group, str(found["opd"].n), *(shown(found[key]) for key in keys)] for group, found in figures.items()]
    return Table(title=title, columns=columns, rows=rows)


def notes_of(config: TopdConfig, points: Sequence[Point], counts: Counts, targets: Mapping[str, float]) -> list[str]:
    """What a reader must know of how the points came about."""
    study = config.studies.local_correction
    notes = [
        f"{len(points)} points of {counts.num_trajectories} rollouts; {counts.num_candidates} candidates, divergent "
        f"above {counts.threshold:.3f}. {study.num_updates} updates on "
        + ("windows drawn anew before each." if study.redraw_window else "the rollout's own window."),
        f"At the divergent point TOPD's targets have {targets['point_own']:.0%} of their weight on the student's own "
        f"token and {targets['point_teacher']:.0%} on the teacher's; over the windows {targets['window_own']:.0%} on "
        "the student's own.",
    ]
    if len(points) < study.num_points:
        notes.append(f"No more than {len(points)} of {study.num_points} points were found.")
    notes += _without_intervals(points)
    if counts.num_cut:
        notes.append(f"{counts.num_cut} candidates left out: the length limit cuts their window short.")
    if ended := num_ended(points, config.near_future.window):
        notes.append(
            f"The response ends within the window of {ended} of {len(points)} points; such windows count with the "
            "tokens they have."
        )
    return notes


def _without_intervals(points: Sequence[Point]) -> list[str]:
    """One note, on all points or on the groups that are of too few prompts; none where there are enough."""
    num_prompts = num_prompts_of(points)
    if num_prompts < FEWEST:
        return [f"No intervals: {len(points)} points of {num_prompts} prompts, and an interval needs {FEWEST} prompts."]
    groups: dict[str, list[Point]] = {}
    for point in points:
        for name in filter(None, (point.label, point.lengths)):
            groups.setdefault(name, []).append(point)
    thin = [
        f'"{name}" ({len(own)} points of {num} prompts)'
        for name, own in sorted(groups.items())
        if (num := num_prompts_of(own)) < FEWEST
    ]
    return [f"No intervals for {', '.join(thin)}: an interval needs {FEWEST} prompts."] if thin else []


def draw_picture(path: Path, rows: Sequence[Row], figures: Mapping[str, Any], rate: float) -> None:
    """Distances before and after at `rate`, each point a dot, means as bars; and the means by learning rate."""
    columns, sampled = columns_of(rows, "distance"), figures["distance"]
    order = [(BEFORE, 0.0), *((arm, rate) for arm in NAMES)]
    with picture(path, columns=2) as (strip, by_rate):
        rng = np.random.default_rng(0)
        for place, key in enumerate(order):
            values = columns[key]
            colour = COLOURS.get(key[0], GREY)
            strip.boxplot(
                values, positions=[place], widths=0.6, showfliers=False, medianprops={"color": colour, "alpha": 0.0}
            )
            strip.plot(place + rng.uniform(-0.22, 0.22, values.size), values, ".", color=colour, alpha=0.35, ms=4)
            strip.plot([place - 0.3, place + 0.3], [values.mean()] * 2, color="black", lw=2)
            strip.annotate(f"{values.mean():.3f}", (place + 0.32, values.mean()), va="center", fontsize=8)
        strip.set_xticks(range(len(order)), ["before", *(name.replace(" ", "\n") for name in SHORT.values())])
        strip.set_xlim(-0.6, len(order) - 0.2)
        strip.set_ylabel("OT distance to the teacher's window")
        strip.set_title(f"{figures['num_points']} divergent points, bars are means", fontsize=9)
        rates = list(sampled["rates"])
        for arm, label in NAMES.items():
            found = [sampled["rates"][one][arm] for one in rates]
            by_rate.plot(rates, [one.value for one in found], "o-", color=COLOURS[arm], label=label)
            if found[0].low is not None:
                by_rate.fill_between(
                    rates, [one.low for one in found], [one.high for one in found], color=COLOURS[arm], alpha=0.15, lw=0
                )
        for label, figure, style in (
            ("drawn again before", sampled[BEFORE], "--"),
            ("the teacher, drawn again", figures["teacher_again"], ":"),
        ):
            by_rate.axhline(figure.value, color=GREY, ls=style, label=label)
        by_rate.set_xscale("log")
        by_rate.set_xticks(rates, [f"{one:g}" for one in rates])
        by_rate.minorticks_off()
        by_rate.set_xlabel("learning rate")
        by_rate.set_ylim(bottom=0)
        by_rate.legend(fontsize=7)


def _mean(values: Floats) -> float:
    return float(values.mean())


def _ratio(left: Floats, of: Floats) -> float:
    """NaN where nothing is left of the other: a bootstrap passes over that."""
    return float(left.mean() / of.mean()) if of.mean() > 0 else float("nan")


def _best_ratio(*columns: Floats) -> float:
    """The first half of the columns is OPD's, by learning rate, the second the other method's."""
    means = np.reshape([column.mean() for column in columns], (2, -1)).min(1)
    return float(means[1] / means[0]) if means[0] > 0 else float("nan")
