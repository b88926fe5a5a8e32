"""Positions of a rollout, and the near futures from there: what the teacher would write beside what the student wrote.

Axes: T response tokens of one trajectory, M positions, S student and T teacher tokens of a window (see transport.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from topd_ray.config.schema import NearFutureConfig
from topd_ray.engines.look_ahead import Compared, continue_candidates
from topd_ray.engines.seeds import stable_seed
from topd_ray.engines.teacher import TeacherEngine
from topd_ray.errors import ConfigError
from topd_ray.objective import select_candidates, token_loss
from topd_ray.objective.candidates import Ranking
from topd_ray.studies.futures import Distances
from topd_ray.studies.labelling import Labeller
from topd_ray.types import Float32, Int32, TeacherScores, Trajectory

Kind = Literal["high", "random", "low"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_IDS = pa.list_(pa.field("item", pa.int32(), nullable=False))
_COLUMNS: dict[str, pa.DataType] = {
    "trajectory_id": pa.string(),
    "prompt_id": pa.string(),
    "kind": pa.string(),  # high, random or low loss
    "position": pa.int32(),  # of the response, from 0; both windows start there
    "num_response_tokens": pa.int32(),
    "finish_reason": pa.string(),  # of the rollout: stop or length
    "loss": pa.float32(),  # by near_future.ranking (nats)
    "student_logprob": pa.float32(),  # of the student's token there (nats)
    "teacher_logprob": pa.float32(),
    "teacher_entropy": pa.float32(),  # of the teacher's top-k and one rest: at most the whole entropy (nats)
    "distance": pa.float32(),  # exact optimal transport between the windows
    "position_cost": pa.float32(),  # mean ground cost of the i-th student token and the i-th teacher token
    "student_ids": _IDS,
    "teacher_ids": _IDS,
    "label": pa.string(),  # what the mismatch means, where that is known by construction; else empty
}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items()])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Looked:
    """Positions of one trajectory: all their kinds, and each once."""

    trajectory: Trajectory
    scores: TeacherScores
    losses_T: Float32
    kinds: dict[Kind, Int32]

    @property
    def distinct(self) -> Int32:
        """Ascending."""
        return np.unique(np.concatenate(list(self.kinds.values()))).astype(np.int32)


def loss_of(config: NearFutureConfig) -> Ranking:
    """What ranks the positions. Raises ConfigError where no loss does."""
    if config.ranking == "random":
        raise ConfigError(
            "near_future.ranking: found random, by which no position has a high loss; right would be teacher_nll or "
            "sampled_kl"
        )
    return config.ranking


def choose_positions(losses_T: Float32, config: NearFutureConfig, rng: np.random.Generator) -> dict[Kind, Int32]:
    """The candidates that training would take, as many positions drawn from all, and as many of the lowest losses.

    High: `select_candidates`. Random: without replacement from all positions, so they may be high or low ones as well.
    Low: among those that are not high; of equal losses (there are many near 0) one is drawn. Fewer only where the
    response is too short. All ascending.
    """
    high = select_candidates(losses_T, config.candidate_fraction, config.min_distance)
    drawn = rng.choice(losses_T.size, size=high.size, replace=False)
    others = np.setdiff1d(np.arange(losses_T.size), high)
    lowest = others[np.lexsort((rng.random(others.size), losses_T[others]))][: high.size]
    return {"high": high, "random": np.sort(drawn).astype(np.int32), "low": np.sort(lowest).astype(np.int32)}


class Prober:
    """Looks from positions of trajectories into the near future, with an engine that is the caller's."""

    def __init__(
        self,
        config: NearFutureConfig,
        engine: TeacherEngine,
        distances: Distances,
        seed: int,
        labeller: Labeller | None = None,
    ) -> None:
        self._config = config
        self._engine = engine
        self._distances = distances
        self._seed = seed
        self._labeller = labeller

    def look(self, trajectories: Sequence[Trajectory]) -> pa.Table:
        """A row for each position of each kind, trajectory by trajectory."""
        scores = self._engine.score([(one.prompt_ids, one.response_ids) for one in trajectories])
        looked = [self._choose(*pair) for pair in zip(trajectories, scores, strict=True)]
        positions = [one.distinct for one in looked]
        windows = continue_candidates(self._engine, self._config, trajectories, positions, self._seed)
        students = [
            one.trajectory.response_ids[position : position + self._config.window]
            for one, positions_M in zip(looked, positions, strict=True)
            for position in positions_M.tolist()
        ]
        compared = self._compare(students, [ids for continued in windows for ids in continued])
        rows = []
        for one, positions_M in zip(looked, positions, strict=True):
            futures = {position: next(compared) for position in positions_M.tolist()}
            for kind, chosen in one.kinds.items():
                rows += [self._row(one, kind, position, futures[position]) for position in chosen.tolist()]
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def _choose(self, trajectory: Trajectory, scores: TeacherScores) -> Looked:
        losses_T = token_loss(scores.sampled_logprobs, trajectory.behaviour_logprobs, loss_of(self._config))
        rng = np.random.default_rng(stable_seed(self._seed, "probe", trajectory.trajectory_id))
        kinds = choose_positions(losses_T, self._config, rng)
        return Looked(trajectory=trajectory, scores=scores, losses_T=losses_T, kinds=kinds)

    def _compare(self, students: Sequence[Int32], teachers: Sequence[Int32]) -> Iterator[dict[str, Any]]:
        """The columns that are of the two windows."""
        found: list[tuple[float, float]] = []
        for group in self._distances.compare(students, teachers):
            found += zip(group.solved.distance_M.tolist(), position_costs(group), strict=True)
        for student_ids, teacher_ids, (distance, cost) in zip(students, teachers, found, strict=True):
            yield {
                "distance": distance,
                "position_cost": cost,
                "student_ids": student_ids.tolist(),
                "teacher_ids": teacher_ids.tolist(),
            }

    def _row(self, one: Looked, kind: Kind, position: int, future: dict[str, Any]) -> dict[str, Any]:
        trajectory, scores = one.trajectory, one.scores
        return {
            "trajectory_id": trajectory.trajectory_id,
            "prompt_id": trajectory.prompt_id,
            "kind": kind,
            "position": position,
            "num_response_tokens": trajectory.num_response_tokens,
            "finish_reason": trajectory.finish_reason,
            "loss": float(one.losses_T[position]),
            "student_logprob": float(trajectory.behaviour_logprobs[position]),
            "teacher_logprob": float(scores.sampled_logprobs[position]),
            "teacher_entropy": coarse_entropy(scores.topk_logprobs[position]),
            **future,
            "label": self._label(trajectory, position, future) if kind == "high" else "",
        }

    def _label(self, trajectory: Trajectory, position: int, future: dict[str, Any]) -> str:
        if self._labeller is None:
            return ""
        return self._labeller(trajectory, position, future["student_ids"], future["teacher_ids"])


def position_costs(compared: Compared) -> list[float]:
    """mean over i < min(S, T) of cost[i, i], for each pair of windows: what the identity as the plan would cost."""
    common_M = np.minimum(compared.student_lengths_M, compared.teacher_lengths_M)
    diagonal_MK = compared.cost_MST.diagonal(dim1=1, dim2=2).cpu().numpy()
    inside_MK = np.arange(diagonal_MK.shape[1]) < common_M[:, None]
    costs: list[float] = ((diagonal_MK * inside_MK).sum(1) / common_M).tolist()
    return costs


def coarse_entropy(topk_logprobs_K: Float32) -> float:
    """Entropy (nats) of the top-k tokens and one bucket for all others; the whole entropy where top-k is everything."""
    logprobs = topk_logprobs_K.astype(np.float64)
    probabilities = np.exp(logprobs[np.isfinite(logprobs)])
    masses = np.append(probabilities, max(0.0, 1.0 - probabilities.sum()))
    masses = masses[masses > 0.0]
    return float(-(masses * np.log(masses)).sum()) + 0.0
