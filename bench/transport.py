"""Exact transport and folding against loops over windows: POT's `emd2`, and SciPy's assignment solver where S == T.

    python -m bench.transport [--repeats R]

One thread; the sides take turns in one process. Costs are 1 - cosine of unit embeddings, alternately random, clustered,
and of the embedded pair's teacher, whose repeated tokens give ties: 218 windows of 50 x 50 as in the paper, 218 ragged
ones with lengths drawn from 5 to 50, and 240 of 8 x 8 as in the demo. Goals: at most 1/3 of `emd2` on square windows
and 2/3 on ragged ones. Distances of all sides must agree to 1e-9.

The floor is reading every cost and writing every plan entry once: 2 x 8 bytes x 545,000 = 8.7 MB for 218 x 50 x 50,
0.9 ms at 10 GB/s, timed here as one copy of the costs into a fresh array.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import ot
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

from bench.report import save
from topd_ray.objective import exact_transport, fold_windows, ground_cost, pad_windows, unfold, unit_embeddings

PAIR = Path(__file__).parents[1] / "topd_ray/demo/pair/teacher/model.safetensors"
NUM_TOKENS = 9688


class Problem:
    """Padded windows and their costs, and the same windows apart."""

    def __init__(self, num_windows: int, lengths: tuple[int, int]) -> None:
        rng = np.random.default_rng(0)
        parts = [_windows(weight, num_windows // 3 + 1, lengths, rng) for weight in _embeddings(rng)]
        order = rng.permutation(sum(len(costs) for costs, _ in parts))[:num_windows]
        costs = [cost for part, _ in parts for cost in part]
        self.costs = [costs[m] for m in order]
        self.student_lengths = np.array([len(cost) for cost in self.costs])
        self.teacher_lengths = np.array([cost.shape[1] for cost in self.costs])
        self.marginals = [(np.full(s, 1 / s), np.full(t, 1 / t)) for s, t in (cost.shape for cost in self.costs)]
        self.cost = np.zeros((num_windows, lengths[1], lengths[1]))
        for m, cost in enumerate(self.costs):
            self.cost[m, : len(cost), : cost.shape[1]] = cost
        ids = [teacher for _, windows in parts for teacher in windows]
        self.teacher_ids = pad_windows([ids[m] for m in order], lengths[1])[0]
        self.positions = np.sort(rng.choice(NUM_TOKENS - lengths[1], num_windows, replace=False))

    def ours(self) -> Any:
        return exact_transport(self.cost, self.student_lengths, self.teacher_lengths).distance_M.numpy()

    def emd2(self) -> Any:
        return [ot.emd2(a, b, cost) for (a, b), cost in zip(self.marginals, self.costs, strict=True)]

    def assignment(self) -> Any:
        return [cost[linear_sum_assignment(cost)].mean() for cost in self.costs]

    def copy(self) -> Any:
        return self.cost.copy()


class Folding:
    """The plans of a trajectory into sparse targets, at once and by the formula: one window, one entry at a time."""

    def __init__(self, problem: Problem) -> None:
        solved = exact_transport(problem.cost, problem.student_lengths, problem.teacher_lengths)
        self.problem, self.plan = problem, solved.plan_MST.numpy()

    def ours(self) -> Any:
        one = self.problem
        arguments = (self.plan, one.teacher_ids, one.positions, NUM_TOKENS, one.student_lengths, one.teacher_lengths)
        return fold_windows(*arguments)

    def formula(self) -> list[dict[int, float]]:
        rows: list[dict[int, float]] = [{} for _ in range(NUM_TOKENS)]
        for m, position in enumerate(self.problem.positions):
            num_student = int(self.problem.student_lengths[m])
            for i, j in zip(*np.nonzero(self.plan[m]), strict=True):
                row, token = rows[position + i], int(self.problem.teacher_ids[m, j])
                row[token] = row.get(token, 0.0) + self.plan[m, i, j] * num_student
        return rows

    def agree(self) -> None:
        for found, wanted in zip(unfold(self.ours()), self.formula(), strict=True):
            if found.keys() != wanted.keys() or any(abs(found[token] - wanted[token]) > 1e-5 for token in found):
                raise AssertionError(f"folded targets differ from the formula: {found} and {wanted}")


def measure(repeats: int = 9) -> list[dict[str, Any]]:
    """One row a comparison; `ratio` is the median of the paired ours / peer, `spread` their smallest and largest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    square, ragged, demo = Problem(218, (50, 50)), Problem(218, (5, 50)), Problem(240, (8, 8))
    for problem in (square, ragged, demo):
        np.testing.assert_allclose(problem.ours(), problem.emd2(), atol=1e-9, rtol=0)
    np.testing.assert_allclose(square.ours(), square.assignment(), atol=1e-9, rtol=0)
    folding = Folding(square)
    folding.agree()
    pot, scipy = f"POT {version('pot')}", f"SciPy {version('scipy')}"
    rows = [
        _compare("transport_exact_square", square.ours, square.emd2, pot, 1 / 3, repeats),
        _compare("transport_exact_ragged", ragged.ours, ragged.emd2, pot, 2 / 3, repeats),
        _compare("transport_exact_square_vs_assignment", square.ours, square.assignment, scipy, None, repeats),
        _compare("transport_exact_demo", demo.ours, demo.emd2, pot, 1 / 3, repeats),
        _compare("transport_exact_demo_vs_assignment", demo.ours, demo.assignment, scipy, None, repeats),
        _compare("transport_exact_square_vs_floor", square.ours, square.copy, "one copy of the costs", None, repeats),
        _compare("fold_square", folding.ours, folding.formula, "the formula, entry by entry", None, repeats),
    ]
    torch.set_num_threads(threads)
    return rows


def _compare(
    name: str, ours: Callable[[], Any], peer: Callable[[], Any], peer_version: str, goal: float | None, repeats: int
) -> dict[str, Any]:
    seconds: dict[Callable[[], Any], list[float]] = {ours: [], peer: []}
    for repeat in range(repeats + 1):  # the first warms both up
        for side in (ours, peer) if repeat % 2 else (peer, ours):
            started = time.perf_counter()
            side()
            if repeat:
                seconds[side].append(time.perf_counter() - started)
    ratios = [one / other for one, other in zip(seconds[ours], seconds[peer], strict=True)]
    return {
        "name": name,
        "ours": round(1e3 * statistics.median(seconds[ours]), 3),
        "peer": round(1e3 * statistics.median(seconds[peer]), 3),
        "peer_version": peer_version,
        "unit": "ms",
        "ratio": round(statistics.median(ratios), 4),
        "goal": goal,
        "repeats": repeats,
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
    }


def _embeddings(rng: np.random.Generator) -> list[torch.Tensor]:
    noise = torch.from_numpy(rng.normal(size=(1000, 64)))
    centres = torch.from_numpy(rng.normal(size=(40, 64)))[rng.integers(0, 40, 1000)]
    pair = next(weight for name, weight in load_file(PAIR).items() if "embed" in name)
    return [unit_embeddings(weight) for weight in (noise, centres + 0.3 * noise, pair)]


def _windows(
    embedding: torch.Tensor, num_windows: int, lengths: tuple[int, int], rng: np.random.Generator
) -> tuple[list[Any], Sequence[Any]]:
    """Costs [S, T] of random windows, and the teacher's ids."""
    sides = [
        [rng.integers(0, len(embedding), rng.integers(lengths[0], lengths[1] + 1)) for _ in range(num_windows)]
        for _ in range(2)
    ]
    (student, student_lengths), (teacher, teacher_lengths) = (pad_windows(side) for side in sides)
    cost = ground_cost(student, teacher, embedding, student_lengths, teacher_lengths).numpy()
    sizes = zip(cost, student_lengths, teacher_lengths, strict=True)
    return [np.ascontiguousarray(one[:s, :t]) for one, s, t in sizes], sides[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    save("transport", {"rows": measure(parser.parse_args().repeats)})


if __name__ == "__main__":
    main()
