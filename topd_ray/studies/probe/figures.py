"""The figures of a probe: how far the futures part from high-loss, random and low-loss positions (paper, section 3).

Every probed position counts with the windows it has: where the response ends within K tokens, the student's window is
shorter (as in training), and so may the teacher's be. Short windows lie nearer, and are not as frequent among all kinds
of positions, so the same figures of full windows alone stand beside. Intervals resample prompts, whose positions are
not independent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from topd_ray.config.schema import TopdConfig
from topd_ray.demo.worded_labels import FORKS
from topd_ray.errors import DataError
from topd_ray.studies.probe.rows import KINDS, Kind
from topd_ray.studies.statistics import FEWEST, Floats, Interval, area_under_roc, bootstrap, pearson, plain, spearman

PAPER: Mapping[str, Any] = {
    "window": 50,
    "median_distance": {"high": 0.566, "random": 0.361, "low": 0.315},
    "false_alarm_share": 0.2923,
    "pearson": 0.126,
    "spearman": 0.143,
}
"""Look-ahead 50. The paper does not say over which positions it correlates."""
BIN = 0.02
"""Width of the bins of distances."""
CORRELATED = ("all", "high", "random")
"""Positions over which loss and distance are correlated; `all`: those of the three kinds, each once."""
QUARTILE = 0.75
DECIDED = ("harmless", *FORKS)
SCORES = ("distance", "loss", "position_cost")
"""What is compared as a detector of forks."""

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probed:
    """The rows of a probe as columns; see rows.SCHEMA."""

    trajectory: NDArray[np.str_]
    prompt: NDArray[np.int64]
    """numbers of prompts"""
    kind: NDArray[np.str_]
    position: NDArray[np.int64]
    num_response_tokens: NDArray[np.int64]
    was_cut: Bools
    """whether rollout.max_new_tokens ended the response"""
    loss: Floats
    distance: Floats
    position_cost: Floats
    has_equal_lengths: Bools
    """whether the two windows have as many tokens"""
    label: NDArray[np.str_]

    @classmethod
    def of(cls, rows: pa.Table) -> "Probed":
        columns = {name: rows.column(name).to_numpy(zero_copy_only=False) for name in rows.column_names}
        return cls(
            trajectory=columns["trajectory_id"].astype(np.str_),
            prompt=np.unique(columns["prompt_id"].astype(np.str_), return_inverse=True)[1],
            kind=columns["kind"].astype(np.str_),
            position=columns["position"].astype(np.int64),
            num_response_tokens=columns["num_response_tokens"].astype(np.int64),
            was_cut=columns["finish_reason"] == "length",
            loss=columns["loss"].astype(np.float64),
            distance=columns["distance"].astype(np.float64),
            position_cost=columns["position_cost"].astype(np.float64),
            has_equal_lengths=np.fromiter(map(len, columns["student_ids"]), np.int64)
            == np.fromiter(map(len, columns["teacher_ids"]), np.int64),
            label=columns["label"].astype(np.str_),
        )

    def where(self, rows: Bools) -> "Probed":
        """Only these rows."""
        return Probed(**{one.name: getattr(self, one.name)[rows] for one in fields(self)})

    def has_full_window(self, window: int) -> Bools:
        """Whether the response does not end within the `window` tokens from the position on."""
        full: Bools = self.num_response_tokens - self.position >= window
        return full

    def of_kind(self, kind: Kind) -> Bools:
        found: Bools = self.kind == kind
        return found

    def once(self) -> Bools:
        """One row for each position, whatever its kinds."""
        first = np.zeros(self.kind.size, np.bool_)
        _, numbers = np.unique(self.trajectory, return_inverse=True)
        first[np.unique(np.stack([numbers, self.position]), axis=1, return_index=True)[1]] = True
        return first


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a probe found."""

    counts: Mapping[str, Any]
    """trajectories, positions and windows, see `count`"""
    median_distance: Mapping[Kind, Interval]
    mean_distance: Mapping[Kind, Interval]
    zero_share: Mapping[Kind, Interval]
    """share of distances of 0: the same tokens, in any order"""
    low_quartile: Interval
    """upper quartile of the low-loss distances"""
    false_alarm_share: Interval
    """share of high-loss positions whose distance lies below that quartile"""
    pearson: Mapping[str, Interval]
    """of loss and distance, over CORRELATED"""
    spearman: Mapping[str, Interval]
    histogram: Mapping[str, Sequence[float]]
    """`edges` of the bins of distances, and counts by kind"""
    detection: Mapping[str, Any] | None
    """see `detect`; None where no label is known"""
    unequal_detection: Mapping[str, Any] | None
    """the same where one of the two windows is shorter than the other"""
    notes: Sequence[str]
    full_windows: "Figures | None" = None
    """the same over positions whose student window has all its tokens; None where a kind has no such position"""

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = plain(
            {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("notes", "full_windows")}
        )
        return found | {"full_windows": self.full_windows.to_json() if self.full_windows else None}


def find_figures(probed: Probed, config: TopdConfig) -> Figures:
    """All figures, with 95 % intervals where there are at least 20 prompts.

    Raises DataError where a kind has no position at all.
    """
    for kind in KINDS:
        if not probed.of_kind(kind).any():
            raise DataError(
                f"found no {kind}-loss position in {np.unique(probed.trajectory).size} rollouts of at most "
                f"{probed.num_response_tokens.max(initial=0)} tokens, right would be rollouts of more tokens, or a "
                "smaller near_future.candidate_fraction"
            )
    full = probed.where(probed.has_full_window(config.near_future.window))
    has_all_kinds = all(full.of_kind(kind).any() for kind in KINDS)
    return replace(_figures(probed, config), full_windows=_figures(full, config) if has_all_kinds else None)


def _figures(probed: Probed, config: TopdConfig) -> Figures:
    kinds = {kind: probed.of_kind(kind) for kind in KINDS}
    contrast = kinds["high"] | kinds["low"]
    has_loss = np.isfinite(probed.loss)  # a token that the teacher rules out has none
    correlated = {"all": probed.once(), "high": kinds["high"], "random": kinds["random"]}
    counts = count(probed, config)

    def over(rows: Bools, statistic: Callable[..., float], *columns: NDArray[Any]) -> Interval:
        return bootstrap(statistic, *(column[rows] for column in columns), clusters=probed.prompt[rows])

    quantile = config.near_future.false_alarm_quantile
    quartile = over(kinds["low"], lambda low: float(np.quantile(low, QUARTILE)), probed.distance)
    return Figures(
        counts=counts,
        median_distance={kind: over(rows, _median, probed.distance) for kind, rows in kinds.items()},
        mean_distance={kind: over(rows, _mean, probed.distance) for kind, rows in kinds.items()},
        zero_share={kind: over(rows, _mean, probed.distance == 0.0) for kind, rows in kinds.items()},
        low_quartile=quartile,
        false_alarm_share=over(contrast, false_alarm_share, probed.distance, kinds["high"]),
        pearson={
            name: over(rows & has_loss, pearson, probed.loss, probed.distance) for name, rows in correlated.items()
        },
        spearman={name: over(rows, spearman, probed.loss, probed.distance) for name, rows in correlated.items()},
        histogram=histogram(probed),
        detection=detect(probed, quantile),
        unequal_detection=detect(probed.where(~probed.has_equal_lengths), quantile),
        notes=_notes(counts, quartile, int((~has_loss).sum())),
    )


def false_alarm_share(distance: Floats, is_high: Floats) -> float:
    """Share of high-loss distances below the upper quartile of the others, the low-loss ones (paper: 29.23 %)."""
    high = is_high > 0
    return float(np.mean(distance[high] < np.quantile(distance[~high], QUARTILE)))


def count(probed: Probed, config: TopdConfig) -> dict[str, Any]:
    """Rollouts, and windows that the end of the response cuts short: by an end of the student's, or by the limit."""
    window = config.near_future.window
    _, first = np.unique(probed.trajectory, return_index=True)
    lengths = probed.num_response_tokens[first]
    is_cut = ~probed.has_full_window(window)
    return {
        "window": window,
        "prompts": int(np.unique(probed.prompt).size),
        "trajectories": int(first.size),
        "response_tokens": int(lengths.sum()),
        "shorter_than_window": int((lengths < window).sum()),
        "ended_by_limit": int(probed.was_cut[first].sum()),
        "positions": {kind: int(probed.of_kind(kind).sum()) for kind in KINDS},
        "distinct_positions": int(probed.once().sum()),
        "cut_windows": {
            kind: {
                "by_end": int((probed.of_kind(kind) & is_cut & ~probed.was_cut).sum()),
                "by_limit": int((probed.of_kind(kind) & is_cut & probed.was_cut).sum()),
            }
            for kind in KINDS
        },
    }


def histogram(probed: Probed) -> dict[str, list[float]]:
    """Counts of distances by kind, in bins of 0.02 from 0 to the largest."""
    num_bins = int(probed.distance.max() // BIN) + 1
    edges = np.arange(num_bins + 1) * BIN
    counts: dict[str, list[float]] = {"edges": [round(edge, 6) for edge in edges.tolist()]}
    for kind in KINDS:
        counts[kind] = np.histogram(probed.distance[probed.of_kind(kind)], edges)[0].astype(float).tolist()
    return counts


def detect(probed: Probed, quantile: float) -> dict[str, Any] | None:
    """How well the distance tells real forks (labels `choice` and `error`) from harmless mismatches; None unlabelled.

    The threshold is the `quantile` of all high-loss distances; above it, a position is taken for a fork. Precision:
    share of forks among those taken for one; recall: share of the forks that are. Undecided ones count for the
    threshold and nowhere else. AUC: probability that a fork has the larger score than a harmless mismatch.
    """
    rows = probed.of_kind("high")
    label, prompt = probed.label[rows], probed.prompt[rows]
    if not np.any(label != ""):
        return None
    code = np.select([np.isin(label, FORKS), label == "harmless"], [1.0, 0.0], -1.0)
    distance = probed.distance[rows]

    def precision(distance: Floats, code: Floats) -> float:
        alarmed = distance > np.quantile(distance, quantile)
        return _share(code[alarmed & (code >= 0)] == 1)

    def recall(distance: Floats, code: Floats) -> float:
        return _share(distance[code == 1] > np.quantile(distance, quantile))

    def area(score: Floats, code: Floats) -> float:
        fork, harmless = score[code == 1], score[code == 0]
        return area_under_roc(fork, harmless) if fork.size and harmless.size else float("nan")

    return {
        "labels": {name: int((label == name).sum()) for name in (*DECIDED, "undecided")},
        "threshold": float(np.quantile(distance, quantile)),
        "fork_share": bootstrap(lambda code: _share(code[code >= 0] == 1), code, clusters=prompt),
        "precision": bootstrap(precision, distance, code, clusters=prompt),
        "recall": bootstrap(recall, distance, code, clusters=prompt),
        "auc": {score: bootstrap(area, getattr(probed, score)[rows], code, clusters=prompt) for score in SCORES},
    }


def _notes(counts: Mapping[str, Any], quartile: Interval, num_without_loss: int) -> list[str]:
    window, num, cut = counts["window"], counts["trajectories"], counts["cut_windows"]
    num_cut = sum(sum(one.values()) for one in cut.values())
    notes = [
        f"{counts['shorter_than_window']} of {num} rollouts are shorter than a window of {window} tokens; {num_cut} of "
        f"{sum(counts['positions'].values())} windows are cut short by the end of the response "
        f"({sum(one['by_limit'] for one in cut.values())} of them by rollout.max_new_tokens). They count as in "
        "training, with the tokens they have.",
        "Loss and distance are correlated over the positions of all three kinds (each once), over the high-loss ones, "
        "and over the random ones, which stand for all tokens; the paper does not say which of these it takes.",
    ]
    if counts["prompts"] < FEWEST:
        notes.append(
            f"No intervals: {counts['prompts']} prompts, and an interval needs {FEWEST}; right would be a larger "
            "studies.probe.num_trajectories."
        )
    if quartile.value == 0.0:
        notes.append(
            "The upper quartile of the low-loss distances is 0, below which nothing lies: the share of false alarms by "
            "the paper's definition says nothing here."
        )
    if num_without_loss:
        notes.append(
            f"{num_without_loss} positions hold a token that the teacher rules out, of infinite loss: Pearson's "
            "correlation leaves them out."
        )
    return notes


def _median(values: Floats) -> float:
    return float(np.median(values))


def _mean(values: Floats) -> float:
    return float(values.mean())


def _share(marks: Bools) -> float:
    return float(marks.mean()) if marks.size else float("nan")
