"""Trained tokens per second of packed rows against padded batches, in the same learner, on the embedded student.

The peer differs from the product in its micro-batches alone: trajectories sorted by length, each padded on the right to
the longest of its micro-batch. Of several budgets of positions, padding included, it gets the fastest. Its attention is
PyTorch's causal one on [B, L]; no mask is needed, since no real position sees the padding. A second peer takes
trajectories as they come, as trainers that don't sort do.

Floor: the matrix products, 6 operations per weight and position (forward and backward), at the speed of a large product
on the same threads; packing computes no position but those of the trajectories, so nothing is left to remove there.
The ratio to a padded batch is then bound by its positions over ours, which is in the output as `positions`.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.report import save, versions
from topd_ray.config.schema import LearnerConfig, ObjectiveConfig, StudentConfig
from topd_ray.engines.attention import Segments
from topd_ray.engines.collate import MicroBatch, TokenBatch, num_positions
from topd_ray.engines.learner import LearnerEngine
from topd_ray.types import GuidedTrajectory, SparseTargets, TeacherScores, Trajectory, Windows

NUM_TRAJECTORIES = 64
NUM_TOKENS = 64
TOP_K = 16
BUDGET = 4096
PADDED_BUDGETS = (1024, 2048, 4096)
SORTED, UNSORTED = "padded, sorted", "padded, as they come"
THREADS = 2
REPEATS = 7
GOAL = 1.0
"""packed rows are never slower than the best padded batches"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PaddedTokens(TokenBatch):
    """Rows of [B, L], laid end to end as P = B * L positions."""

    shape: tuple[int, int]


class PaddedLearner(LearnerEngine):
    """The learner on padded micro-batches of at most `budget` positions, or of one trajectory."""

    def __init__(self, budget: int, *, sort: bool) -> None:
        super().__init__(**parts("one_trajectory"))
        self._budget = budget
        self._sort = sort
        student = self._engine.module

        def hidden_states(tokens: PaddedTokens) -> torch.Tensor:
            ids_BL = tokens.input_ids_P.view(tokens.shape)
            hidden_BLD: torch.Tensor = student.model.base_model(input_ids=ids_BL, use_cache=False)[0]
            return hidden_BLD.flatten(0, 1)

        student.hidden_states = hidden_states

    def _pack(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        lengths = [num_positions(one) for one in trajectories]
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index]) if self._sort else range(len(lengths))
        found: list[list[int]] = []
        for index in order:
            if found and (len(found[-1]) + 1) * max(lengths[one] for one in [*found[-1], index]) <= self._budget:
                found[-1].append(index)
            else:
                found.append([index])
        return found

    def _collate(
        self, trajectories: Sequence[GuidedTrajectory], part: Sequence[int], *, is_of_branches: bool = False
    ) -> MicroBatch:
        packed = super()._collate(trajectories, part, is_of_branches=is_of_branches)
        return replace(packed, tokens=padded(packed.tokens))


def padded(tokens: TokenBatch) -> PaddedTokens:
    lengths = tokens.segments.lengths
    longest = max(lengths)
    rows = torch.split(tokens.input_ids_P, list(lengths))
    ids_BL = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    shift = torch.arange(len(lengths)) * longest - tokens.segments.bounds[:-1].long()
    return PaddedTokens(
        trajectory_ids=tokens.trajectory_ids,
        num_response_tokens=tokens.num_response_tokens,
        segments=Segments.of((longest,) * len(lengths), tokens.input_ids_P.device),
        input_ids_P=ids_BL.flatten(),
        predictor_N=tokens.predictor_N + shift.repeat_interleave(torch.tensor(tokens.num_response_tokens)),
        sampled_ids_N=tokens.sampled_ids_N,
        shape=(len(lengths), longest),
    )


def parts(budget: Any) -> dict[str, Any]:
    """Arguments of a learner on the embedded student."""
    return {
        "student": StudentConfig(model="topd_ray/demo/pair/student", dtype="float32"),
        "learner": LearnerConfig(dtype="float32", zero_stage=0, max_tokens_per_micro_batch=budget, learning_rate=1e-4),
        "objective": ObjectiveConfig(importance_horizon=0),  # the same trajectories in every update
        "temperature": 1.0,
        "total_updates": 1000,
        "threads": THREADS,
    }


def short(draw: np.random.Generator) -> int:
    """Responses of the demo: 20 to 128 tokens."""
    return int(draw.integers(20, 129))


def long_tailed(draw: np.random.Generator) -> int:
    """Half of the responses below 63 tokens, a few at the cap of 512."""
    return min(512, 8 + int(draw.lognormal(4.0, 1.0)))


def make_batch(response_length: Callable[[np.random.Generator], int]) -> list[GuidedTrajectory]:
    """Random trajectories with prompts of 12 to 29 tokens; three of ten positions are guided by two tokens."""
    draw = np.random.default_rng(0)
    return [make_guided(draw, f"p{index:03d}/0/0", response_length(draw)) for index in range(NUM_TRAJECTORIES)]


def make_guided(draw: np.random.Generator, name: str, num_tokens: int) -> GuidedTrajectory:
    logits_TV = draw.normal(0.0, 2.0, (num_tokens, NUM_TOKENS))
    logprobs_TV = (logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))).astype(np.float32)
    topk_TK = np.argsort(-logprobs_TV, 1)[:, :TOP_K].astype(np.int32)
    response: NDArray[np.int32] = draw.integers(3, NUM_TOKENS, num_tokens).astype(np.int32)
    num_targets = (draw.random(num_tokens) < 0.3) * 2
    num_weights = int(num_targets.sum())
    return GuidedTrajectory(
        trajectory=Trajectory(
            trajectory_id=name,
            prompt_id=name,
            sample_index=0,
            epoch=0,
            policy_version=0,
            finish_reason="stop",
            prompt_ids=draw.integers(3, NUM_TOKENS, int(draw.integers(12, 30))).astype(np.int32),
            response_ids=response,
            behaviour_logprobs=np.full(num_tokens, -1.5, np.float32),
        ),
        scores=TeacherScores(
            topk_ids=topk_TK,
            topk_logprobs=np.take_along_axis(logprobs_TV, topk_TK, 1),
            sampled_logprobs=logprobs_TV[np.arange(num_tokens), response],
        ),
        targets=SparseTargets(
            indptr=np.concatenate([[0], np.cumsum(num_targets)]).astype(np.int64),
            token_ids=draw.integers(0, NUM_TOKENS, num_weights).astype(np.int32),
            weights=np.full(num_weights, 0.5, np.float32),
            entropy=np.where(num_targets > 0, np.log(2.0), 0.0).astype(np.float32),
        ),
        capped=np.zeros(num_tokens, np.bool_),
        windows=Windows.empty(),
    )


def run(name: str, batch: Sequence[GuidedTrajectory], sides: dict[str, LearnerEngine]) -> dict[str, Any]:
    """Seconds of an update on every side, in turns; the losses have to agree."""
    totals: dict[str, Any] = {
        "num_tokens": float(sum(one.trajectory.num_response_tokens for one in batch)),
        "num_guided": sum(one.targets.num_guided for one in batch),
        "num_trajectories": len(batch),
    }
    losses = {side: engine.loss(batch, **totals) for side, engine in sides.items()}
    np.testing.assert_allclose(list(losses.values()), losses["packed"], rtol=2e-3)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    computed: dict[str, int] = {}
    for repeat in range(REPEATS + 1):
        for side, engine in sides.items():
            started = time.perf_counter()
            engine.learn(batch, **totals)
            if repeat > 0:  # the first one warms up
                seconds[side].append(time.perf_counter() - started)
    for side, engine in sides.items():
        rows = engine._parts([one.trajectory for one in batch])
        computed[side] = sum(len(engine._collate(batch, row).tokens.input_ids_P) for row in rows)
    weights = sum(one.numel() for one in sides["packed"]._model.parameters() if one.ndim == 2)
    return {
        "name": name,
        "losses": losses,
        "tokens": totals["num_tokens"],
        "positions": computed,
        "seconds": seconds,
        "floor_seconds": 6 * weights * computed["packed"] / operations_per_second(),
    }


def operations_per_second() -> float:
    """Of a float32 product of 2,048 x 2,048 matrices on the same threads."""
    left = torch.randn(2048, 2048)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(left, left)
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds)


def row(result: dict[str, Any], kind: str, suffix: str = "") -> dict[str, Any]:
    """Against the fastest budget of a kind of padding."""
    seconds, tokens = result["seconds"], result["tokens"]
    peer = min((side for side in seconds if side.startswith(kind)), key=lambda side: statistics.median(seconds[side]))
    ratios = [theirs / mine for mine, theirs in zip(seconds["packed"], seconds[peer], strict=True)]
    return {
        "name": f"{result['name']}{suffix}",
        "ours": round(tokens / statistics.median(seconds["packed"])),
        "peer": round(tokens / statistics.median(seconds[peer])),
        "peer_version": f"{peer}, torch {versions()['torch']}",
        "unit": "trained tokens/s",
        "ratio": round(statistics.median(ratios), 3),
        "goal": GOAL,
        "repeats": len(ratios),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "floor": round(tokens / result["floor_seconds"]),
    }


def measure_all() -> list[dict[str, Any]]:
    """Raw results of both length distributions."""
    torch.set_num_threads(THREADS)
    sides = {
        "packed": LearnerEngine(**parts(BUDGET)),
        **{f"{SORTED}, {budget}": PaddedLearner(budget, sort=True) for budget in PADDED_BUDGETS},
        **{f"{UNSORTED}, {budget}": PaddedLearner(budget, sort=False) for budget in PADDED_BUDGETS},
    }
    found = [run(f"packing_{kind.__name__}", make_batch(kind), sides) for kind in (short, long_tailed)]
    for engine in sides.values():
        engine.shutdown()
    return found


def rows_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row(result, kind, suffix) for kind, suffix in ((SORTED, ""), (UNSORTED, "_unsorted")) for result in results]


def measure() -> list[dict[str, Any]]:
    """Rows `packing_short` and `packing_long_tailed`, then the same against unsorted padding."""
    return rows_of(measure_all())


if __name__ == "__main__":
    results = measure_all()
    save("packing", {"rows": rows_of(results), "results": results})
