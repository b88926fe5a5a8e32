"""The fused TOPD loss against the naive one (eager and under torch.compile) and Liger's fused JSD, on the CPU.

    python -m bench.loss

Forward and backward on the same tensors, the sides in turns in one process, ratios of neighbours. The naive loss makes
all logits in float32, takes log-softmax, gathers the same support, and leaves the rest to autograd; its divergence and
guidance are the same functions of the same numbers. Liger computes the reverse KL (its beta = 1) over the whole
vocabulary; its teacher is a head of width 8, so that the teacher's product costs it next to nothing (8/512 of one), and
our teacher comes as top-64 log-probs. It is given the fastest of two chunk sizes, compiled (its default) and not.

The floor is three products (logits, and their gradient back into hidden states and weight), 6 N V D operations, timed
as three bare matmuls. Peak memory is what a fresh child process's resident set gains while the loss runs, beyond the
gradients that must be returned. All of it takes about four minutes on two cores.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from bench.loss_problem import SPEC, Problem, Shape, naive
from bench.report import Row
from topd_ray.objective import LossSpec

SHAPES = {"": Shape(2048, 32768, 512), "_large_vocabulary": Shape(512, 151936, 512)}
REPEATS, LIGER_REPEATS, MEMORY_REPEATS = 5, 3, 3
LIGER_CHUNKS = (256, 1024)
THREADS = 2


def measure() -> list[Row]:
    """One row per comparison and shape, ratio = ours / peer: median of the paired ratios, [smallest, largest]."""
    liger = liger_loss()
    torch.set_num_threads(THREADS)
    rows: list[Row] = []
    for suffix, shape in SHAPES.items():
        rows += [{**row, "name": row["name"] + suffix} for row in _measure_shape(shape, liger)]
    return rows


def liger_loss() -> Any:
    """Liger's loss class. Raises RuntimeError where it is not installed."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise RuntimeError(f"liger-kernel is missing ({error}): `make bench` installs it, in .venv-bench") from error
    return LigerFusedLinearJSDLoss


def _measure_shape(shape: Shape, liger: Any) -> list[Row]:
    problem = Problem(shape)
    compiled = torch.compile(naive, dynamic=False)
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: problem.step(problem.ours()),
        "opd": lambda: problem.step(problem.ours(LossSpec(method="opd"))),
        "compiled": lambda: problem.step(compiled(problem.hidden, problem.head, problem.batch, **problem.counts)),
        "floor": problem.floor,
    }
    values = {name: side() for name, side in sides.items()}  # also warms up and compiles
    if abs(values["ours"] - values["compiled"]) > 1e-4 * abs(values["compiled"]):
        raise RuntimeError(f"the sides disagree on the loss: {values}")
    seconds = in_turns(sides, REPEATS)
    setting, fastest = _fastest_liger(problem, liger)
    against_liger = in_turns({"ours": sides["ours"], "liger": fastest}, LIGER_REPEATS)
    floor = statistics.median(seconds["floor"])
    torch_version = f"torch {torch.__version__}"
    return [
        _memory_row(shape, torch_version),
        ratio_row(
            "loss_time_vs_liger", against_liger, "liger", 0.8, f"liger-kernel {version('liger-kernel')}, {setting}"
        ),
        {**ratio_row("loss_time_vs_compiled_naive", seconds, "compiled", 1.0, torch_version), "floor": floor},
        ratio_row("guidance_overhead", seconds, "opd", 1.03, "topd_ray, method opd"),
    ]


def in_turns(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, one after the other, again and again; every other time in the opposite order."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides)[:: 1 if repeat % 2 else -1]:
            started = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio_row(name: str, seconds: Mapping[str, list[float]], peer: str, goal: float | None, peer_version: str) -> Row:
    """The seconds of `ours` against those of `peer`, pair by pair."""
    ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds[peer], strict=True)]
    return {
        "name": name,
        "ours": round(statistics.median(seconds["ours"]), 4),
        "peer": round(statistics.median(seconds[peer]), 4),
        "peer_version": peer_version,
        "unit": "s",
        "ratio": round(statistics.median(ratios), 4),
        "goal": goal,
        "repeats": len(ratios),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
    }


def _memory_row(shape: Shape, torch_version: str) -> Row:
    """Autograd's peak comes in two sizes at random, an [N, V] tensor apart: the naive loss gets the smaller one."""
    ours = extra_bytes(shape, "ours")
    peers = [extra_bytes(shape, "naive") for _ in range(MEMORY_REPEATS)]
    return {
        "name": "loss_memory_vs_naive",
        "ours": round(ours / 1e6, 1),
        "peer": round(min(peers) / 1e6, 1),
        "peer_version": torch_version,
        "unit": "MB",
        "ratio": round(ours / min(peers), 4),
        "goal": 0.1,
        "repeats": len(peers),
        "spread": [round(ours / max(peers), 4), round(ours / min(peers), 4)],
    }


def liger_losses(problem: Problem, liger: Any, settings: Iterable[tuple[bool, int]]) -> dict[str, Callable[[], Tensor]]:
    """Liger's loss on the problem's tensors for each (compiled, tokens of a chunk)."""
    options: dict[str, Any] = {"device": problem.device, "dtype": problem.hidden.dtype}
    teacher = [torch.randn(rows, 8, **options) for rows in (problem.shape.tokens, problem.shape.vocabulary)]
    labels = torch.zeros(problem.shape.tokens, dtype=torch.long, device=problem.device)  # none is to be ignored
    losses: dict[str, Callable[[], Tensor]] = {}
    for compiled, chunk in settings:
        module = liger(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled, chunk_size=chunk)
        name = f"{'compiled' if compiled else 'eager'}, chunks of {chunk}"
        losses[name] = partial(module, problem.hidden, problem.head, *teacher, labels)
    return losses


def _fastest_liger(problem: Problem, liger: Any) -> tuple[str, Callable[[], float]]:
    """Its fastest setting, and a step with it."""
    losses = liger_losses(problem, liger, product((True, False), LIGER_CHUNKS))
    found = {name: partial(take_step, problem, loss) for name, loss in losses.items()}
    in_turns(found, 1)  # compiles
    seconds = in_turns(found, 1)
    fastest = min(found, key=lambda name: seconds[name][0])
    return fastest, found[fastest]


def take_step(problem: Problem, loss: Callable[[], Tensor]) -> float:
    return problem.step(loss())


def extra_bytes(shape: Shape, side: str) -> int:
    """Peak memory of one step beyond inputs and returned gradients, in a process of its own."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(shape, side, sender))
    process.start()
    sender.close()  # so that a child that dies ends the wait
    found = int(receiver.recv())
    process.join()
    return found


def _measure_memory(shape: Shape, side: str, sender: Connection) -> None:
    torch.set_num_threads(THREADS)

    def loss(problem: Problem) -> Tensor:
        if side == "ours":
            return problem.ours(SPEC)
        return naive(problem.hidden, problem.head, problem.batch, **problem.counts)

    warm = Problem(Shape(64, shape.vocabulary, shape.width))  # load libraries
    warm.step(loss(warm))
    del warm
    problem = Problem(shape)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # pages that are free already must not be used again unseen
    reset_peak()
    before = resident("VmRSS")
    problem.step(loss(problem))
    sender.send(resident("VmHWM") - before - problem.hidden.nbytes - problem.head.nbytes)


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


if __name__ == "__main__":
    for one in measure():
        print(one)
