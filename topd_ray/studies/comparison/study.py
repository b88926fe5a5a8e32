"""`topd study ablation` and `topd study sweep`: every arm with every seed, then which is better, and how surely.

Legend of axis suffixes: S seeds, P held-out prompts, E evaluations.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from topd_ray.config.load import dump_config
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import TopdError
from topd_ray.pipeline.checkpoint import write_whole
from topd_ray.pipeline.plan import Say
from topd_ray.studies.comparison.arms import ABLATION, OPD, PAPER, START, TOPD, Arm, chosen, sweep
from topd_ray.studies.comparison.learning import Floats, Learning, read_learning
from topd_ray.studies.comparison.report import draw, order_notes, tables
from topd_ray.studies.comparison.runs import StudyRun, carry_out, plan_runs
from topd_ray.studies.results import CONFIG, Results, claim_folder, save_results
from topd_ray.studies.statistics import FEWEST_SEEDS, bootstrap_crossed

Study = Literal["ablation", "sweep"]
MEASURES = ("greedy", "sampled", "equal_tokens")
"""pass@1: after the last update, at evaluation.temperature (0: greedy); then too, of answers drawn as rollouts are; and
at evaluation.temperature again, but once as many tokens are trained on as in the shortest run of all."""

ROWS = "runs.jsonl"
"""One line a run, beside results.json."""

Marks = Mapping[int, Floats]
"""share of right answers to each prompt [P], by seed"""


def compare_arms(study: Study, config: TopdConfig, folder: Path, say: Say, *, command: str) -> str:
    """Run what is not finished, write results.json and pictures into `folder`; returns the tables.

    The runs are written below run.root, in a folder of the study's name. Raises ConfigError for a folder of another
    config, RunInterrupted after a signal, and TopdError, after the results of all other runs are written, for runs that
    failed.
    """
    settings = config.studies.arms
    arms = chosen(ABLATION if study == "ablation" else sweep(config), settings)
    root = Path(config.run.root) / folder.name
    runs = plan_runs(folder / CONFIG, config, arms, root)
    claim_folder(folder, study, config, ignore=("studies.arms",))
    say(f"{len(arms)} arms x {len(settings.seeds)} seeds, {settings.runs_at_once} at a time; runs in {root}/")
    failures = carry_out(runs, settings.runs_at_once, say)
    shown = ""
    finished = [run for run in runs if run.is_finished()]
    if any(run.arm.name == OPD for run in finished):
        say(f"comparing {len(finished)} runs")
        shown = report(study, config, arms, finished, folder, command)
    if failures:
        print(shown)
        raise TopdError(
            f"{len(failures)} of {len(runs)} runs failed; the same command tries them again\n  "
            + "\n  ".join(str(failure) for failure in failures)
        )
    return shown


def report(
    study: Study, config: TopdConfig, arms: Sequence[Arm], runs: Sequence[StudyRun], folder: Path, command: str
) -> str:
    """Compare finished `runs`, of which some are of OPD; write the results, and return their tables."""
    learnings: dict[str, dict[int, Learning]] = {}
    for run in runs:
        learnings.setdefault(run.arm.name, {})[run.seed] = read_learning(run.folder)
    figures = compare(arms, learnings, paper=PAPER if study == "ablation" else {})
    missing = [
        f"{arm.name} (seeds {', '.join(map(str, lacking))})"
        for arm in arms
        if (lacking := [seed for seed in config.studies.arms.seeds if seed not in learnings.get(arm.name, {})])
    ]
    results = Results(
        study=study,
        command=command,
        seeds=config.studies.arms.seeds,
        seconds=round(sum(one.seconds for of_arm in learnings.values() for one in of_arm.values()), 1),
        commits={one.commit for of_arm in learnings.values() for one in of_arm.values()},
        figures=figures,
        tables=tables(figures),
        pictures=draw(figures, folder),
        notes=[
            *(order_notes(figures) if study == "ablation" else []),
            *_notes(learnings),
            f"{len(arms) - 1} arms are compared, each interval holding 95 % by itself: some of so many exclude 0 by "
            "chance. At equal tokens, an arm with more of them is read in the middle of its schedule.",
            *([f"no finished run of {'; '.join(missing)}"] if missing else []),
        ],
        config=dump_config(config),
    )
    save_results(folder, results)
    _write_rows(folder / ROWS, learnings)
    return "\n".join([*(f"{table.text()}\n" for table in results.tables), *results.notes, f"{folder}/"])


def compare(
    arms: Sequence[Arm], learnings: Mapping[str, Mapping[int, Learning]], paper: Mapping[str, float]
) -> dict[str, Any]:
    """The figures of results.json; `learnings` by arm and seed."""
    equal_tokens = min(one.curve[-1].tokens for of_arm in learnings.values() for one in of_arm.values())
    marks = {START: _start(learnings[OPD])}
    marks |= {name: _marks(of_arm, equal_tokens) for name, of_arm in learnings.items()}
    about = {arm.name: {"text": arm.text, "overrides": arm.overrides} for arm in arms}
    about[START] = {"text": "before the first update", "overrides": ()}
    rows = {
        name: {
            **about[name],
            "pass_at_1": {measure: bootstrap_crossed(_table(of)).to_json() for measure, of in marks[name].items()},
            "per_seed": {measure: _means(of) for measure, of in marks[name].items()},
            "minus": {
                other: _minus(marks[name], marks[other]) for other in (OPD, TOPD) if other in marks and other != name
            },
            **({"paper": paper[name]} if name in paper else {}),
            **(_work(learnings[name]) if name in learnings else {}),
        }
        for name in (START, *(arm.name for arm in arms))
        if name in marks
    }
    teachers = [one.teacher for one in learnings[OPD].values() if one.teacher is not None]
    return {
        "arms": rows,
        "equal_tokens": equal_tokens,
        "num_prompts": len(next(iter(learnings[OPD].values())).sampled_after_P),
        "num_updates": next(iter(learnings[OPD].values())).curve[-1].step,
        "teacher": float(np.mean(teachers)) if teachers else None,
    }


def _start(of_opd: Mapping[int, Learning]) -> dict[str, Marks]:
    return {
        "greedy": {seed: one.curve[0].marks_P for seed, one in of_opd.items()},
        "sampled": {seed: one.sampled_before_P for seed, one in of_opd.items()},
    }


def _marks(of_arm: Mapping[int, Learning], equal_tokens: int) -> dict[str, Marks]:
    return {
        "greedy": {seed: one.curve[-1].marks_P for seed, one in of_arm.items()},
        "sampled": {seed: one.sampled_after_P for seed, one in of_arm.items()},
        "equal_tokens": {seed: one.at(equal_tokens) for seed, one in of_arm.items()},
    }


def _minus(mine: Mapping[str, Marks], others: Mapping[str, Marks]) -> dict[str, Any]:
    """Paired differences, over the seeds that both have."""
    differences = {}
    for measure in MEASURES:
        if measure not in mine or measure not in others:
            continue
        seeds = sorted(set(mine[measure]) & set(others[measure]))
        if not seeds:
            continue
        paired = {seed: mine[measure][seed] - others[measure][seed] for seed in seeds}
        per_seed = _means(paired)
        differences[measure] = {
            **bootstrap_crossed(_table(paired)).to_json(),
            "per_seed": per_seed,
            "seeds_above": sum(value > 0 for value in per_seed.values()),
            "seeds_below": sum(value < 0 for value in per_seed.values()),
        }
    return differences


def _work(of_arm: Mapping[int, Learning]) -> dict[str, Any]:
    """What an arm's runs did, means over seeds, and their learning curves."""
    every = list(of_arm.values())
    steps = sorted(set.intersection(*({point.step for point in one.curve} for one in every)))
    curves = [[point for point in one.curve if point.step in steps] for one in every]  # an interrupt may cost a point
    pass_SE = np.array([[point.marks_P.mean() for point in curve] for curve in curves])
    return {
        "trained_tokens": float(np.mean([one.curve[-1].tokens for one in every])),
        "update_seconds": float(np.mean([one.curve[-1].seconds for one in every])),
        "scored_tokens": float(np.mean([one.scored_tokens for one in every])),
        "windows": float(np.mean([one.num_windows for one in every])),
        "capped": float(np.mean([one.capped for one in every])),
        "curve": {
            "steps": steps,
            "tokens": np.mean([[point.tokens for point in curve] for curve in curves], 0).tolist(),
            "seconds": np.mean([[point.seconds for point in curve] for curve in curves], 0).round(2).tolist(),
            "mean": pass_SE.mean(0).tolist(),
            "lowest": pass_SE.min(0).tolist(),
            "highest": pass_SE.max(0).tolist(),
        },
    }


def _notes(learnings: Mapping[str, Mapping[int, Learning]]) -> list[str]:
    num_seeds = max(len(of_arm) for of_arm in learnings.values())
    few = f"{num_seeds} seeds: no intervals, which need {FEWEST_SEEDS}"
    begun = [one.curve[0].marks_P.mean() for of_arm in learnings.values() for one in of_arm.values()]
    apart = f"the student before its first update differs between runs by {max(begun) - min(begun):.2%}"
    return [*([few] if num_seeds < FEWEST_SEEDS else []), *([apart] if max(begun) > min(begun) else [])]


def _write_rows(path: Path, learnings: Mapping[str, Mapping[int, Learning]]) -> None:
    rows = [
        {
            "arm": name,
            "seed": seed,
            "updates": one.curve[-1].step,
            "trained_tokens": one.curve[-1].tokens,
            "update_seconds": round(one.curve[-1].seconds, 1),
            "seconds": one.seconds,
            "before": float(one.curve[0].marks_P.mean()),
            "after": float(one.curve[-1].marks_P.mean()),
            "before_sampled": float(one.sampled_before_P.mean()),
            "after_sampled": float(one.sampled_after_P.mean()),
        }
        for name, of_arm in learnings.items()
        for seed, one in of_arm.items()
    ]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def _table(marks: Marks) -> Floats:
    return np.stack([marks[seed] for seed in sorted(marks)])


def _means(marks: Marks) -> dict[str, float]:
    return {str(seed): float(marks[seed].mean()) for seed in sorted(marks)}
