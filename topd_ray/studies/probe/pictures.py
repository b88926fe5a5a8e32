"""The pictures of a probe."""

from pathlib import Path

import numpy as np

from topd_ray.studies.pictures import BLUE, GREY, RED, picture
from topd_ray.studies.probe.columns import Probed
from topd_ray.studies.probe.detection import DECIDED
from topd_ray.studies.probe.figures import BIN, Figures
from topd_ray.studies.probe.rows import KINDS

COLOURS = {"high": RED, "random": GREY, "low": BLUE}
LABEL_COLOURS = {"harmless": BLUE, "choice": "#edae49", "error": RED}
MOST_POINTS = 4000
"""Of each kind in the scatter; the first ones, so that a picture does not change."""


def draw_pictures(folder: Path, probed: Probed, figures: Figures) -> list[str]:
    """Write them; their names."""
    names = [_scatter(folder, probed, figures), _distances(folder, probed, figures)]
    return names if figures.detection is None else [*names, _labels(folder, probed, figures.detection["threshold"])]


def _scatter(folder: Path, probed: Probed, figures: Figures) -> str:
    """Loss against distance."""
    name = "scatter.png"
    with picture(folder / name, size=(5.6, 3.8)) as (axes,):
        for kind in KINDS[::-1]:
            rows = np.flatnonzero(probed.of_kind(kind) & np.isfinite(probed.loss))[:MOST_POINTS]
            axes.scatter(
                probed.loss[rows],
                probed.distance[rows],
                s=9,
                alpha=0.5,
                linewidths=0,
                color=COLOURS[kind],
                label=f"{kind} loss" if kind != "random" else "random",
            )
        axes.set_xlabel("token loss (nats)")
        axes.set_ylabel(f"transport distance, {figures.counts['window']} tokens ahead")
        correlations = figures.pearson["all"].value, figures.spearman["all"].value
        axes.set_title("Pearson {:.3f}, Spearman {:.3f}".format(*correlations), fontsize=9)
        axes.legend(markerscale=2)
    return name


def _distances(folder: Path, probed: Probed, figures: Figures) -> str:
    """Histogram and cumulative distribution of the distances of each kind."""
    name = "distances.png"
    edges = np.asarray(figures.histogram["edges"])
    with picture(folder / name, columns=2) as (left, right):
        for kind in KINDS:
            counts = np.asarray(figures.histogram[kind])
            left.stairs(counts / counts.sum(), edges, color=COLOURS[kind], label=kind, fill=True, alpha=0.25)
            left.stairs(counts / counts.sum(), edges, color=COLOURS[kind])
            left.axvline(figures.median_distance[kind].value, color=COLOURS[kind], linestyle="--", linewidth=1)
            right.ecdf(probed.distance[probed.of_kind(kind)], color=COLOURS[kind], label=kind)
        left.set_ylabel(f"share of positions in bins of {BIN:g}")
        left.set_title("dashed: medians", fontsize=9)
        right.axvline(figures.low_quartile.value, color=BLUE, linestyle=":", linewidth=1)
        right.set_ylabel("cumulative share")
        right.set_title("dotted: upper quartile of the low-loss ones", fontsize=9)
        for axes in (left, right):
            axes.set_xlabel("transport distance")
            axes.legend(title="loss")
    return name


def _labels(folder: Path, probed: Probed, threshold: float) -> str:
    """Cumulative distributions of distance, loss and position-wise cost by what a mismatch means."""
    name = "labels.png"
    titles = {"distance": "transport distance", "position_cost": "position-wise cost", "loss": "token loss (nats)"}
    with picture(folder / name, columns=3, size=(4.0, 3.2)) as panels:
        for axes, (score, title) in zip(panels, titles.items(), strict=True):
            values = getattr(probed, score)
            for label in DECIDED:
                rows = probed.of_kind("high") & (probed.label == label) & np.isfinite(values)
                if rows.any():
                    axes.ecdf(values[rows], color=LABEL_COLOURS[label], label=label)
            axes.set_xlabel(title)
        panels[0].axvline(threshold, color=GREY, linestyle=":", linewidth=1)
        panels[0].set_ylabel("cumulative share of high-loss positions")
        panels[0].legend()
    return name
