"""A comparison of arms as a table for a terminal, and as pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topd_ray.studies.arms import OPD, PAPER, START, TOPD
from topd_ray.studies.pictures import BLUE, RED, picture

CURVES, DIFFERENCES = "learning_curves.png", "differences.png"
_PALETTE = ("#edae49", "#66a182", "#2e4057", "#8d6a9f", "#a67c52", "#5fa8d3", "#bc4b51", "#9aa05b")
_STYLES = ("-", "--", ":")
_AXES = (("steps", "updates"), ("tokens", "trained tokens"), ("seconds", "seconds of updates"))


def table(study: str, figures: Mapping[str, Any]) -> str:
    """One line an arm, in percent and points: pass@1, the paired difference to OPD with its interval, and the work."""
    rows: Mapping[str, Any] = figures["arms"]
    compared = ("- opd", "95 %", "seeds")
    work = ("at equal tokens", "tokens", "seconds", *(["paper"] if study == "ablation" else []))
    lines = [("arm", "greedy", *compared, "sampled", *compared, *work)]
    lines += [(name, *_cells(row))[: len(lines[0])] for name, row in rows.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    teacher = "" if figures["teacher"] is None else f", teacher {figures['teacher']:.1%}"
    head = f"pass@1 (%) on {figures['num_prompts']} prompts after {figures['num_updates']} updates{teacher}"
    legend = f"seeds: above opd / all; at equal tokens: greedy, after {figures['equal_tokens']:,} trained tokens"
    if study != "ablation":
        return "\n".join([head, *shown, legend])
    ours = _order({name: row["pass_at_1"]["greedy"]["value"] for name, row in rows.items()})
    papers = _order({name: value for name, value in PAPER.items() if name in rows})
    return "\n".join([head, *shown, legend, f"order here:  {ours}", f"the paper's: {papers}"])


def draw(figures: Mapping[str, Any], folder: Path) -> list[str]:
    """The pictures, written into `folder`; their names."""
    rows = {name: row for name, row in figures["arms"].items() if name != START}
    with picture(folder / CURVES, columns=len(_AXES)) as axes:
        for one, (key, label) in zip(axes, _AXES, strict=True):
            for (name, row), (colour, style) in zip(rows.items(), _looks(rows), strict=True):
                curve = row["curve"]
                one.plot(curve[key], _scaled(curve["mean"]), style, color=colour, label=name, linewidth=1.4)
                one.fill_between(
                    curve[key],
                    _scaled(curve["lowest"]),
                    _scaled(curve["highest"]),
                    color=colour,
                    alpha=0.12,
                    linewidth=0,
                )
            one.set_xlabel(label)
            one.set_ylabel("pass@1 (%), mean and range over seeds")
        axes[0].legend(fontsize=7, frameon=False)
    compared = {name: row for name, row in rows.items() if name != OPD}
    if not compared:
        return [CURVES]
    with picture(folder / DIFFERENCES, columns=2, size=(5.0, 1.2 + 0.32 * len(compared))) as axes:
        for one, measure in zip(axes, ("greedy", "sampled"), strict=True):
            _bars(one, compared, measure)
    return [CURVES, DIFFERENCES]


def _bars(axes: Any, rows: Mapping[str, Any], measure: str) -> None:
    """Differences to OPD in points, the interval as a line, single seeds as dots."""
    names = list(rows)[::-1]
    for place, name in enumerate(names):
        found = rows[name]["minus"][OPD][measure]
        axes.barh(place, 100 * found["value"], color=BLUE if found["value"] > 0 else RED, height=0.55, alpha=0.75)
        if found["low"] is not None:
            axes.plot([100 * found["low"], 100 * found["high"]], [place, place], color="black", linewidth=1.4)
        seeds = _scaled(found["per_seed"].values())
        axes.plot(seeds, [place] * len(seeds), ".", color="black", markersize=4, alpha=0.6)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlabel(f"pass@1 {measure}, minus OPD (points)")


def _looks(rows: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A colour and a line style for each arm: OPD's and TOPD's own, then all combinations."""
    others = iter((colour, style) for style in _STYLES * len(rows) for colour in _PALETTE)
    own = {OPD: (RED, "-"), TOPD: (BLUE, "-")}
    return [own.get(name) or next(others) for name in rows]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What stands in an arm's line after its name."""
    pass_at_1 = row["pass_at_1"]
    return (
        *(_percent(pass_at_1["greedy"]), *_difference(row, "greedy")),
        *(_percent(pass_at_1["sampled"]), *_difference(row, "sampled")),
        _percent(pass_at_1.get("equal_tokens")),
        f"{row['trained_tokens']:,.0f}" if "trained_tokens" in row else "",
        f"{row['update_seconds']:.0f}" if "update_seconds" in row else "",
        f"{row['paper']:.1f}" if "paper" in row else "",
    )


def _difference(row: Mapping[str, Any], measure: str) -> tuple[str, str, str]:
    """To OPD: points, interval, and the seeds with more than it of all."""
    found = row["minus"].get(OPD, {}).get(measure)
    if found is None:
        return "", "", ""
    interval = "" if found["low"] is None else f"{100 * found['low']:+.1f} .. {100 * found['high']:+.1f}"
    return f"{100 * found['value']:+.1f}", interval, f"{found['seeds_above']}/{found['n']}"


def _percent(interval: Mapping[str, Any] | None) -> str:
    return "" if interval is None else f"{100 * interval['value']:.1f}"


def _scaled(values: Any) -> list[float]:
    return [100.0 * value for value in values]


def _order(values: Mapping[str, float]) -> str:
    return " > ".join(sorted(values, key=lambda name: -values[name]))
