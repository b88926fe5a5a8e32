"""Kill workers and drivers of runs at random moments, and look what is left: `python -m tests.chaos KILLS [FOLDER]`.

Half of the kills hit a deterministic run, whose student has to be bitwise that of the same run left alone; the other
half an asynchronous one, whose weights go by broadcast. Both have to train on every trajectory exactly once, by the
ledger. A blow kills the driver, or some of the workers at once, as a failing node does; what it waits for is chosen at
random, so that blows fall into all of what a run does, restarts included. A driver that is gone is started again with
the same command.

Writes FOLDER/kills.jsonl, a line for every blow, and FOLDER/summary.json (default: runs/chaos); ends with 1 if anything
was lost.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors.numpy import load_file

from topd_ray.pipeline.ledger import read_ledger

ROOT = Path(__file__).parents[1]
NUM_PROMPTS = 192
PROMPTS_PER_STEP = 8
SETTINGS = (
    "run.epochs=1",
    "run.checkpoint_every=2",
    f"data.arithmetic.num_train={NUM_PROMPTS}",
    f"rollout.prompts_per_step={PROMPTS_PER_STEP}",
    "rollout.max_new_tokens=64",
    "learner.warmup_fraction=0",
    "resources.threads_per_learner=1",
    "data.heldout=null",
    "run.steps=null",
    "metrics.tensorboard=false",
    "teacher.verify=false",
    "faults.max_restarts=1000",  # failures are the test's here, not the worker's or the input's
    "faults.max_attempts=1000",
)
BROADCAST = ("weights.channel=broadcast", "resources.gpus_per_learner=0", "resources.gpus_per_rollout=0")
MODES = {"deterministic": ("run.deterministic=true",), "asynchronous": ("pipeline.max_staleness=2", *BROADCAST)}

ROLES = {"ray::RolloutWorker": "rollout", "ray::TeacherWorker": "teacher", "ray::LearnerWorker": "learner"}
WORKERS = tuple(ROLES.values())
BLOWS = (
    *[(role,) for role in ("driver", *WORKERS)],
    ("rollout", "teacher"),
    *3 * [WORKERS],
    *4 * [("driver", *WORKERS)],
)
"""Who falls at once. Without the learner a run goes on; with it, or the driver, it begins again from a checkpoint."""
Plan = Iterator[tuple[str, tuple[str, ...]]]
ACTIVE = ("writing", "guiding", "learning", "publishing", "saving")
RESTARTING = ("loading", "loading", "resuming")
PHASE_OF = {
    "RolloutWorker.setup": "loading",
    "TeacherWorker.setup": "loading",
    "LearnerWorker.setup": "loading",
    "LearnerWorker.load": "resuming",
    "LearnerWorker.preflight": "pre-flight",
    "LearnerWorker.export": "exporting",
    "LearnerWorker.save": "saving",
    "LearnerWorker.learn": "learning",
    "LearnerWorker.pack_weights": "publishing",
    "RolloutWorker.update_weights": "publishing",
    "TeacherWorker.look_ahead": "guiding",
}
"""What a run does while a worker is in a method, whose name Ray makes its process's title."""
ACTIVE_SECONDS = 1.0
"""Blows at a running run come up to this long after it is back (five updates or so), and then wait for their phase."""
LOADING_SECONDS = 8.0
"""Blows at a restart come up to this long after the blow before; a restart takes about 20 s on two cores."""
STUCK_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is left of a run that was killed again and again."""

    mode: str
    kills: int
    survived: int
    """kills after which the run went on to its end"""
    prompts: int
    trained_once: int
    lost: int
    doubled: int
    bitwise_equal: bool | None
    """None where the run is not deterministic"""
    failure: str | None
    """why the run did not come to its end, or what cannot be in its ledger"""
    seconds: float


class NotSurvivedError(RuntimeError):
    """A run that does not go on."""


class Victim:
    """A run that is started again whenever its driver is gone."""

    def __init__(self, root: Path, name: str, overrides: tuple[str, ...]) -> None:
        self.folder = root / name
        self._command = [
            *(sys.executable, "-m", "topd_ray", "run", "jobs/demo.yaml"),
            *(f"run.root={root}", f"run.name={name}", *SETTINGS, *overrides),
        ]
        self._log = (root / f"{name}.log").open("a")
        self._workers: dict[str, psutil.Process] = {}
        self._looked_at = 0.0
        self._has_learnt = False
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(self._command, cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT)
        self._workers.clear()
        self._has_learnt = False

    def is_done(self) -> bool:
        """Whether the run has come to its end; a driver that was killed is started again."""
        code = self.process.poll()
        if code is None:
            return False
        if code == 0:
            return True
        if code != -signal.SIGKILL:
            raise NotSurvivedError(f"the run ended with {code}, see {self._log.name}")
        self._start()
        return False

    @property
    def step(self) -> int:
        """The last update that is written down; -1 before the run has begun."""
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else -1

    def titles(self) -> dict[str, str]:
        """What each role's worker is in: `LearnerWorker.learn`, say, or `LearnerWorker` where it is idle."""
        found = {}
        for role, worker in list(self._workers.items()):
            title = _title(worker)
            if title is None:
                del self._workers[role]
            else:
                found[role] = title.removeprefix("ray::")
        if len(found) < len(ROLES) and time.monotonic() > self._looked_at + 0.2:
            self._looked_at = time.monotonic()
            for child in psutil.Process(self.process.pid).children(recursive=True):
                if (title := _title(child)) and (role := ROLES.get(title.split(".")[0])):
                    self._workers[role], found[role] = child, title.removeprefix("ray::")
        return found

    def phase(self) -> str:
        """What the run does, by the methods its workers are in; writing, where learner and teacher wait."""
        titles = self.titles()
        phases = {PHASE_OF[title] for title in titles.values() if title in PHASE_OF}
        self._has_learnt |= "learning" in phases
        if len(titles) < len(ROLES) or any(title.endswith("__init__") for title in titles.values()):
            return "loading"
        if any((self.folder / "checkpoints").glob(".step-*")):  # also while the driver reads, syncs and renames
            return "saving"
        otherwise = "writing" if self._has_learnt else "loading"
        return next((one for one in dict.fromkeys(PHASE_OF.values()) if one in phases), otherwise)

    def kill(self, roles: tuple[str, ...]) -> list[str]:
        """SIGKILL the driver or the workers of some roles that there are at the moment; returns whom.

        They are stopped first: a stopped process cannot end by itself, so it was the kill that ended it.
        """
        titles = self.titles()
        victims = {role: self._workers.pop(role) for role in roles if role in titles}
        self._has_learnt &= "learner" not in victims
        stopped = {role: worker for role, worker in victims.items() if _stop(worker)}
        for worker in stopped.values():
            worker.kill()
        if "driver" in roles:
            self.process.kill()
        _, alive = psutil.wait_procs(list(stopped.values()), timeout=10)
        assert not alive, f"{alive} survived SIGKILL"
        if "driver" in roles and self.process.wait() == -signal.SIGKILL:
            return [*stopped, "driver"]
        return list(stopped)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()


def _title(process: psutil.Process) -> str | None:
    """The title that Ray gave a process; None if there is no such process."""
    try:
        return next(iter(process.cmdline()), None)
    except psutil.Error:
        return None


def _stop(process: psutil.Process) -> bool:
    """SIGSTOP; false if the process had ended before."""
    try:
        process.suspend()
        deadline = time.monotonic() + 1.0
        while process.status() != psutil.STATUS_STOPPED:
            if process.status() == psutil.STATUS_ZOMBIE or time.monotonic() > deadline:
                return False
        return True
    except psutil.Error:
        return False


def blows(rng: random.Random) -> Plan:
    """What to wait for and whom to kill then: every other blow falls into a restart, the rest into each phase alike."""
    active: list[str] = []
    while True:
        active = active or rng.sample(ACTIVE, len(ACTIVE))
        yield active.pop(), rng.choice(BLOWS)
        yield rng.choice(RESTARTING), rng.choice(BLOWS)


def torment(
    root: Path, name: str, overrides: tuple[str, ...], kills: int, plan: Plan, rng: random.Random
) -> tuple[int, str | None]:
    """Run to the end under up to `kills` kills; returns how many there were, and why the run did not end well."""
    victim = Victim(root, name, overrides)
    wanted, roles = next(plan)
    done, waits_since, wait = 0, None, rng.uniform(0, ACTIVE_SECONDS)
    heard_at = time.monotonic()
    try:
        while not victim.is_done():
            now = time.monotonic()
            if now > heard_at + STUCK_SECONDS:
                raise NotSurvivedError(f"neither done nor to be killed for {STUCK_SECONDS:g} s, see {root / name}.log")
            phase = victim.phase() if done < kills else "past the last kill"
            if waits_since is None and (wanted in RESTARTING or phase in ACTIVE):
                waits_since = now
            missed = wanted in RESTARTING and phase in ACTIVE  # there was no restart, or it was quicker
            is_due = waits_since is not None and now > waits_since + wait
            if is_due and (phase == wanted or missed):
                titles, step = victim.titles(), victim.step
                all_there = set(roles) - {"driver"} <= set(titles)
                if all_there and (killed := victim.kill(roles[: kills - done])):
                    done += len(killed)
                    _note(root, name, phase, step, killed, titles)
                    wanted, roles = next(plan)
                    limit = {"loading": LOADING_SECONDS, "resuming": 0.0}.get(wanted, ACTIVE_SECONDS)
                    wait, waits_since, heard_at = rng.uniform(0, limit), None, time.monotonic()
            time.sleep(0.001 if is_due else 0.01)
    except NotSurvivedError as error:
        return done, str(error)
    finally:
        victim.close()
    return done, None


def _note(root: Path, name: str, phase: str, step: int, killed: list[str], titles: dict[str, str]) -> None:
    line = {"run": name, "phase": phase, "step": step, "killed": killed, "workers_were_in": titles}
    with (root / "kills.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{name}: {', '.join(killed)} killed while {phase}, after update {step}; {titles}", flush=True)


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(folder / "export" / "model.safetensors").items()}


def chaos(root: Path, kills: int, seed: int) -> list[Outcome]:
    """Runs until `kills` kills are spent, half of them in each mode."""
    rng = random.Random(seed)
    plan = blows(rng)
    half = kills // 2
    _, failure = torment(root, "left-alone", (*MODES["deterministic"], "--inline"), 0, plan, rng)
    if failure is not None:
        raise NotSurvivedError(f"without a single kill: {failure}")
    return [*_chaos(root, "deterministic", kills - half, plan, rng), *_chaos(root, "asynchronous", half, plan, rng)]


def _chaos(root: Path, mode: str, kills: int, plan: Plan, rng: random.Random) -> list[Outcome]:
    """Ends with the first run that does not survive."""
    outcomes: list[Outcome] = []
    spent = 0
    while spent < kills and not any(one.failure for one in outcomes):
        started = time.monotonic()
        name = f"{mode}-{len(outcomes)}"
        number, failure = torment(root, name, MODES[mode], kills - spent, plan, rng)
        spent += number
        report = read_ledger(root / name / "ledger.jsonl")
        equal = None
        if mode == "deterministic":
            equal = failure is None and weights(root / name) == weights(root / "left-alone")
        outcomes.append(
            Outcome(
                mode=mode,
                kills=number,
                survived=number if failure is None else number - 1,
                prompts=NUM_PROMPTS,
                trained_once=report.trained_once,
                lost=NUM_PROMPTS - report.trained_once - report.doubled,
                doubled=report.doubled,
                bitwise_equal=equal,
                failure=failure or "; ".join(report.faults) or None,
                seconds=round(time.monotonic() - started, 1),
            )
        )
        print(json.dumps(asdict(outcomes[-1])), flush=True)
    return outcomes


def summary(root: Path, outcomes: list[Outcome]) -> dict[str, Any]:
    sums = {key: sum(getattr(one, key) for one in outcomes) for key in ("kills", "survived", "prompts", "trained_once")}
    sums |= {key: sum(getattr(one, key) for one in outcomes) for key in ("lost", "doubled")}
    compared = [one.bitwise_equal for one in outcomes if one.bitwise_equal is not None]
    lines = [json.loads(line) for line in (root / "kills.jsonl").read_text().splitlines()]
    return {
        **sums,
        "bitwise_equal": bool(compared) and all(compared),
        "failures": [one.failure for one in outcomes if one.failure],
        "blows": len(lines),
        "kills_while": Counter(line["phase"] for line in lines for _ in line["killed"]),
        "killed": Counter(role for line in lines for role in line["killed"]),
        "runs": [asdict(one) for one in outcomes],
    }


def is_unharmed(found: dict[str, Any]) -> bool:
    """Whether a summary tells of runs that survived everything, and trained on each prompt exactly once."""
    is_once = found["trained_once"] == found["prompts"] and not found["lost"] and not found["doubled"]
    return is_once and found["survived"] == found["kills"] and found["bitwise_equal"] and not found["failures"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kills", type=int)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/chaos"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root = args.folder.absolute()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    outcomes = chaos(root, args.kills, args.seed)
    found = summary(root, outcomes)
    (root / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "runs"}))
    return 0 if is_unharmed(found) else 1


if __name__ == "__main__":
    sys.exit(main())
