"""Kill workers and drivers of runs at random moments, and look what is left: `python -m tests.chaos KILLS [FOLDER]`.

Half of the kills hit a deterministic run, whose student has to be bitwise that of the same run left alone; the other
half an asynchronous one. Both have to train on every trajectory exactly once, by the ledger. The victims are chosen at
random among the driver, rollout workers, teacher workers and learner ranks; a driver that is gone is started again with
the same command. Writes FOLDER/summary.json (default: runs/chaos) and ends with 1 if anything was lost.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

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
MODES = {"deterministic": ("run.deterministic=true",), "asynchronous": ("pipeline.max_staleness=2",)}
VICTIMS = ("driver", "ray::RolloutWorker", "ray::TeacherWorker", "ray::LearnerWorker")
PAUSE_SECONDS = 6.0
"""Mean time between two kills; shorter than a restart every now and then."""
STUCK_SECONDS = 240.0


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
    seconds: float


class Victim:
    """A run that is started again whenever its driver is gone."""

    def __init__(self, root: Path, name: str, overrides: tuple[str, ...]) -> None:
        self.folder = root / name
        self._command = [
            *(sys.executable, "-m", "topd_ray", "run", "jobs/demo.yaml"),
            *(f"run.root={root}", f"run.name={name}", *SETTINGS, *overrides),
        ]
        self._log = (root / f"{name}.log").open("a")
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT)

    def is_done(self) -> bool:
        """Whether the run has come to its end; a driver that was killed is started again."""
        code = self.process.poll()
        if code is None:
            return False
        if code == 0:
            return True
        if code > 0:
            raise RuntimeError(f"the run ended with {code}, see {self._log.name}")
        self.process = self._start()
        return False

    def kill(self, victim: str, rng: random.Random) -> bool:
        """SIGKILL one process of the run; false if there is none of the kind at the moment."""
        if victim == "driver":
            self.process.kill()
            self.process.wait()
            return True
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if child.cmdline()[:1] and child.cmdline()[0].startswith(victim):
                    found.append(child)
            except psutil.Error:
                continue
        if not found:
            return False
        try:
            rng.choice(found).kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()


def torment(root: Path, name: str, overrides: tuple[str, ...], kills: int, rng: random.Random) -> int:
    """Run to the end under up to `kills` kills; returns how many there were."""
    victim = Victim(root, name, overrides)
    done = 0
    try:
        next_kill = time.monotonic() + rng.expovariate(1 / PAUSE_SECONDS)
        heard_at, size = time.monotonic(), -1
        while not victim.is_done():
            if done < kills and time.monotonic() >= next_kill and victim.kill(rng.choice(VICTIMS), rng):
                done += 1
                next_kill = heard_at = time.monotonic()
                next_kill += rng.expovariate(1 / PAUSE_SECONDS)
            metrics = victim.folder / "metrics.jsonl"
            now = metrics.stat().st_size if metrics.exists() else 0
            if now != size:
                heard_at, size = time.monotonic(), now
            if time.monotonic() > heard_at + STUCK_SECONDS:
                raise RuntimeError(f"no update for {STUCK_SECONDS:g} s, see {root / name}.log")
            time.sleep(0.02)
    finally:
        victim.close()
    return done


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(folder / "export" / "model.safetensors").items()}


def chaos(root: Path, mode: str, kills: int, seed: int) -> list[Outcome]:
    """Runs of `mode` until `kills` kills are spent."""
    rng = random.Random(seed)
    outcomes: list[Outcome] = []
    spent = 0
    if mode == "deterministic":
        torment(root, "left-alone", MODES[mode], 0, rng)
    while spent < kills:
        started = time.monotonic()
        name = f"{mode}-{len(outcomes)}"
        number = torment(root, name, MODES[mode], kills - spent, rng)
        spent += number
        report = read_ledger(root / name / "ledger.jsonl")
        equal = weights(root / name) == weights(root / "left-alone") if mode == "deterministic" else None
        outcomes.append(
            Outcome(
                mode=mode,
                kills=number,
                survived=number,
                prompts=NUM_PROMPTS,
                trained_once=report.trained_once,
                lost=NUM_PROMPTS - report.trained_once - report.doubled,
                doubled=report.doubled,
                bitwise_equal=equal,
                seconds=round(time.monotonic() - started, 1),
            )
        )
        print(json.dumps(asdict(outcomes[-1])), flush=True)
    return outcomes


def summary(outcomes: list[Outcome]) -> dict[str, object]:
    sums = {key: sum(getattr(one, key) for one in outcomes) for key in ("kills", "survived", "prompts", "trained_once")}
    sums |= {key: sum(getattr(one, key) for one in outcomes) for key in ("lost", "doubled")}
    equal = all(one.bitwise_equal for one in outcomes if one.bitwise_equal is not None)
    return {**sums, "bitwise_equal": equal, "runs": [asdict(one) for one in outcomes]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kills", type=int)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/chaos"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root = args.folder.absolute()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    half = args.kills // 2
    outcomes = chaos(root, "deterministic", args.kills - half, args.seed)
    outcomes += chaos(root, "asynchronous", half, args.seed + 1)
    found = summary(outcomes)
    (root / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "runs"}))
    return 0 if found["bitwise_equal"] and not found["lost"] and not found["doubled"] else 1


if __name__ == "__main__":
    sys.exit(main())
