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
from numpy.typing import NDArray

from topd_ray.config.schema import TopdConfig
from topd_ray.errors import DataError
from topd_ray.studies.probe.columns import Bools, Probed
from topd_ray.studies.probe.detection import QUARTILE, detect, is_false_alarm, share
from topd_ray.studies.probe.rows import KINDS, Kind
from topd_ray.studies.statistics import Floats, Interval, bootstrap, pearson, plain, spearman

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
UNKNOWN = Interval(value=float("nan"), low=None, high=None, n=0)
"""Where no position counts."""


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
    full_windows: "Figures | None" = None
    """the same over positions whose student window has all its tokens; None where a kind has no such position"""

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = plain(
            {one.name: getattr(self, one.name) for one in fields(self) if one.name != "full_windows"}
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

    def over(rows: Bools, statistic: Callable[..., float], *columns: NDArray[Any]) -> Interval:
        if not rows.any():
            return UNKNOWN
        return bootstrap(statistic, *(column[rows] for column in columns), clusters=probed.prompt[rows])

    quantile = config.near_future.false_alarm_quantile
    return Figures(
        counts=count(probed, config),
        median_distance={kind: over(rows, _median, probed.distance) for kind, rows in kinds.items()},
        mean_distance={kind: over(rows, _mean, probed.distance) for kind, rows in kinds.items()},
        zero_share={kind: over(rows, _mean, probed.distance == 0.0) for kind, rows in kinds.items()},
        low_quartile=over(kinds["low"], lambda low: float(np.quantile(low, QUARTILE)), probed.distance),
        false_alarm_share=over(contrast, false_alarm_share, probed.distance, kinds["high"]),
        pearson={
            name: over(rows & has_loss, pearson, probed.loss, probed.distance) for name, rows in correlated.items()
        },
        spearman={name: over(rows, spearman, probed.loss, probed.distance) for name, rows in correlated.items()},
        histogram=histogram(probed),
        detection=detect(probed, quantile),
        unequal_detection=detect(probed.where(~probed.has_equal_lengths), quantile),
    )


def false_alarm_share(distance: Floats, is_high: Floats) -> float:
    """Share of high-loss distances below the upper quartile of the others, the low-loss ones (paper: 29.23 %).

    NaN without either, as in a resample of prompts that draws none of the few that have a low-loss position.
    """
    high = is_high > 0
    return share(is_false_alarm(distance, high)[high]) if not high.all() else float("nan")


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
        "without_loss": int((~np.isfinite(probed.loss)).sum()),
    }


def histogram(probed: Probed) -> dict[str, list[float]]:
    """Counts of distances by kind, in bins of 0.02 from 0 to the largest."""
    num_bins = int(probed.distance.max() // BIN) + 1
    edges = np.arange(num_bins + 1) * BIN
    counts: dict[str, list[float]] = {"edges": [round(edge, 6) for edge in edges.tolist()]}
    for kind in KINDS:
        counts[kind] = np.histogram(probed.distance[probed.of_kind(kind)], edges)[0].astype(float).tolist()
    return counts


def _median(values: Floats) -> float:
    return float(np.median(values))


def _mean(values: Floats) -> float:
    return float(values.mean())
