"""A comparison of arms as tables and as pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topd_ray.studies.comparison.arms import OPD, PAPER, PAPER_COST, START, TOPD
from topd_ray.studies.pictures import BLUE, RED, picture
from topd_ray.studies.tables import Table

CURVES, DIFFERENCES = "learning_curves.png", "differences.png"
_PALETTE = ("#edae49", "#66a182", "#2e4057", "#8d6a9f", "#a67c52", "#5fa8d3", "#bc4b51", "#9aa05b")
_STYLES = ("-", "--", ":")
_AXES = (("steps", "updates"), ("tokens", "trained tokens"), ("seconds", "seconds of updates"))


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Who is better, in percent and points; at what cost; and against TOPD."""
    rows: Mapping[str, Any] = figures["arms"]
    teacher = "" if figures["teacher"] is None else f"; teacher {_percent(figures['teacher'])}"
    updates = f"after {figures['num_updates']} updates"
    end = Table(
        title=f"pass@1 (%) on {figures['num_prompts']} prompts {updates}, and points above OPD{teacher}",
        columns=("arm", "greedy", "- OPD", "seeds above", "sampled", "- OPD", "seeds above", "paper"),
        rows=[
            (name, *_against(row, "greedy", OPD), *_against(row, "sampled", OPD), _percent(row.get("paper"), 1))
            for name, row in rows.items()
        ],
    )
    learnt = {name: row for name, row in rows.items() if name != START}
    work = Table(
        title="Greedy pass@1 (%) at equal trained tokens, and the work of all updates",
        columns=(
            *("arm", "at tokens", "pass@1", "- OPD", "seeds above"),
            *("trained tokens", "scored tokens", "windows", "capped", "s"),
        ),
        rows=[
            (
                *(name, *_at_equal_tokens(row["equal_tokens"])),
                *(f"{row[key]:,.0f}" for key in ("trained_tokens", "scored_tokens", "windows")),
                f"{100 * row['capped']:.1f} %",
                f"{row['update_seconds']:,.0f}",
            )
            for name, row in learnt.items()
        ],
    )
    others = Table(
        title=f"Points above TOPD {updates}",
        columns=("arm", "greedy", "seeds above", "sampled", "seeds above"),
        rows=[
            (name, *_against(row, "greedy", TOPD)[1:], *_against(row, "sampled", TOPD)[1:])
            for name, row in learnt.items()
            if name != TOPD
        ],
    )
    return [end, work, *([others] if TOPD in rows and others.rows else [])]


def paper_notes(figures: Mapping[str, Any]) -> list[str]:
    """The arms of the paper by their greedy pass@1, and what TOPD costs, here and there."""
    rows = figures["arms"]
    ours = {name: row["pass_at_1"]["greedy"]["value"] for name, row in rows.items() if name in PAPER}
    notes = [
        f"order here, whether by much or not: {_order(ours)}",
        f"order in the paper: {_order({name: PAPER[name] for name in ours})}",
    ]
    if TOPD in rows:
        cost = rows[TOPD]["update_seconds"] / rows[OPD]["update_seconds"]
        notes.append(f"TOPD's updates take {cost:.2f} times OPD's seconds, in the paper {PAPER_COST}.")
    return notes


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
        axes[1].xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e3:,.0f} k")
        axes[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
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


def _against(row: Mapping[str, Any], measure: str, other: str) -> tuple[str, str, str]:
    """pass@1, the paired difference to `other` with its interval, and how many of the seeds have more than it."""
    value = _percent(row["pass_at_1"][measure]["value"])
    return value, *_difference(row["minus"].get(other, {}).get(measure))


def _at_equal_tokens(found: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    if found is None:
        return "-", "-", "-", "-"
    return f"{found['tokens']:,}", _percent(found["pass_at_1"]["value"]), *_difference(found["minus_opd"])


def _difference(found: Mapping[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    interval = "" if found["low"] is None else f" [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return f"{100 * found['value']:+.1f}{interval}", f"{found['seeds_above']} of {found['n']}"


def _percent(share: float | None, scale: float = 100.0) -> str:
    return "-" if share is None else f"{scale * share:.1f}"


def _scaled(values: Any) -> list[float]:
    return [100.0 * value for value in values]


def _order(values: Mapping[str, float]) -> str:
    return " > ".join(sorted(values, key=lambda name: -values[name]))
