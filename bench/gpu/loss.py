"""The fused TOPD loss on one GPU against the naive loss (eager and under torch.compile) and Liger's fused JSD.

    python -m bench.gpu.loss [--tokens N] [--vocabulary V] [--width D] [--repeats R]

bfloat16, forward and backward on the same tensors, the sides in turns, seconds by the clock with the device
synchronised; ours is `learner.loss_kernel: triton` where Triton is installed. Memory is the allocator's peak beyond
the inputs and the gradients that must be returned. Liger as in `bench.loss`, the fastest of `LIGER`. The floor is three
bare products (6 N V D operations). A side that cannot run is left out, with its reason. Writes
bench/results/gpu_loss.json.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from bench.loss import in_turns, liger_loss, liger_losses, ratio_row, take_step
from bench.loss_problem import Problem, Shape, naive
from bench.report import Row, save
from topd_ray.objective import LossSpec

LIGER = ((True, 1024), (True, 4096), (False, 1024))
"""(compiled, tokens of a chunk); its defaults come first."""
Losses = dict[str, Callable[[], Tensor]]


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
    """The rows, and values, seconds and memory of all sides that run."""
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
    problem.floor()
    steps = {name: partial(take_step, problem, loss) for name, loss in losses.items()}
    seconds = in_turns({**steps, "floor": problem.floor}, repeats)
    return {
        "rows": _rows(seconds, memory),
        "values": values,
        "skipped": skipped,
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "seconds_spread": {name: [min(found), max(found)] for name, found in seconds.items()},
        "extra_megabytes": {name: found / 1e6 for name, found in memory.items()},
        "floor_operations": problem.shape.floor_operations,
        "shape": [problem.shape.tokens, problem.shape.vocabulary, problem.shape.width],
    }


def _losses(problem: Problem) -> tuple[Losses, dict[str, str]]:
    kernel: Literal["torch", "triton"] = "triton" if find_spec("triton") else "torch"
    compiled = torch.compile(naive, dynamic=False)
    arguments = (problem.hidden, problem.head, problem.batch)
    losses: Losses = {
        "ours": lambda: problem.ours(LossSpec(kernel=kernel)),
        "ours, chunks of 2048": lambda: problem.ours(LossSpec(kernel=kernel, chunk_tokens=2048)),
        "torch": lambda: problem.ours(LossSpec(kernel="torch")),
        "opd": lambda: problem.ours(LossSpec(method="opd", kernel=kernel)),
        "naive": lambda: naive(*arguments, **problem.counts),
    }
    skipped: dict[str, str] = {}
    if kernel == "triton":
        losses["compiled"] = lambda: compiled(*arguments, **problem.counts)
    else:
        skipped["compiled"] = "Triton is not installed"
    try:
        found = liger_losses(problem, liger_loss(), LIGER)
        losses |= {f"liger {name}": loss for name, loss in found.items()}
    except RuntimeError as error:
        skipped["liger"] = str(error)
    return losses, skipped


def _peak(problem: Problem, loss: Callable[[], Tensor]) -> tuple[float, int]:
    """A loss's value, and what its step takes beyond inputs and returned gradients."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = problem.step(loss())
    returned = problem.hidden.nbytes + problem.head.nbytes
    return value, torch.cuda.max_memory_allocated() - before - returned


def _rows(seconds: Mapping[str, list[float]], memory: Mapping[str, int]) -> list[Row]:
    """Ours against each peer that ran."""
    peer_of_torch = f"torch {torch.__version__}"
    ligers = [name for name in seconds if name.startswith("liger ")]
    rows: list[Row] = []
    if "naive" in memory:
        ratio = memory["ours"] / memory["naive"]
        rows.append(
            Row(
                name="gpu_loss_memory_vs_naive",
                ours=memory["ours"] / 1e6,
                peer=memory["naive"] / 1e6,
                peer_version=peer_of_torch,
                unit="MB",
                ratio=ratio,
                goal=0.1,
                repeats=1,
                spread=[ratio, ratio],
            )
        )
    if ligers:
        fastest = min(ligers, key=lambda name: statistics.median(seconds[name]))
        peer = f"liger-kernel {version('liger-kernel')}, {fastest.removeprefix('liger ')}"
        rows.append(ratio_row("gpu_loss_time_vs_liger", seconds, fastest, 0.8, peer))
    if "compiled" in seconds:
        rows.append(ratio_row("gpu_loss_time_vs_compiled_naive", seconds, "compiled", 1.0, peer_of_torch))
    rows.append(ratio_row("gpu_guidance_overhead", seconds, "opd", 1.03, "topd_ray, method opd"))
    rows.append(ratio_row("gpu_loss_time_vs_torch_path", seconds, "torch", None, "topd_ray, kernel torch"))
    floor = statistics.median(seconds["floor"])
    return [{**row, "floor": floor} if row["unit"] == "s" else row for row in rows]


if __name__ == "__main__":
    main()
