"""`topd probe`: do high-loss tokens announce futures that part? (figures 2, 4 and 6 of the paper)

    rollouts drawn  ->  student engine closed  ->  teacher scores, continues, compares  ->  figures, pictures, examples

Both engines run in this process, one after the other, so the weights of one model only are in memory.
"""

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from topd_ray.config.load import dump_config
from topd_ray.config.schema import TopdConfig
from topd_ray.data.tokenizer import check_same_vocabulary, load_tokenizer
from topd_ray.pipeline.checkpoint import write_whole
from topd_ray.pipeline.plan import Say
from topd_ray.studies.futures import Distances, open_teacher
from topd_ray.studies.labelling import find_labeller
from topd_ray.studies.parts import Parts
from topd_ray.studies.probe.columns import Probed
from topd_ray.studies.probe.examples import examples_page, find_examples
from topd_ray.studies.probe.figures import PAPER, find_figures
from topd_ray.studies.probe.notes import notes_of
from topd_ray.studies.probe.pictures import draw_pictures
from topd_ray.studies.probe.report import tables
from topd_ray.studies.probe.rows import SCHEMA, Prober, loss_of
from topd_ray.studies.report import EXAMPLES
from topd_ray.studies.results import Results, claim_folder, save_results
from topd_ray.studies.rollouts import Rollouts, first_requests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNRELATED = (
    *("run.name", "run.root", "run.steps", "run.epochs", "run.resume", "run.checkpoint_every", "run.keep_checkpoints"),
    *("data.heldout", "data.arithmetic.num_heldout"),
    *("near_future.transport", "near_future.false_alarm_quantile", "near_future.quantile_window", "near_future.plan"),
    *("objective", "learner", "buffer", "pipeline", "faults", "weights", "evaluation", "metrics", "resources"),
    *("teacher.verify", "teacher.num_workers", "rollout.num_workers", "rollout.prompts_per_step"),
    *("studies.probe.num_examples", "studies.local_correction", "studies.arms"),
)
"""Fields that no row of a probe depends on."""


def probe(config: TopdConfig, out: Path, command: str, say: Say) -> Results:
    """Probe the config's pair; results.json, pictures, examples.md and all rows in `out`.

    Goes on where an earlier session stopped. Raises ConfigError for models of different vocabularies and for a folder
    of another config, DataError for prompts that cannot be used and where no position of some kind was found.
    """
    loss_of(config.near_future)
    check_same_vocabulary(config.student, config.teacher)
    tokenizer = load_tokenizer(config.student)
    requests = first_requests(config, tokenizer, config.studies.probe.num_trajectories, say)
    claim_folder(out, "probe", config, UNRELATED)
    rollouts = Rollouts(out / "rows", requests, config.studies.probe.trajectories_per_part)
    rows = Parts(out / "rows", "positions", rollouts.num_parts, SCHEMA.names)
    rollouts.draw(config, say)
    _look(config, tokenizer, rollouts, rows, say)
    results = _conclude(config, tokenizer, rollouts, rows, out, command)
    say(f"{out}/: results.json, {EXAMPLES}, {', '.join(results.pictures)}; memory up to {_peak_gib():.1f} GiB")
    return results


def _look(config: TopdConfig, tokenizer: "PreTrainedTokenizerBase", rollouts: Rollouts, rows: Parts, say: Say) -> None:
    """Let the teacher look from the positions of all rollouts that it has not seen yet."""
    missing = rows.missing()
    if not missing:
        return
    rows.begin()
    say(f"loading {config.teacher.model}, which looks ahead")
    with open_teacher(config) as engine:
        prober = Prober(
            config.near_future,
            engine,
            Distances(config),
            config.run.seed,
            find_labeller(config, tokenizer),
        )
        with tqdm(total=rollouts.num_parts, desc="looking ahead", unit="part", disable=None, leave=False) as progress:
            progress.update(rollouts.num_parts - len(missing))
            for index in missing:
                engine.forget_prefixes()
                rows.write(index, prober.look(rollouts.read(index)))
                progress.update()


def _conclude(
    config: TopdConfig,
    tokenizer: "PreTrainedTokenizerBase",
    rollouts: Rollouts,
    rows: Parts,
    out: Path,
    command: str,
) -> Results:
    """Figures, pictures and examples of all rows, written to `out`."""
    table = rows.read_all()
    probed = Probed.of(table)
    figures = find_figures(probed, config)
    examples = find_examples(
        table,
        probed,
        config.near_future.false_alarm_quantile,
        config.studies.probe.num_examples,
        {one.trajectory_id: one for index in range(rollouts.num_parts) for one in rollouts.read(index)},
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)),
    )
    write_whole(out / EXAMPLES, examples_page(examples))
    results = Results(
        study="probe",
        command=command,
        seeds=[config.run.seed],
        seconds=rollouts.seconds() + rows.seconds(),
        commits=rollouts.commits() | rows.commits(),
        figures={**figures.to_json(), "paper": PAPER, "examples": [one.to_json() for one in examples]},
        tables=tables(figures),
        pictures=draw_pictures(out, probed, figures),
        notes=notes_of(figures),
        config=dump_config(config),
    )
    save_results(out, results)
    return results


def _peak_gib() -> float:
    """Most memory this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1024**3
