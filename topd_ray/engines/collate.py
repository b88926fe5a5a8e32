"""From trajectories to the tensors of one micro-batch.

Axes: B trajectories of the micro-batch, L positions of the longest of them, N response tokens of all of them one after
the other, K top teacher tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from topd_ray.errors import DataError
from topd_ray.objective.loss import LossBatch
from topd_ray.types import GuidedTrajectory, SparseTargets, TeacherScores, Trajectory, Windows

PAD_ID = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenBatch:
    """What a forward pass over some trajectories needs.

    Rows are padded on the right, and attention is causal: no real position sees the padding, so no mask is needed. The
    last response token predicts nothing that is trained, so it is left out of the input.
    """

    trajectory_ids: tuple[str, ...]
    num_response_tokens: tuple[int, ...]
    num_input_tokens: int
    """without the padding"""
    input_ids_BL: torch.Tensor
    predictor_N: torch.Tensor
    """Index into the flattened [B * L] positions: where response token n is predicted from"""
    sampled_ids_N: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """A forward pass with a loss."""

    tokens: TokenBatch
    loss: LossBatch
    weight: float = 1.0
    """1, or 0 for a stand-in that only keeps the ranks in step"""


def split(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of at most `size` sequences each, longest first, so that little is padded and memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]


def num_positions(trajectory: Trajectory) -> int:
    """Tokens of prompt and response."""
    return len(trajectory.prompt_ids) + trajectory.num_response_tokens


def collate_tokens(trajectories: Sequence[Trajectory], device: torch.device) -> TokenBatch:
    """Pad prompts and responses on the right.

    Raises DataError for an empty prompt: its first response token would be predicted from nothing.
    """
    for trajectory in trajectories:
        if len(trajectory.prompt_ids) == 0:
            raise DataError(f"trajectory {trajectory.trajectory_id} has an empty prompt: give it at least one token")
    length = max(num_positions(trajectory) for trajectory in trajectories) - 1
    input_ids_BL = np.full((len(trajectories), length), PAD_ID, np.int64)
    predictors: list[NDArray[np.int64]] = []
    for row, trajectory in enumerate(trajectories):
        ids = np.concatenate([trajectory.prompt_ids, trajectory.response_ids])[:-1]
        input_ids_BL[row, : len(ids)] = ids
        first = row * length + len(trajectory.prompt_ids) - 1
        predictors.append(np.arange(first, first + trajectory.num_response_tokens, dtype=np.int64))
    return TokenBatch(
        trajectory_ids=tuple(trajectory.trajectory_id for trajectory in trajectories),
        num_response_tokens=tuple(trajectory.num_response_tokens for trajectory in trajectories),
        num_input_tokens=sum(num_positions(trajectory) - 1 for trajectory in trajectories),
        input_ids_BL=_tensor(input_ids_BL, device),
        predictor_N=_joined(predictors, np.int64, device),
        sampled_ids_N=_joined([trajectory.response_ids for trajectory in trajectories], np.int64, device),
    )


def collate(guided: Sequence[GuidedTrajectory], device: torch.device, *, weight: float = 1.0) -> MicroBatch:
    """Lay the response tokens of all trajectories one after the other, with what the teacher says about each.

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
        weight=weight,
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
