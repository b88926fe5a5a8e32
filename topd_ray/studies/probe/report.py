"""The figures of a probe as tables, beside the paper's."""

from collections.abc import Mapping
from typing import Any

from topd_ray.studies.probe.detection import LOSS_QUANTILES
from topd_ray.studies.probe.figures import PAPER, Figures
from topd_ray.studies.probe.rows import KINDS
from topd_ray.studies.tables import Table, shown

FALSE_ALARMS = "false alarms among high-loss positions"
OVER = {"all": "all three kinds", "high": "high-loss positions", "random": "random positions"}


def tables(figures: Figures) -> list[Table]:
    """The figures of all windows, of full ones and the paper's; and the detection of forks where that is known."""
    counts, full = figures.counts, figures.full_windows
    paper: dict[str, str] = {f"median distance, {_of(kind)}": shown(PAPER["median_distance"][kind]) for kind in KINDS}
    paper[FALSE_ALARMS] = shown(PAPER["false_alarm_share"], "%", 4)
    for name in ("Pearson", "Spearman"):
        paper |= {_correlation(name, over): shown(PAPER[name.lower()]) for over in ("all", "high")}
    title = (
        f"Near futures {counts['window']} tokens ahead (paper: {PAPER['window']}): {counts['trajectories']} rollouts, "
        f"{counts['positions']['high']} high-loss positions"
        + (f", {full.counts['positions']['high']} with full windows" if full else "")
    )
    rows = {"here [95 %]": _plain_rows(figures), "full windows": _plain_rows(full) if full else None, "paper": paper}
    found = [_table(title, rows)]
    if (detection := figures.detection) is not None:
        labels = ", ".join(f"{number} {name}" for name, number in detection["labels"].items())
        columns = {
            "here [95 %]": detection,
            "full windows": full.detection if full else None,
            "unequal windows": figures.unequal_detection,
        }
        rows = {name: _detection_rows(one) if one else None for name, one in columns.items()}
        found += [_table(f"Detection of forks: {labels}", rows), _loss_table(detection)]
    return found


def _of(kind: str) -> str:
    return "random positions" if kind == "random" else f"{kind}-loss positions"


def _correlation(name: str, over: str) -> str:
    return f"{name} of loss and distance, {OVER[over]}"


def _table(title: str, columns: Mapping[str, Mapping[str, str] | None]) -> Table:
    """The columns that there are, each by the names of the first one's rows."""
    kept = {name: column for name, column in columns.items() if column is not None}
    first = next(iter(kept.values()))
    return Table(
        title=title,
        columns=("", *kept),
        rows=[(name, *(column.get(name, "-") for column in kept.values())) for name in first],
    )


def _plain_rows(figures: Figures) -> dict[str, str]:
    rows: dict[str, str] = {}
    for kind in KINDS:
        rows[f"median distance, {_of(kind)}"] = shown(figures.median_distance[kind])
        rows[f"mean distance, {_of(kind)}"] = shown(figures.mean_distance[kind])
        rows[f"distance 0, {_of(kind)}"] = shown(figures.zero_share[kind], "%")
    rows[FALSE_ALARMS] = shown(figures.false_alarm_share if figures.low_quartile.value > 0.0 else None, "%")
    for name, values in (("Pearson", figures.pearson), ("Spearman", figures.spearman)):
        rows |= {_correlation(name, over): shown(value) for over, value in values.items()}
    return rows


def _detection_rows(detection: Mapping[str, Any]) -> dict[str, str]:
    return {
        "positions": str(sum(detection["labels"].values())),
        "forks among decided positions": shown(detection["fork_share"], "%"),
        "threshold of the distance": shown(detection["threshold"]),
        "precision above it": shown(detection["precision"], "%"),
        "recall above it": shown(detection["recall"], "%"),
        "harmless at or below it": shown(detection["unguided"]["harmless"], "%"),
        "harmless among false alarms": shown(detection["false_alarms"]["harmless"], "%"),
        **{f"AUC of {score.replace('_', ' ')}": shown(value) for score, value in detection["auc"].items()},
        **{
            f"AUC of {score}, {label} against harmless": shown(value)
            for label, areas in detection["auc_of"].items()
            for score, value in areas.items()
        },
    }


def _loss_table(detection: Mapping[str, Any]) -> Table:
    return Table(
        title="Token loss of high-loss positions by label (nats)",
        columns=("", "positions", *(f"{one * 100:g} %" for one in LOSS_QUANTILES)),
        rows=[
            (label, str(detection["labels"][label]), *map(shown, quantiles.values()))
            for label, quantiles in detection["loss_quantiles"].items()
            if quantiles
        ],
    )
