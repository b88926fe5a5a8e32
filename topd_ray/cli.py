"""The command line: `topd run`, `topd submit`, `topd eval`, `topd probe`, `topd study`, `topd doctor`.

Exit codes: 0 done, 1 failed while running, 2 bad input, 128 + n stopped by signal n.
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from topd_ray.config.load import check_inputs, dump_config, load_config
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import ConfigError, DataError, RunInterrupted, TopdError

_STUDY = "Repeat an experiment of the paper on a pair of your own; the same command goes on where it stopped."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command given by `arguments` (default: the process's own); return the exit code."""
    args = _arguments(arguments)
    try:
        return int(args.command(args))
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunInterrupted as error:
        print(f"{error}", file=sys.stderr)
        return 128 + (signal.SIGTERM if "SIGTERM" in str(error) else signal.SIGINT)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    except TopdError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; what the last checkpoint holds is safe", file=sys.stderr)
        return 1


def run_command(args: argparse.Namespace) -> int:
    """Train a student."""
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        print(dump_config(config), end="")
        return 0
    check_inputs(config)
    if args.inline and config.metrics.prometheus:
        raise ConfigError(
            "metrics.prometheus: found true with --inline, where no Ray agent exports figures; right would be false"
        )
    say = Say()
    from topd_ray.pipeline.plan import plan_run
    from topd_ray.pipeline.run import run

    plan = plan_run(config, say)
    if args.inline:
        from topd_ray.pipeline.inline import InlineFleet as FleetClass
    else:
        from topd_ray.actors.fleet import RayFleet as FleetClass  # type: ignore[assignment]
    state = run(plan, FleetClass, say)
    print(summary_table(config, state.accuracy, state.step, state.trained_tokens, state.seconds))
    return 0


def submit_command(args: argparse.Namespace) -> int:
    """Train a student on a Ray cluster: send the working directory there, run as a job, follow its output."""
    config = load_config(args.config, args.overrides)
    from topd_ray.pipeline.submit import submit

    return submit(
        args.config,
        args.overrides,
        config,
        address=args.address,
        working_dir=args.working_dir,
        runtime_env=args.runtime_env,
        job_id=args.job_id,
        follow=not args.no_wait,
        say=Say(),
    )


def eval_command(args: argparse.Namespace) -> int:
    """Grade a model on the held-out prompts."""
    graded = [] if args.model is None else [f"student.model={args.model}", "student.revision=null"]
    config = load_config(args.config, [*args.overrides, *graded])
    check_inputs(config, training=False)
    from topd_ray.pipeline.evaluate import evaluate_model

    evaluate_model(config, Say())
    return 0


def local_correction_command(args: argparse.Namespace) -> int:
    """A few updates at one divergent point by OPD and by TOPD, then the continuation drawn again."""
    config = load_config(args.config, args.overrides)
    check_inputs(config, training=False)
    from topd_ray.studies.local_correction.study import local_correction

    local_correction(config, args.out, f"topd study local-correction {_shown(args)}", Say())
    return 0


def probe_command(args: argparse.Namespace) -> int:
    """Compare the near futures of student and teacher from high-loss, random and low-loss positions."""
    config = load_config(args.config, args.overrides)
    check_inputs(config, training=False)
    from topd_ray.studies.probe.study import probe

    results = probe(config, args.out, f"topd probe {_shown(args)}", Say())
    print("\n\n".join([*(table.text() for table in results.tables), *results.notes]))
    return 0


def ablation_command(args: argparse.Namespace) -> int:
    """The paper's ablation: OPD, both caps and TOPD, each with several seeds, from the same student."""
    return _compare("ablation", args)


def sweep_command(args: argparse.Namespace) -> int:
    """TOPD with one field changed at a time, and cheaper rivals, each with several seeds, from the same student."""
    return _compare("sweep", args)


def report_command(args: argparse.Namespace) -> int:
    """docs/results.md from the results of all studies."""
    from topd_ray.studies.report import write_report

    folders = write_report(args.studies, args.page)
    print(f"{args.page}: {', '.join(folder.name for folder in folders)}")
    return 0


def _compare(study: Literal["ablation", "sweep"], args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    from topd_ray.studies.comparison.study import compare_arms

    print(compare_arms(study, config, args.out, Say(), command=f"topd study {study} {_shown(args)}"))
    return 0


def _shown(args: argparse.Namespace) -> str:
    """What was typed, less where the results go."""
    return shlex.join([str(args.config), *args.overrides])


def doctor_command(args: argparse.Namespace) -> int:
    """Tell what this machine has and lacks, or whether a run folder is well."""
    from topd_ray.doctor.finding import show

    if args.run is None:
        from topd_ray.doctor.machine import report as report_machine

        return show(report_machine())
    from topd_ray.doctor.run import report as report_run

    return show(report_run(args.run))


class Say:
    """Lines of progress, each with the time since the start (minutes:seconds)."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        print(f"[{minutes:2d}:{seconds:02d}] {line}", flush=True)


def summary_table(
    config: TopdConfig, accuracy: dict[str, float], steps: int, trained_tokens: int, seconds: float
) -> str:
    """The result of a run, for a terminal."""
    rows = [("student before", "before"), ("student after", "after"), ("teacher", "teacher")]
    lines = [f"{'pass@1 on held-out prompts':<30}{config.objective.method:>8}"]
    lines += [f"  {label:<28}{accuracy[key]:>8.1%}" for label, key in rows if key in accuracy]
    lines.append(f"{steps} updates, {trained_tokens:,} trained tokens, {seconds:.0f} s; {config.run.folder}/")
    return "\n".join(lines)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments; argparse itself cannot take `key=value` after an option."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    strangers = [one for one in rest if one.startswith("-") or not hasattr(args, "overrides")]
    if strangers:
        parser.error(f"unrecognized arguments: {' '.join(strangers)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="topd", description="Trajectory-aware on-policy distillation on Ray.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="train a student", description=run_command.__doc__, allow_abbrev=False)
    _config_arguments(run)
    run.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    run.add_argument("--inline", action="store_true", help="the same steps in one process, for a debugger")
    run.set_defaults(command=run_command)
    submit = commands.add_parser(
        "submit", help="train a student on a Ray cluster", description=submit_command.__doc__, allow_abbrev=False
    )
    _config_arguments(submit)
    submit.add_argument("--address", help="its dashboard (default: RAY_API_SERVER_ADDRESS, or port 8265 here)")
    submit.add_argument("--working-dir", type=Path, default=Path(), help="folder to send, CONFIG in it (default: .)")
    submit.add_argument("--runtime-env", type=Path, metavar="YAML", help="a Ray runtime environment, for env_vars")
    submit.add_argument("--job-id", metavar="ID", help="the cluster's name for it (default: run.name and a number)")
    submit.add_argument("--no-wait", action="store_true", help="return once the cluster has the job")
    submit.set_defaults(command=submit_command)
    evaluate = commands.add_parser("eval", help="grade a model", description=eval_command.__doc__, allow_abbrev=False)
    _config_arguments(evaluate)
    evaluate.add_argument("--model", help="Hugging Face folder or hub name (default: student.model)")
    evaluate.set_defaults(command=eval_command)
    probe = commands.add_parser(
        "probe", help="where the futures part", description=probe_command.__doc__, allow_abbrev=False
    )
    _config_arguments(probe)
    probe.add_argument("--out", type=Path, default=Path("studies/probe"), help="its folder (default: studies/probe)")
    probe.set_defaults(command=probe_command)
    study = commands.add_parser("study", help="repeat an experiment of the paper", description=_STUDY)
    studies = study.add_subparsers(required=True, metavar="STUDY")
    _study(studies, "ablation", ablation_command)
    _study(studies, "sweep", sweep_command)
    _study(studies, "local-correction", local_correction_command)
    text = report_command.__doc__
    report = studies.add_parser("report", help=text, description=text, allow_abbrev=False)
    report.add_argument("--studies", type=Path, default=Path("studies"), help="folder of studies (%(default)s)")
    report.add_argument("--page", type=Path, default=Path("docs/results.md"), help="what to write (%(default)s)")
    report.set_defaults(command=report_command)
    doctor = commands.add_parser("doctor", help="what this machine or a run lacks", description=doctor_command.__doc__)
    doctor.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder of a run (default: this machine)")
    doctor.set_defaults(command=doctor_command)
    return parser


def _study(studies: Any, name: str, command: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """A subcommand of `topd study` that writes its results to studies/NAME."""
    text = (command.__doc__ or "").strip()
    parser: argparse.ArgumentParser = studies.add_parser(name, help=text, description=text, allow_abbrev=False)
    _config_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("studies") / name, help="folder of results (%(default)s)")
    parser.set_defaults(command=command)
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, see docs/config.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to set, for instance run.steps=10")
