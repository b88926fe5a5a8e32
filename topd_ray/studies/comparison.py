"""`topd study ablation` and `topd study sweep`: every arm with every seed, then which is better, and how surely."""

from pathlib import Path
from typing import Literal

from topd_ray.config.schema import TopdConfig
from topd_ray.errors import TopdError
from topd_ray.pipeline.plan import Say
from topd_ray.studies.arms import ABLATION, chosen, sweep
from topd_ray.studies.results import CONFIG, claim_folder
from topd_ray.studies.runs import carry_out, plan_runs


def compare_arms(
    study: Literal["ablation", "sweep"], config: TopdConfig, folder: Path, say: Say, *, command: str
) -> str:
    """Run what is not finished, write results.json and pictures into `folder`; returns the table.

    The runs are written below run.root, in a folder of the study's name. Raises ConfigError for a folder of another
    config, RunInterrupted after a signal, and TopdError, after the results of all other runs are written, for runs that
    failed.
    """
    settings = config.studies.arms
    arms = chosen(ABLATION if study == "ablation" else sweep(config), settings)
    claim_folder(folder, config, ignore=("studies.arms",))
    runs = plan_runs(folder / CONFIG, config, arms, Path(config.run.root) / folder.name)
    say(f"{len(arms)} arms x {len(settings.seeds)} seeds, {settings.runs_at_once} at a time, below {config.run.root}/")
    failures = carry_out(runs, settings.runs_at_once, say)
    if failures:
        raise TopdError(
            f"{len(failures)} of {len(runs)} runs failed; the same command tries them again\n  "
            + "\n  ".join(str(failure) for failure in failures)
        )
    return ""
