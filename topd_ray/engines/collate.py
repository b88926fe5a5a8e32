"""From trajectories to the tensors of one micro-batch.

Axes: P positions of all trajectories of the micro-batch one after the other, N response tokens likewise, K top teacher
tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from topd_ray.engines.attention import Segments
from topd_ray.errors import DataError
from topd_ray.objective.loss import LossBatch
from topd_ray.objective.targets import split_targets
from topd_ray.types import GuidedTrajectory, SparseTargets, TeacherScores, Trajectory, Windows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenBatch:
    """What a forward pass over some trajectories needs: one row without padding.

    The last response token predicts nothing that is trained, so it is left out of the input.
    """

    trajectory_ids: tuple[str, ...]
    num_response_tokens: tuple[int, ...]
    segments: Segments
    input_ids_P: torch.Tensor
    predictor_N: torch.Tensor
    """Index into the P positions: where response token n is predicted from"""
    sampled_ids_N: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """A forward pass with a loss."""

    tokens: TokenBatch
    loss: LossBatch
    stale: tuple[int, ...] = ()
    """which of the trajectories an older policy wrote than the one that learns"""
    weight: float = 1.0
    """1, or 0 for a stand-in that only keeps the ranks in step"""
    is_of_branches: bool = False
    """whether only the guidance counts: the teacher has not scored these tokens"""


def num_positions(trajectory: Trajectory) -> int:
    """Input tokens: prompt and response without the last token.

    Raises DataError for an empty prompt, whose first response token would be predicted from nothing, and an empty
    response.
    """
    for part, ids in (("prompt", trajectory.prompt_ids), ("response", trajectory.response_ids)):
        if len(ids) == 0:
            raise DataError(f"trajectory {trajectory.trajectory_id} has an empty {part}: give it at least one token")
    return len(trajectory.prompt_ids) + len(trajectory.response_ids) - 1


def collate_tokens(trajectories: Sequence[Trajectory], device: torch.device) -> TokenBatch:
    """Lay prompts and responses one after the other. Raises DataError where a prompt or a response is empty."""
    lengths = tuple(num_positions(trajectory) for trajectory in trajectories)
    ends = np.cumsum(lengths)
    predictors = [
        np.arange(end - trajectory.num_response_tokens, end) for end, trajectory in zip(ends, trajectories, strict=True)
    ]
    ids = [part for one in trajectories for part in (one.prompt_ids, one.response_ids[:-1])]
    return TokenBatch(
        trajectory_ids=tuple(trajectory.trajectory_id for trajectory in trajectories),
        num_response_tokens=tuple(trajectory.num_response_tokens for trajectory in trajectories),
        segments=Segments.of(lengths, device),
        input_ids_P=_joined(ids, np.int64, device),
        predictor_N=_joined(predictors, np.int64, device),
        sampled_ids_N=_joined([trajectory.response_ids for trajectory in trajectories], np.int64, device),
    )


def collate(
    guided: Sequence[GuidedTrajectory],
    device: torch.device,
    *,
    policy_version: int = 0,
    weight: float = 1.0,
    is_of_branches: bool = False,
) -> MicroBatch:
    """Lay the response tokens of all trajectories one after the other, with what the teacher says about each.

    Trajectories of a version before `policy_version` are stale. Branches (`branch_rows`) never are: the importance
    weight of their prefix is not at hand.
    Raises DataError where the parts of a trajectory differ in length, or the trajectories in their number of teacher
    tokens.
    """
    _check(guided)
    tokens = collate_tokens([one.trajectory for one in guided], device)
    scores = [one.scores for one in guided]
    targets = [one.targets for one in guided]
    segments = np.repeat(np.arange(len(guided)), tokens.num_response_tokens)
    return MicroBatch(
        tokens=tokens,
        stale=()
        if is_of_branches
        else tuple(i for i, one in enumerate(guided) if one.trajectory.policy_version < policy_version),
        weight=weight,
        is_of_branches=is_of_branches,
        loss=LossBatch(
            sampled_ids=tokens.sampled_ids_N,
            teacher_topk_ids=_joined([one.topk_ids for one in scores], np.int64, device),
            teacher_topk_logprobs=_joined([one.topk_logprobs for one in scores], np.float32, device),
            teacher_sampled_logprobs=_joined([one.sampled_logprobs for one in scores], np.float32, device),
            behaviour_logprobs=_joined([one.trajectory.behaviour_logprobs for one in guided], np.float32, device),
            capped=_joined([one.capped for one in guided], np.bool_, device),
            segment_ids=_tensor(segments.astype(np.int64), device),
            target_indptr=_joined_indptr(targets, device),
            target_ids=_joined([one.token_ids for one in targets], np.int64, device),
            target_weights=_joined([one.weights for one in targets], np.float32, device),
            target_entropy=_joined([one.entropy for one in targets], np.float32, device),
        ),
    )


def branch_rows(guided: GuidedTrajectory) -> Iterator[GuidedTrajectory]:
    """Each branch as if it were a trajectory: its prefix is the prompt, its own tokens are the response.

    Nothing is scored there: there are no top tokens, and the log-probs of sampled ones are stand-ins, for a micro-batch
    that `is_of_branches`. Raises DataError where a branch lies outside of the response, or has no token.
    """
    trajectory, branches = guided.trajectory, guided.branches
    if not len(branches.positions):
        return
    lengths = np.diff(branches.indptr)
    if not ((branches.positions >= 0) & (branches.positions < trajectory.num_response_tokens) & (lengths > 0)).all():
        raise DataError(
            f"trajectory {trajectory.trajectory_id}: branches at {branches.positions.tolist()} of {lengths.tolist()} "
            f"tokens, and each should leave it within its {trajectory.num_response_tokens} tokens and have at least one"
        )
    parts = split_targets(branches.targets, lengths.tolist())
    for position, (start, end), targets in zip(
        branches.positions.tolist(), pairwise(branches.indptr.tolist()), parts, strict=True
    ):
        num_tokens = end - start
        unknown = np.full(num_tokens, np.log(0.5), np.float32)
        yield GuidedTrajectory(
            trajectory=replace(
                trajectory,
                prompt_ids=np.concatenate([trajectory.prompt_ids, trajectory.response_ids[:position]]),
                response_ids=branches.token_ids[start:end],
                behaviour_logprobs=unknown,
            ),
            scores=TeacherScores(
                topk_ids=np.zeros((num_tokens, 0), np.int32),
                topk_logprobs=np.zeros((num_tokens, 0), np.float32),
                sampled_logprobs=unknown,
            ),
            targets=targets,
            capped=np.zeros(num_tokens, np.bool_),
            windows=Windows.empty(),
        )


def stand_in() -> GuidedTrajectory:
    """A trajectory of one token for a rank that has run out of work: with weight 0 it trains nothing."""
    return GuidedTrajectory(
        trajectory=Trajectory(
            trajectory_id="stand-in",
            prompt_id="stand-in",
            sample_index=0,
            epoch=0,
            policy_version=0,
            finish_reason="length",
            prompt_ids=np.zeros(1, np.int32),
            response_ids=np.zeros(1, np.int32),
            behaviour_logprobs=np.zeros(1, np.float32),
        ),
        scores=TeacherScores(
            topk_ids=np.zeros((1, 1), np.int32),
            topk_logprobs=np.full((1, 1), np.log(0.5), np.float32),
            sampled_logprobs=np.full(1, np.log(0.5), np.float32),
        ),
        targets=SparseTargets.empty(1),
        capped=np.zeros(1, np.bool_),
        windows=Windows.empty(),
    )


def _check(guided: Sequence[GuidedTrajectory]) -> None:
    num_kept = guided[0].scores.topk_ids.shape[-1]
    for one in guided:
        name, num_tokens = one.trajectory.trajectory_id, one.trajectory.num_response_tokens
        shapes = {
            "behaviour_logprobs": (one.trajectory.behaviour_logprobs.shape, (num_tokens,)),
            "topk_ids": (one.scores.topk_ids.shape, (num_tokens, num_kept)),
            "topk_logprobs": (one.scores.topk_logprobs.shape, (num_tokens, num_kept)),
            "sampled_logprobs": (one.scores.sampled_logprobs.shape, (num_tokens,)),
            "capped": (one.capped.shape, (num_tokens,)),
            "targets.indptr": (one.targets.indptr.shape, (num_tokens + 1,)),
            "targets.entropy": (one.targets.entropy.shape, (num_tokens,)),
        }
        for part, (found, right) in shapes.items():
            if found != right:
                raise DataError(f"trajectory {name}: {part} has shape {found}, and should have {right}")


def _joined_indptr(targets: Sequence[SparseTargets], device: torch.device) -> torch.Tensor:
    """Row pointers of all targets one after the other: [N + 1]."""
    row_lengths = np.concatenate([np.diff(one.indptr) for one in targets])
    return _tensor(np.concatenate([[0], np.cumsum(row_lengths)]).astype(np.int64), device)


def _joined(arrays: Sequence[NDArray[np.generic]], dtype: type[np.generic], device: torch.device) -> torch.Tensor:
    return _tensor(np.concatenate(arrays).astype(dtype, copy=False), device)


def _tensor(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
