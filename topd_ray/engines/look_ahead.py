"""From trajectories to guided trajectories: score, look into the near future, compare, fold (paper, section 4).

Axes: T response tokens of one trajectory, M windows (candidates), V vocabulary, D embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from topd_ray.config.schema import NearFutureConfig, ObjectiveConfig
from topd_ray.engines.seeds import stable_seed
from topd_ray.engines.teacher import TeacherEngine
from topd_ray.objective.candidates import select_candidates, token_loss
from topd_ray.objective.targets import Window, cap_mask, classify, fold_windows
from topd_ray.objective.transport import ground_cost, solve_windows, unit_embeddings
from topd_ray.types import Float32, GuidedTrajectory, Int32, SparseTargets, TeacherScores, Trajectory, Windows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """One trajectory with all the teacher's engine has to say about it."""

    trajectory: Trajectory
    scores: TeacherScores
    positions: Int32
    """[M], ascending"""
    continuations: tuple[Int32, ...]
    """M teacher windows"""


class LookAhead:
    """`ask` needs the teacher's engine, `fold` does not: it may run beside it, in another thread.

    `embedding_VD` gives the ground cost between tokens.
    """

    def __init__(
        self,
        config: NearFutureConfig,
        objective: ObjectiveConfig,
        embedding_VD: Float32,
        engine: TeacherEngine,
        seed: int,
    ) -> None:
        self._config = config
        self._objective = objective
        self._embedding_VD_unit = unit_embeddings(torch.from_numpy(embedding_VD))
        self._engine = engine
        self._seed = seed

    def ask(self, trajectories: Sequence[Trajectory]) -> list[Asked]:
        """Score all trajectories, then continue all their candidate prefixes in one go."""
        scores = self._engine.score([(one.prompt_ids, one.response_ids) for one in trajectories])
        positions = [self._candidates(*pair) for pair in zip(trajectories, scores, strict=True)]
        continuations = iter(self._continue(trajectories, positions))
        return [
            Asked(
                trajectory=trajectory,
                scores=score,
                positions=positions_M,
                continuations=tuple(next(continuations) for _ in positions_M),
            )
            for trajectory, score, positions_M in zip(trajectories, scores, positions, strict=True)
        ]

    def fold(self, pending: Sequence[Asked], threshold: float) -> list[GuidedTrajectory]:
        """Compare the futures; fold those further apart than `threshold` into targets."""
        return [self._fold_one(asked, threshold) for asked in pending]

    def _candidates(self, trajectory: Trajectory, scores: TeacherScores) -> Int32:
        if not self._objective.looks_ahead:
            return np.zeros(0, np.int32)
        losses_T = token_loss(scores.sampled_logprobs, trajectory.behaviour_logprobs, self._config.ranking)
        return select_candidates(losses_T, self._config.candidate_fraction, self._config.min_distance)

    def _continue(self, trajectories: Sequence[Trajectory], positions: Sequence[Int32]) -> list[Int32]:
        """The teacher's windows of all candidates, trajectory by trajectory."""
        prefixes, seeds = [], []
        for trajectory, positions_M in zip(trajectories, positions, strict=True):
            ids = [*trajectory.prompt_ids.tolist(), *trajectory.response_ids.tolist()]
            for position in positions_M.tolist():
                prefixes.append(ids[: len(trajectory.prompt_ids) + position])
                seeds.append(stable_seed(self._seed, "window", trajectory.trajectory_id, position))
        if not prefixes:
            return []
        return self._engine.continue_prefixes(
            prefixes, self._config.window, decoding=self._config.teacher_decoding, seeds=seeds
        )

    def _fold_one(self, asked: Asked, threshold: float) -> GuidedTrajectory:
        num_tokens = asked.trajectory.num_response_tokens
        windows = self._windows(asked)
        distances_M = np.array([window.distance for window in windows], np.float32)
        divergent_M = classify(distances_M, threshold)
        guiding = [window for window, diverges in zip(windows, divergent_M, strict=True) if diverges]
        guides = self._objective.method == "topd"
        return GuidedTrajectory(
            trajectory=asked.trajectory,
            scores=asked.scores,
            targets=fold_windows(guiding, num_tokens) if guides else SparseTargets.empty(num_tokens),
            capped=cap_mask(
                asked.positions,
                distances_M,
                threshold,
                self._objective.cap,
                num_tokens,
                np.random.default_rng(stable_seed(self._seed, "cap", asked.trajectory.trajectory_id)),
            ),
            windows=_diagnostics(asked, distances_M, divergent_M),
        )

    def _windows(self, asked: Asked) -> list[Window]:
        """The transport problem of every candidate; the student's window is the rollout's own next tokens."""
        response_T = asked.trajectory.response_ids
        student = [response_T[position : position + self._config.window] for position in asked.positions]
        costs = [
            ground_cost(student_ids, teacher_ids, self._embedding_VD_unit)
            for student_ids, teacher_ids in zip(student, asked.continuations, strict=True)
        ]
        solved = solve_windows(costs, self._config.transport, self._config.entropic_epsilon)
        return [
            Window(
                position=int(position),
                student_ids=student_ids,
                teacher_ids=teacher_ids,
                plan_ST=result.plan_ST,
                distance=result.distance,
            )
            for position, student_ids, teacher_ids, result in zip(
                asked.positions, student, asked.continuations, solved, strict=True
            )
        ]


def _diagnostics(asked: Asked, distances_M: Float32, divergent_M: np.ndarray) -> Windows:
    if not len(asked.positions):
        return Windows.empty()
    lengths = [len(teacher_ids) for teacher_ids in asked.continuations]
    return Windows(
        positions=asked.positions,
        distances=distances_M,
        divergent=divergent_M,
        teacher_indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        teacher_ids=np.concatenate(asked.continuations).astype(np.int32),
    )
