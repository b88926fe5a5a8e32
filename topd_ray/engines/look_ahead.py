"""From trajectories to guided trajectories: score, look into the near future, compare, fold (paper, section 4).

Axes: T response tokens of one trajectory, M windows (candidates), V vocabulary, D embedding width; of windows side by
side, S student and T teacher tokens (see transport.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from topd_ray.config.schema import NearFutureConfig, ObjectiveConfig
from topd_ray.engines.seeds import stable_seed
from topd_ray.engines.teacher import TeacherEngine
from topd_ray.grouping import runs_within
from topd_ray.objective.candidates import random_candidates, select_candidates, token_loss
from topd_ray.objective.targets import cap_mask, classify, fold_windows, identity_plans, split_targets
from topd_ray.objective.transport import (
    TransportResult,
    Values,
    ground_cost,
    pad_windows,
    solve_windows,
    unit_embeddings,
)
from topd_ray.types import (
    Branches,
    Float32,
    GuidedTrajectory,
    Int32,
    Int64,
    SparseTargets,
    TeacherScores,
    Trajectory,
    Windows,
)

# Entries of the costs of all windows that are solved together, in float64 16 MB: 838 windows of 50 x 50.
LARGEST_GROUP = 2**21


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """One trajectory with all the teacher's engine has to say about it."""

    trajectory: Trajectory
    scores: TeacherScores
    positions: Int32
    """[M], ascending"""
    continuations: tuple[Int32, ...]
    """M teacher windows"""
    student_windows: tuple[Int32, ...]
    """M student windows: the response's own tokens, or what `LookAhead.resample` has put in their place"""


class Student(Protocol):
    """Whoever goes on as the policy that wrote the trajectories would."""

    def continue_prefixes(
        self, prefixes: Sequence[Sequence[int]], num_tokens: int, *, seeds: Sequence[int]
    ) -> list[Int32]: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Guiding:
    """The windows that guide, of several trajectories one after the other, padded to S = T = K tokens."""

    plan_MST: Values
    context_ids_MS: Int64
    """the tokens at whose positions, and after which, the student learns"""
    teacher_ids_MT: Int64
    context_lengths_M: Int64
    teacher_lengths_M: Int64

    def fold(self, starts_M: Int64, num_tokens: int) -> SparseTargets:
        """Targets of `num_tokens` positions, the windows lying at `starts_M`."""
        return fold_windows(
            self.plan_MST, self.teacher_ids_MT, starts_M, num_tokens, self.context_lengths_M, self.teacher_lengths_M
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compared:
    """M pairs of windows, and what it costs to move one onto the other."""

    cost_MST: torch.Tensor
    """ground cost, see transport.py"""
    solved: TransportResult
    student_ids_MS: Int64
    teacher_ids_MT: Int64
    student_lengths_M: Int64
    teacher_lengths_M: Int64


def candidate_prefixes(
    trajectories: Sequence[Trajectory], positions: Sequence[Int32], seed: int, drawn: str
) -> tuple[list[list[int]], list[int]]:
    """What stands before each of a trajectory's `positions`, in order, and a seed for each of what is `drawn` there."""
    prefixes, seeds = [], []
    for trajectory, positions_M in zip(trajectories, positions, strict=True):
        ids = [*trajectory.prompt_ids.tolist(), *trajectory.response_ids.tolist()]
        for position in positions_M.tolist():
            prefixes.append(ids[: len(trajectory.prompt_ids) + position])
            seeds.append(stable_seed(seed, drawn, trajectory.trajectory_id, position))
    return prefixes, seeds


def continue_candidates(
    engine: TeacherEngine,
    config: NearFutureConfig,
    trajectories: Sequence[Trajectory],
    positions: Sequence[Int32],
    seed: int,
) -> list[list[Int32]]:
    """The teacher's windows from each of a trajectory's `positions`, trajectory by trajectory, all in one go."""
    prefixes, seeds = candidate_prefixes(trajectories, positions, seed, "window")
    if not prefixes:
        return [[] for _ in positions]
    windows = iter(engine.continue_prefixes(prefixes, config.window, decoding=config.teacher_decoding, seeds=seeds))
    return [[next(windows) for _ in positions_M] for positions_M in positions]


def compare_windows(
    student_windows: Sequence[Int32],
    teacher_windows: Sequence[Int32],
    embedding_VD_unit: torch.Tensor,
    config: NearFutureConfig,
) -> Compared:
    """Transport between pairs of windows, all padded to `config.window`: a pair's arithmetic is the same in company."""
    student_ids, student_lengths = pad_windows(student_windows, config.window)
    teacher_ids, teacher_lengths = pad_windows(teacher_windows, config.window)
    cost = ground_cost(student_ids, teacher_ids, embedding_VD_unit, student_lengths, teacher_lengths)
    solved = solve_windows(
        cost, student_lengths, teacher_lengths, method=config.transport, epsilon=config.entropic_epsilon
    )
    return Compared(
        cost_MST=cost,
        solved=solved,
        student_ids_MS=student_ids,
        teacher_ids_MT=teacher_ids,
        student_lengths_M=student_lengths,
        teacher_lengths_M=teacher_lengths,
    )


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
        if objective.looks_ahead:  # a compiled solver is loaded now, and not under the first trajectories
            solve_windows(np.zeros((1, 1, 1)), method=config.transport, epsilon=config.entropic_epsilon)

    def ask(self, trajectories: Sequence[Trajectory]) -> list[Asked]:
        """Score all trajectories, then continue all their candidate prefixes in one go."""
        scores = self._engine.score([(one.prompt_ids, one.response_ids) for one in trajectories])
        positions = [self._candidates(*pair) for pair in zip(trajectories, scores, strict=True)]
        continuations = continue_candidates(self._engine, self._config, trajectories, positions, self._seed)
        width = self._config.window
        return [
            Asked(
                trajectory=trajectory,
                scores=score,
                positions=positions_M,
                continuations=tuple(windows),
                student_windows=tuple(trajectory.response_ids[at : at + width] for at in positions_M.tolist()),
            )
            for trajectory, score, positions_M, windows in zip(
                trajectories, scores, positions, continuations, strict=True
            )
        ]

    def resample(self, pending: Sequence[Asked], student: Student) -> list[Asked]:
        """The same with student windows that `student` draws anew after each candidate's prefix."""
        trajectories, positions = [one.trajectory for one in pending], [one.positions for one in pending]
        prefixes, seeds = candidate_prefixes(trajectories, positions, self._seed, "student window")
        if not prefixes:
            return list(pending)
        drawn = iter(student.continue_prefixes(prefixes, self._config.window, seeds=seeds))
        return [replace(one, student_windows=tuple(next(drawn) for _ in one.positions)) for one in pending]

    def fold(self, pending: Sequence[Asked], threshold: float) -> list[GuidedTrajectory]:
        """Compare the futures; fold those further apart than `threshold` into targets."""
        groups = runs_within(pending, lambda asked: len(asked.positions) * self._config.window**2, LARGEST_GROUP)
        return [guided for group in groups for guided in self._fold_group(group, threshold)]

    def _candidates(self, trajectory: Trajectory, scores: TeacherScores) -> Int32:
        if not self._objective.looks_ahead:
            return np.zeros(0, np.int32)
        fraction, min_distance = self._config.candidate_fraction, self._config.min_distance
        if self._config.ranking == "random":
            rng = np.random.default_rng(stable_seed(self._seed, "candidates", trajectory.trajectory_id))
            return random_candidates(trajectory.num_response_tokens, fraction, rng, min_distance)
        losses_T = token_loss(scores.sampled_logprobs, trajectory.behaviour_logprobs, self._config.ranking)
        return select_candidates(losses_T, fraction, min_distance)

    def _fold_group(self, group: Sequence[Asked], threshold: float) -> list[GuidedTrajectory]:
        compared = compare_windows(
            [ids for asked in group for ids in asked.student_windows],
            [ids for asked in group for ids in asked.continuations],
            self._embedding_VD_unit,
            self._config,
        )
        distances = compared.solved.distance_M.numpy().astype(np.float32)
        divergent = classify(distances, threshold)
        guides = divergent if self._objective.method == "topd" else np.zeros_like(divergent)
        guiding = self._guiding(compared, guides)
        ends = np.cumsum([len(asked.positions) for asked in group])[:-1]
        guides_of = np.split(guides, ends)
        parts = zip(
            group,
            _targets_along(group, guides_of, None if self._config.branches else guiding),
            _branches(group, guides_of, guiding) if self._config.branches else [Branches.empty() for _ in group],
            np.split(distances, ends),
            np.split(divergent, ends),
            strict=True,
        )
        return [
            GuidedTrajectory(
                trajectory=asked.trajectory,
                scores=asked.scores,
                targets=own_targets,
                capped=self._capped(asked, distances_M, threshold),
                windows=_diagnostics(asked, distances_M, divergent_M),
                branches=own_branches,
            )
            for asked, own_targets, own_branches, distances_M, divergent_M in parts
        ]

    def _guiding(self, compared: Compared, guides_M: NDArray[np.bool_]) -> Guiding:
        """What the windows that guide teach, by the plan and in the context that the config asks for."""
        plan_MST = compared.solved.plan_MST.numpy()[guides_M]
        teacher_ids_MT, teacher_lengths_M = compared.teacher_ids_MT[guides_M], compared.teacher_lengths_M[guides_M]
        context_ids_MS, context_lengths_M = compared.student_ids_MS[guides_M], compared.student_lengths_M[guides_M]
        if self._config.guidance_context == "teacher":
            context_ids_MS, context_lengths_M = teacher_ids_MT, teacher_lengths_M
        if self._config.guidance_context == "teacher" or self._config.plan == "identity":
            plan_MST, context_lengths_M = identity_plans(context_lengths_M, teacher_lengths_M, self._config.window)
            teacher_lengths_M = context_lengths_M
        return Guiding(
            plan_MST=plan_MST,
            context_ids_MS=context_ids_MS,
            teacher_ids_MT=teacher_ids_MT,
            context_lengths_M=context_lengths_M,
            teacher_lengths_M=teacher_lengths_M,
        )

    def _capped(self, asked: Asked, distances_M: Float32, threshold: float) -> NDArray[np.bool_]:
        rng = np.random.default_rng(stable_seed(self._seed, "cap", asked.trajectory.trajectory_id))
        num_tokens = asked.trajectory.num_response_tokens
        return cap_mask(asked.positions, distances_M, threshold, self._objective.cap, num_tokens, rng)


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


def _targets_along(
    group: Sequence[Asked], guides: Sequence[NDArray[np.bool_]], guiding: Guiding | None
) -> list[SparseTargets]:
    """The targets along each trajectory; None guides nothing there."""
    num_tokens = [asked.trajectory.num_response_tokens for asked in group]
    if guiding is None:
        return [SparseTargets.empty(length) for length in num_tokens]
    # A trajectory's windows start at its own offset in the responses laid end to end.
    offsets = np.cumsum([0, *num_tokens])
    triples = zip(group, guides, offsets[:-1], strict=True)
    starts = np.concatenate([asked.positions[guides_M] + offset for asked, guides_M, offset in triples])
    return split_targets(guiding.fold(starts, int(offsets[-1])), num_tokens)


def _branches(group: Sequence[Asked], guides: Sequence[NDArray[np.bool_]], guiding: Guiding) -> list[Branches]:
    """Each guiding window as a branch of its trajectory."""
    lengths = guiding.context_lengths_M
    starts = np.concatenate([[0], np.cumsum(lengths)])
    is_own = np.arange(guiding.context_ids_MS.shape[1]) < lengths[:, None]
    token_ids = guiding.context_ids_MS[is_own].astype(np.int32)
    rows = np.cumsum([0, *(int(guides_M.sum()) for guides_M in guides)])
    num_tokens = np.diff(starts[rows]).tolist()
    parts = split_targets(guiding.fold(starts[:-1], int(starts[-1])), num_tokens)
    return [
        Branches(
            positions=asked.positions[guides_M],
            indptr=(starts[first : last + 1] - starts[first]).astype(np.int64),
            token_ids=token_ids[starts[first] : starts[last]],
            targets=targets,
        )
        for asked, guides_M, targets, (first, last) in zip(group, guides, parts, pairwise(rows.tolist()), strict=True)
    ]
