"""What a reader of a probe's figures must know."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from topd_ray.studies.probe.figures import Figures
from topd_ray.studies.probe.rows import KINDS
from topd_ray.studies.statistics import FEWEST, Interval

FULL = "full windows"


def notes_of(figures: Figures) -> list[str]:
    """Notes on all windows, on full ones, and which figures have no interval."""
    counts = figures.counts
    window, num, cut = counts["window"], counts["trajectories"], counts["cut_windows"]
    num_cut = sum(sum(one.values()) for one in cut.values())
    return [
        f"{counts['shorter_than_window']} of {num} rollouts are shorter than a window of {window} tokens; {num_cut} of "
        f"{sum(counts['positions'].values())} windows are cut short by the end of the response "
        f"({sum(one['by_limit'] for one in cut.values())} of them by rollout.max_new_tokens). They count as in "
        "training, with the tokens they have.",
        "Loss and distance are correlated over the positions of all three kinds (each once), over the high-loss ones, "
        "and over the random ones, which stand for all tokens; the paper does not say which of these it takes.",
        *_of_intervals(figures),
        *_of_figures(figures, ""),
        *_of_full_windows(figures),
    ]


def _of_figures(figures: Figures, over: str) -> Iterator[str]:
    """`over`: of which positions; empty for all."""
    if figures.low_quartile.value == 0.0:
        yield (
            f"The upper quartile of the low-loss distances{over} is 0, below which nothing lies: the share of false "
            "alarms by the paper's definition says nothing here."
        )
    if figures.counts["without_loss"]:
        yield (
            f"{figures.counts['without_loss']} positions{over} hold a token that the teacher rules out, of infinite "
            "loss: Pearson's correlation leaves them out."
        )


def _of_full_windows(figures: Figures) -> Iterator[str]:
    if figures.full_windows is not None:
        yield from _of_figures(figures.full_windows, f" of {FULL}")
        return
    counts = figures.counts
    without = [kind for kind in KINDS if counts["positions"][kind] == sum(counts["cut_windows"][kind].values())]
    yield f"No figures of {FULL}: found none of {', '.join(without)} loss; right would be longer responses."


def _of_intervals(figures: Figures) -> Iterator[str]:
    """One note on all figures that have none."""
    num = figures.counts["prompts"]
    if num < FEWEST:
        yield (
            f"No intervals: {num} prompts, and an interval needs {FEWEST}; right would be a larger "
            "studies.probe.num_trajectories."
        )
        return
    lacking = _lacking("", _all_of(figures, but=("full_windows", "unequal_detection")))
    if (full := figures.full_windows) is not None:
        lacking += _of_column(FULL, full.counts["prompts"], _all_of(full, but=("unequal_detection",)))
    if (unequal := figures.unequal_detection) is not None:
        lacking += _of_column("unequal windows", unequal["prompts"], unequal)
    if lacking:
        yield (
            f"No interval where fewer than {FEWEST} prompts have such positions, or half of the resamples leave a "
            f"figure undefined: {'; '.join(lacking)}."
        )


def _all_of(figures: Figures, but: tuple[str, ...]) -> dict[str, Any]:
    return {one.name: getattr(figures, one.name) for one in fields(figures) if one.name not in but}


def _of_column(name: str, num_prompts: int, figures: Mapping[str, Any]) -> list[str]:
    """A column of too few prompts is named as a whole."""
    return [f"{name} ({num_prompts} prompts)"] if num_prompts < FEWEST else _lacking(name, figures)


def _lacking(name: str, figures: Mapping[str, Any]) -> list[str]:
    """Names of the defined figures without an interval; where all of one mapping have none, its own name."""
    own = [key for key, one in figures.items() if isinstance(one, Interval)]
    found = [key for key in own if figures[key].low is None and np.isfinite(figures[key].value)]
    names = [name] if name and own and found == own else [_joined(name, key) for key in found]
    for key, one in figures.items():
        if isinstance(one, Mapping):
            names += _lacking(_joined(name, key), one)
    return names


def _joined(name: str, key: str) -> str:
    return f"{name} {key}".replace("_", " ").strip()
