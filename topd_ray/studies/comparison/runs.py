"""The runs of a study: one for each arm and seed, each a process of its own, as many at a time as the config says.

A run is `topd run` on the study's config with overrides, so that a run that was cut short goes on from its checkpoint,
and a run folder of another config is refused.
"""

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from topd_ray.config.load import check_inputs, overridden
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import ConfigError
from topd_ray.pipeline.interrupt import Interrupt
from topd_ray.pipeline.plan import Say
from topd_ray.studies.comparison.arms import OPD, Arm

LOG = "study.log"
POLL_SECONDS = 0.2
STOP_SECONDS = 300.0
"""How long a run that is told to stop may take to write its checkpoint."""
EVALUATIONS = 10
"""Of a run, where evaluation.every is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """One arm with one seed."""

    arm: Arm
    seed: int
    config: TopdConfig
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def folder(self) -> Path:
        return self.config.run.folder

    def is_finished(self) -> bool:
        """Whether the run has made all its updates, and its last evaluations."""
        try:
            summary = json.loads((self.folder / "summary.json").read_text())
        except (OSError, ValueError):
            return False
        return bool(summary.get("steps") == self.config.run.steps and "after_sampled" in summary.get("accuracy", {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A run that did not end well."""

    run: StudyRun
    code: int

    def __str__(self) -> str:
        log = self.run.folder / LOG
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{self.run.name} ended with {self.code}: {lines[-1] if lines else 'it said nothing'} ({log})"


def plan_runs(path: Path, config: TopdConfig, arms: Sequence[Arm], root: Path) -> list[StudyRun]:
    """The runs of a study: all arms with the first seed, then with the next.

    `path` is where `config` will be, but for `studies`, which no run reads.

    Raises ConfigError, before anything runs, for an arm that the config does not allow, for a run folder of another
    config, where run.steps or data.heldout is unset, and for a seed that is there twice.
    """
    if config.run.steps is None or config.data.heldout is None:
        unset = "run.steps" if config.run.steps is None else "data.heldout"
        raise ConfigError(f"{unset}: found none, right would be one for all arms of a study")
    seeds = config.studies.arms.seeds
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"studies.arms.seeds: found {list(seeds)}, right would be every seed once")
    runs = []
    for seed in seeds:
        for arm in arms:
            overrides = (*_common(config), *arm.overrides, *_own(arm, seed, root))
            inline = ["--inline"] if config.studies.arms.runs_at_once > 1 else []
            command = (sys.executable, "-m", "topd_ray", "run", str(path), *overrides, *inline)
            try:
                run = StudyRun(arm=arm, seed=seed, config=overridden(config, overrides), command=command)
                check_inputs(run.config)
            except ConfigError as error:
                raise ConfigError(f"arm {arm.name}: {error}") from error
            runs.append(run)
    return runs


def carry_out(runs: Sequence[StudyRun], at_once: int, say: Say) -> list[Failure]:
    """Run all that are not finished; returns those that failed.

    After a signal the processes are told to stop, and waited for; raises RunInterrupted.
    """
    waiting = deque(run for run in runs if not run.is_finished())
    running: dict[subprocess.Popen[bytes], StudyRun] = {}
    failures: list[Failure] = []
    num_done = len(runs) - len(waiting)
    if num_done:
        say(f"{num_done} of {len(runs)} runs are finished already")
    with Interrupt() as interrupt:
        try:
            while waiting or running:
                interrupt.check()
                while waiting and len(running) < at_once:
                    run = waiting.popleft()
                    running[_start(run)] = run
                for process in [one for one in running if one.poll() is not None]:
                    run, code = running.pop(process), process.returncode
                    num_done += 1
                    if code == 0 and run.is_finished():
                        say(f"{num_done} of {len(runs)}: {_outcome(run)}")
                    else:
                        failures.append(Failure(run=run, code=code))
                        say(f"{num_done} of {len(runs)}: {failures[-1]}")
                time.sleep(POLL_SECONDS)
        finally:
            _stop(list(running), say)
    return failures


def _common(config: TopdConfig) -> tuple[str, ...]:
    """Fields of all arms: every run evaluates its student before, on the way and after, greedily and not."""
    assert config.run.steps is not None
    every = config.evaluation.every or max(1, config.run.steps // EVALUATIONS)
    threads = [f"resources.threads_per_{role}=1" for role in ("rollout", "teacher", "learner")]
    return (
        *("evaluation.before=true", "evaluation.after=true", f"evaluation.every={every}"),
        *(f"evaluation.sampled_runs={config.evaluation.sampled_runs or 1}", "run.resume=auto"),
        *(threads if config.studies.arms.runs_at_once > 1 else ()),
    )


def _own(arm: Arm, seed: int, root: Path) -> tuple[str, ...]:
    """Fields of one run. The teacher, which is the same in all, is evaluated by one arm."""
    return (
        f"run.root={json.dumps(str(root))}",
        f"run.name={arm.name}-seed{seed}",
        f"run.seed={seed}",
        f"evaluation.teacher={json.dumps(arm.name == OPD)}",
    )


def _start(run: StudyRun) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C reaches the study alone, which passes it on once."""
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if "--inline" in run.command else None
    with (run.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            run.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]], say: Say) -> None:
    if processes:
        say(f"{len(processes)} runs write their checkpoints; the same command goes on from them")
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _outcome(run: StudyRun) -> str:
    summary = json.loads((run.folder / "summary.json").read_text())
    greedy, sampled = (summary["accuracy"][key] for key in ("after", "after_sampled"))
    tokens, seconds = summary["trained_tokens"], summary["seconds"]
    return f"{run.name}: pass@1 {greedy:.1%}, sampled {sampled:.1%}, {tokens:,} tokens, {seconds:.0f} s"
