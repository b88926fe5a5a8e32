"""The fused TOPD loss on one GPU: torch path, Triton path, the naive loss and the naive loss under torch.compile.

    python -m bench.gpu.loss [--tokens N] [--vocabulary V] [--width D] [--repeats R]

bfloat16, forward and backward on the same tensors, the sides in turns, seconds by the clock with the device
synchronised. Memory is the allocator's peak beyond the inputs and the gradients that must be returned. The floor is
three bare products (6 N V D operations). A side that cannot run is left out, with its reason. Writes
bench/results/gpu_loss.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench.loss_problem import Problem, Shape, naive
from bench.report import save
from topd_ray.objective import LossSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    shape = Shape(arguments.tokens, arguments.vocabulary, arguments.width)
    save("gpu_loss", measure(Problem(shape, "cuda"), arguments.repeats))


def measure(problem: Problem, repeats: int) -> dict[str, Any]:
    """Values, seconds, memory and ratios of all sides that run."""
    losses, skipped = _losses(problem)
    values: dict[str, float] = {}
    memory: dict[str, int] = {}
    for name, loss in list(losses.items()):
        try:
            problem.step(loss())  # warms up and compiles
            values[name], memory[name] = _peak(problem, loss)
        except Exception as error:  # no memory, no compiler, a kernel that fails: the other sides go on
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del losses[name]
            torch.cuda.empty_cache()
    steps: dict[str, Callable[[], Any]] = {
        name: (lambda loss=loss: problem.step(loss()))  # type: ignore[misc]
        for name, loss in losses.items()
    }
    steps["floor"] = problem.floor
    problem.floor()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {
        "values": values,
        "skipped": skipped,
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "seconds_spread": {name: [min(found), max(found)] for name, found in seconds.items()},
        "over_compiled": _over("compiled", seconds),
        "over_floor": _over("floor", seconds),
        "extra_megabytes": {name: found / 1e6 for name, found in memory.items()},
        "memory_over_naive": {name: found / memory["naive"] for name, found in memory.items() if "naive" in memory},
        "floor_operations": problem.shape.floor_operations,
        "shape": [problem.shape.tokens, problem.shape.vocabulary, problem.shape.width],
    }


def _losses(problem: Problem) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    compiled = torch.compile(naive)
    arguments = (problem.hidden, problem.head, problem.batch)
    losses: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: problem.ours(LossSpec(kernel="torch")),
        "naive": lambda: naive(*arguments, **problem.counts),
    }
    if find_spec("triton") is None:
        missing = "Triton is not installed"
        return losses, {"triton": missing, "triton_opd": missing, "compiled": missing}
    losses["triton"] = lambda: problem.ours(LossSpec(kernel="triton"))
    losses["triton_opd"] = lambda: problem.ours(LossSpec(kernel="triton", method="opd"))
    losses["compiled"] = lambda: compiled(*arguments, **problem.counts)
    return losses, {}


def _peak(problem: Problem, loss: Callable[[], Tensor]) -> tuple[float, int]:
    """A loss's value, and what its step takes beyond inputs and returned gradients."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = problem.step(loss())
    returned = problem.hidden.nbytes + problem.head.nbytes
    return value, torch.cuda.max_memory_allocated() - before - returned


def _over(peer: str, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median of the paired ratios of all sides to one."""
    if peer not in seconds:
        return {}
    return {
        name: statistics.median(ours / theirs for ours, theirs in zip(found, seconds[peer], strict=True))
        for name, found in seconds.items()
    }


if __name__ == "__main__":
    main()
