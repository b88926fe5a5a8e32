"""Lets the sides train in turns, and makes rows of what they did.

Each side is a process of its own, started and loaded one after the other. Then they make a few updates in turns: first
a turn to warm up, then the measured ones, in alternating order. Whoever waits is stopped (SIGSTOP, with all of its
workers): it neither disturbs the others nor works ahead. A turn's figure is its trained tokens (response tokens that
got a loss) over its wall time; the ratio is the median over the rounds of ours over TRL's.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from bench.end_to_end.task import CASES, PROMPTS_PER_UPDATE, THREADS, Case, read_rows, write_files
from bench.report import Row, save, version_of
from topd_ray.demo.tokenizer import render_prompt

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = {"ours": ROOT / ".venv/bin/python", "trl": ROOT / ".venv-bench/bin/python"}
START_LIMIT, TURN_LIMIT, END_LIMIT = 120.0, 300.0, 120.0
"""seconds a side may take to load, for a turn, and to grade its student"""

PATIENCE = {
    "RAY_grpc_keepalive_time_ms": "600000",
    "RAY_grpc_keepalive_timeout_ms": "600000",
    "RAY_grpc_client_keepalive_time_ms": "600000",
    "RAY_grpc_client_keepalive_timeout_ms": "600000",
    "RAY_health_check_timeout_ms": "600000",
}
"""Ray takes a process that does not answer for 20 s for dead, and frees what it held: a stopped one is not."""


class SideError(RuntimeError):
    """A side ended early or took too long."""


class Side:
    """One side's process. `name` is `trl`, or the objective of ours."""

    def __init__(self, name: str, case: Case, num_updates: int, folder: Path) -> None:
        self._name = name
        self._log = folder / f"{name}.log"
        self._connection, theirs = Pipe()
        module, method = ("trl", []) if name == "trl" else ("ours", [name])
        command = [
            str(PYTHONS[module]),
            "-m",
            f"bench.end_to_end.{module}",
            str(folder),
            str(theirs.fileno()),
            case.name,
        ]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **PATIENCE}
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # each side sets its own threads
            environment.pop(variable, None)
        started = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, str(num_updates), *method],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        try:
            self._receive(START_LIMIT)
        except BaseException:  # being terminated too: nothing else would end it
            self._end(signal.SIGTERM)
            raise
        self.start_seconds = time.perf_counter() - started
        self._signal_all(signal.SIGSTOP)

    def turn(self, num_updates: int) -> dict[str, Any]:
        """Let it make so many updates; returns its `Turn`."""
        self._signal_all(signal.SIGCONT)
        self._connection.send(num_updates)
        turn = self._receive(TURN_LIMIT)
        self._signal_all(signal.SIGSTOP)
        return {**turn, "num_updates": num_updates}

    def finish(self) -> dict[str, float]:
        """Let it go; returns its accuracies."""
        self._signal_all(signal.SIGCONT)
        self._connection.send(0)
        accuracies: dict[str, float] = self._receive(END_LIMIT)
        return accuracies

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._connection.close()
        self._end(None if kind is None else signal.SIGTERM)

    def _end(self, number: signal.Signals | None) -> None:
        """Wait until the process is gone, after a signal or by itself."""
        self._signal_all(signal.SIGCONT)
        if number is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _signal_all(self, number: signal.Signals) -> None:
        """Signal it and its workers, Ray's daemons included."""
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._process.pid)
            for one in (top, *top.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(number)

    def _receive(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise SideError(f"{self._name} took more than {seconds:.0f} s\n{self._tail()}")
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise SideError(f"{self._name} ended early\n{self._tail()}") from error

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])


def compare(case: Case) -> dict[str, Any]:
    """Train each objective of ours and TRL in turns. Raises SideError if one of them does not get through."""
    names = (*case.methods, "trl")
    num_updates = case.warmup_updates + case.num_turns * case.updates_per_turn
    with tempfile.TemporaryDirectory(prefix="end_to_end-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        write_files(case, num_updates, folder)
        sides = {name: stack.enter_context(Side(name, case, num_updates, folder)) for name in names}
        warm_up = {name: side.turn(case.warmup_updates) for name, side in sides.items()}
        rounds = []
        for number in range(case.num_turns):
            order = names if number % 2 == 0 else names[::-1]
            rounds.append({name: sides[name].turn(case.updates_per_turn) for name in order})
        floor = floor_rate(folder, statistics.mean(rounds[-1]["trl"]["lengths"]) * PROMPTS_PER_UPDATE)
        accuracy = {name: side.finish() for name, side in sides.items()}
    before = accuracy["trl"].pop("before")
    return {
        "case": case.name,
        "updates": num_updates,
        "floor_tokens_per_second": round(floor),
        "accuracy_before": round(before, 3),
        "sides": {
            name: side_result([turns[name] for turns in rounds], warm_up[name], accuracy[name]["after"])
            | {"start_seconds": round(sides[name].start_seconds, 1)}
            for name in names
        },
        "rates": [{name: rate(turn) for name, turn in turns.items()} for turns in rounds],
    }


def rate(turn: dict[str, Any]) -> float:
    """Trained tokens per second."""
    return float(turn["num_tokens"] / turn["seconds"])


def floor_rate(folder: Path, tokens_per_update: float) -> float:
    """Trained tokens per second if nothing but the weights' matrix products took time, at a bare product's speed.

    2 operations a weight and token: the student's once to write a token, three times to learn from it, the teacher's
    once to score it; prompts are read by both and pass through the learner. Attention is left out.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    rows = read_rows(folder / "train.jsonl")
    num_prompt = statistics.mean(len(render_prompt(tokenizer, row["prompt"])) for row in rows) * PROMPTS_PER_UPDATE
    student, teacher = (num_weights(folder / name) for name in ("student", "teacher"))
    operations = 2 * (tokens_per_update + num_prompt) * (4 * student + teacher)
    return tokens_per_update / (operations / operations_per_second())


def num_weights(model: Path) -> int:
    """Of all matrices."""
    with safe_open(model / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def operations_per_second() -> float:
    """Of the pair's largest product, [4096 tokens, 128] x [128, 384] in float32: the best of many."""
    torch.set_num_threads(THREADS)
    left, right = torch.randn(4096, 128), torch.randn(128, 384)
    seconds = []
    for _ in range(200):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    return 2 * 4096 * 128 * 384 / min(seconds)


def side_result(turns: Sequence[dict[str, Any]], warm_up: dict[str, Any], accuracy: float) -> dict[str, Any]:
    """A side's turns: medians per update, so that a turn that something else disturbed does not count."""
    num_tokens = sum(turn["num_tokens"] for turn in turns)
    num_responses = sum(turn["num_updates"] for turn in turns) * PROMPTS_PER_UPDATE
    seconds = statistics.median(turn["seconds"] / turn["num_updates"] for turn in turns)
    stages = {
        stage: statistics.median(turn["stages"][stage] / turn["num_updates"] for turn in turns)
        for stage in turns[0]["stages"]
    }
    lengths = sorted(length for turn in turns for length in turn["lengths"])
    result = {
        "tokens_per_second": round(statistics.median(map(rate, turns))),
        "seconds_per_update": round(seconds, 4),
        "stages": {stage: round(found, 4) for stage, found in stages.items()}
        | {"other": round(seconds - sum(stages.values()), 4)},
        "mean_length": round(num_tokens / num_responses, 1),
        "cut_share": round(sum(turn["num_cut"] for turn in turns) / num_responses, 3),
        "trained_tokens": num_tokens + warm_up["num_tokens"],
        "accuracy": round(accuracy, 3),
    }
    if lengths:
        quantiles = {percent: lengths[int(percent / 100 * (len(lengths) - 1))] for percent in (10, 50, 75, 90, 95, 100)}
        result["length_percentiles"] = quantiles
    return result


def rows(result: dict[str, Any], goal: float, peer_version: str) -> list[Row]:
    """One for each objective of ours; TOPD does more than TRL and has no goal."""
    made = []
    for name in result["sides"]:
        if name == "trl":
            continue
        ratios = [rates[name] / rates["trl"] for rates in result["rates"]]
        made.append(
            Row(
                name=f"end_to_end_{'' if name == 'opd' else f'{name}_'}vs_trl_{result['case']}",
                ours=result["sides"][name]["tokens_per_second"],
                peer=result["sides"]["trl"]["tokens_per_second"],
                peer_version=peer_version,
                unit="trained tokens/s",
                ratio=round(statistics.median(ratios), 3),
                goal=goal if name == "opd" else None,
                repeats=len(ratios),
                spread=[round(min(ratios), 3), round(max(ratios), 3)],
                floor=result["floor_tokens_per_second"],
            )
        )
    return made


def measure(cases: Sequence[Case] = tuple(CASES.values())) -> list[dict[str, Any]]:
    """Rows of all cases; details (stages, lengths, accuracies) go to results/end_to_end.json."""
    missing = [str(python) for python in PYTHONS.values() if not python.exists()]
    if missing:
        raise SideError(f"{' and '.join(missing)} is missing: `make bench` sets it up")
    # The sides live in sessions of their own, and may be stopped: being terminated must end them too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    results = []
    made: list[dict[str, Any]] = []
    for case in cases:
        results.append(compare(case))
        made += [dict(row) for row in rows(results[-1], case.goal, version_of("trl"))]
    save("end_to_end", {"cases": results})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description="Our `topd run` against TRL.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=("opd", "topd"), help="default: the case's own")
    parser.add_argument("--updates", type=int, help="measured updates of each side (default: the case's own)")
    arguments = parser.parse_args()
    cases = [CASES[name] for name in arguments.cases]
    if arguments.updates is not None:
        cases = [replace(one, num_turns=max(3, arguments.updates // one.updates_per_turn)) for one in cases]
    if arguments.methods is not None:
        cases = [replace(one, methods=tuple(arguments.methods)) for one in cases]
    try:
        made = measure(cases)
    except SideError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(made, indent=1))
