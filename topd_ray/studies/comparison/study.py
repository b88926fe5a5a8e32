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
from topd_ray.data.tokenizer import check_same_vocabulary, load_tokenizer
from topd_ray.errors import TopdError
from topd_ray.pipeline.checkpoint import write_whole
from topd_ray.pipeline.plan import Say, load_heldout
from topd_ray.studies.comparison.arms import ABLATION, OPD, PAPER, START, TOPD, Arm, chosen, sweep
from topd_ray.studies.comparison.learning import Floats, Learning, read_learning
from topd_ray.studies.comparison.report import draw, paper_notes, tables
from topd_ray.studies.comparison.runs import StudyRun, carry_out, plan_runs
from topd_ray.studies.results import CONFIG, Results, claim_folder, save_results
from topd_ray.studies.statistics import FEWEST_SEEDS, bootstrap_crossed, coverage_of_seeds

Study = Literal["ablation", "sweep"]
MEASURES = ("greedy", "sampled")
"""pass@1 after the last update: at evaluation.temperature (0: greedy), and of answers drawn as rollouts are."""

ROWS = "runs.jsonl"
"""One line a run, beside results.json."""

Marks = Mapping[int, Floats]
"""share of right answers to each prompt [P], by seed"""


def compare_arms(study: Study, config: TopdConfig, folder: Path, say: Say, *, command: str) -> str:
    """Run what is not finished, write results.json and pictures into `folder`; returns the tables.

    The runs are written below run.root, in a folder of the study's name. Raises ConfigError for a folder of another
    config, for vocabularies that differ and for held-out prompts that cannot be graded; RunInterrupted after a signal;
    and TopdError, after the results of all other runs are written, for runs that failed.
    """
    settings = config.studies.arms
    arms = chosen(ABLATION if study == "ablation" else sweep(config), settings)
    root = Path(config.run.root) / folder.name
    runs = plan_runs(folder / CONFIG, config, arms, root)
    check_same_vocabulary(config.student, config.teacher)
    load_heldout(config, load_tokenizer(config.student), lambda line: None)
    claim_folder(folder, study, config, ignore=("studies",))
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
            *(paper_notes(figures) if study == "ablation" else []),
            *_notes(arms, learnings, config.studies.arms.runs_at_once),
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
    marks = {START: _start(learnings[OPD]), **{name: _marks(of_arm) for name, of_arm in learnings.items()}}
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
            **(_work(learnings[name], learnings[OPD]) if name in learnings else {}),
        }
        for name in (START, *(arm.name for arm in arms))
        if name in marks
    }
    teachers = [one.teacher for one in learnings[OPD].values() if one.teacher is not None]
    return {
        "arms": rows,
        "num_prompts": len(next(iter(learnings[OPD].values())).sampled_after_P),
        "num_updates": next(iter(learnings[OPD].values())).curve[-1].step,
        "teacher": float(np.mean(teachers)) if teachers else None,
    }


def _start(of_opd: Mapping[int, Learning]) -> dict[str, Marks]:
    return {
        "greedy": {seed: one.curve[0].marks_P for seed, one in of_opd.items()},
        "sampled": {seed: one.sampled_before_P for seed, one in of_opd.items()},
    }


def _marks(of_arm: Mapping[int, Learning]) -> dict[str, Marks]:
    return {
        "greedy": {seed: one.curve[-1].marks_P for seed, one in of_arm.items()},
        "sampled": {seed: one.sampled_after_P for seed, one in of_arm.items()},
    }


def _equal_tokens(of_arm: Mapping[int, Learning], of_opd: Mapping[int, Learning]) -> dict[str, Any] | None:
    """`tokens`, `pass_at_1` there, and `minus_opd`; None where the first evaluation on the way of one was later."""
    tokens = min(one.curve[-1].tokens for of in (of_arm, of_opd) for one in of.values())
    mine, opd = _marks_at(of_arm, tokens), _marks_at(of_opd, tokens)
    if len(mine) < len(of_arm) or len(opd) < len(of_opd):
        return None
    minus_opd = None if of_arm is of_opd else _difference(mine, opd)
    return {"tokens": tokens, "pass_at_1": bootstrap_crossed(_table(mine)).to_json(), "minus_opd": minus_opd}


def _marks_at(learnt: Mapping[int, Learning], tokens: int) -> dict[int, Floats]:
    return {seed: marks_P for seed, one in learnt.items() if (marks_P := one.at(tokens)) is not None}


def _minus(mine: Mapping[str, Marks], others: Mapping[str, Marks]) -> dict[str, Any]:
    """Paired differences by measure."""
    found = {measure: _difference(mine[measure], others[measure]) for measure in MEASURES}
    return {measure: difference for measure, difference in found.items() if difference is not None}


def _difference(mine: Marks, others: Marks) -> dict[str, Any] | None:
    """Paired, over the seeds that both have; None where there is no such seed."""
    seeds = sorted(set(mine) & set(others))
    if not seeds:
        return None
    paired = {seed: mine[seed] - others[seed] for seed in seeds}
    per_seed = _means(paired)
    return {
        **bootstrap_crossed(_table(paired)).to_json(),
        "per_seed": per_seed,
        "seeds_above": sum(value > 0 for value in per_seed.values()),
        "seeds_below": sum(value < 0 for value in per_seed.values()),
    }


def _work(of_arm: Mapping[int, Learning], of_opd: Mapping[int, Learning]) -> dict[str, Any]:
    """What an arm's runs did, means over seeds, and their learning curves."""
    every = list(of_arm.values())
    steps = sorted(set.intersection(*({point.step for point in one.curve} for one in every)))
    curves = [[point for point in one.curve if point.step in steps] for one in every]  # an interrupt may cost a point
    pass_SE = np.array([[point.marks_P.mean() for point in curve] for curve in curves])
    return {
        "equal_tokens": _equal_tokens(of_arm, of_opd),
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


def _notes(arms: Sequence[Arm], learnings: Mapping[str, Mapping[int, Learning]], at_once: int) -> list[str]:
    """What a reader of the tables must know."""
    num_seeds = max(len(of_arm) for of_arm in learnings.values())
    if num_seeds < FEWEST_SEEDS:
        few = f"{num_seeds} seeds: no intervals, which need {FEWEST_SEEDS}."
    else:
        few = (
            f"{num_seeds} seeds: where these differ more than prompts do, an interval holds the true mean in "
            f"{coverage_of_seeds(num_seeds):.0%} of cases, not in 95 %. Read it with the seeds above."
        )
    notes = [
        few,
        f"{len(arms) - 1} arms are compared, each interval by itself: some of so many exclude 0 by chance.",
        "At equal tokens, arm and OPD are read once they were trained on as many as the shortest run of the two, which "
        "is in the middle of a longer one's schedule: linear between evaluations, never before the first on the way.",
    ]
    if any("near_future.guidance_context=teacher" in arm.overrides for arm in arms):
        notes.append(
            "Trained tokens are those of responses. In the teacher's context the learner has the tokens of each "
            "divergent window besides, after their prefix, which no column counts but seconds."
        )
    begun = [one.curve[0].marks_P.mean() for of_arm in learnings.values() for one in of_arm.values()]
    if max(begun) > min(begun):
        notes.append(f"The student before its first update differs between runs by {max(begun) - min(begun):.2%}.")
    if at_once > 1:
        notes.append(
            f"{at_once} runs at a time: minutes add up those of all runs, and seconds are of a shared machine."
        )
    return notes


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
