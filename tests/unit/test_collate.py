"""What a micro-batch holds, value by value."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from topd_ray.engines.collate import branch_rows, collate, collate_tokens, stand_in
from topd_ray.errors import DataError
from topd_ray.types import Branches, GuidedTrajectory, SparseTargets, TeacherScores, Trajectory, Windows

CPU = torch.device("cpu")


def guided(name: str, prompt: list[int], response: list[int], targets: SparseTargets, base: float) -> GuidedTrajectory:
    """A trajectory whose every log-prob is `base` minus its position (and its rank, for the top 2)."""
    steps = base - np.arange(len(response), dtype=np.float32)
    return GuidedTrajectory(
        trajectory=Trajectory(
            trajectory_id=name,
            prompt_id=name,
            sample_index=0,
            epoch=0,
            policy_version=0,
            finish_reason="stop",
            prompt_ids=np.array(prompt, np.int32),
            response_ids=np.array(response, np.int32),
            behaviour_logprobs=steps - 0.5,
        ),
        scores=TeacherScores(
            topk_ids=np.array([[one, one + 1] for one in response], np.int32),
            topk_logprobs=np.stack([steps, steps - 10], 1),
            sampled_logprobs=steps - 0.25,
        ),
        targets=targets,
        capped=np.array([index == 0 for index in range(len(response))]),
        windows=Windows.empty(),
    )


@pytest.fixture
def pair() -> list[GuidedTrajectory]:
    targets = SparseTargets(
        indptr=np.array([0, 0, 2, 3], np.int64),
        token_ids=np.array([7, 8, 9], np.int32),
        weights=np.array([0.25, 0.75, 1.0], np.float32),
        entropy=np.array([0.0, 0.5, 0.0], np.float32),
    )
    return [
        guided("a", [11, 12], [1, 2], SparseTargets.empty(2), -1.0),
        guided("b", [21, 22, 23], [3, 4, 5], targets, -4.0),
    ]


def test_trajectories_lie_end_to_end_without_their_last_token(pair: list[GuidedTrajectory]) -> None:
    tokens = collate_tokens([one.trajectory for one in pair], CPU)
    assert tokens.input_ids_P.tolist() == [11, 12, 1, 21, 22, 23, 3, 4]
    assert tokens.segments.position_ids_P.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert tokens.segments.lengths == (3, 5)
    assert tokens.segments.bounds.tolist() == [0, 3, 8]
    assert tokens.segments.bounds.dtype == torch.int32
    assert tokens.num_response_tokens == (2, 3)
    assert tokens.trajectory_ids == ("a", "b")


def test_a_response_of_one_token_is_predicted_from_the_prompt() -> None:
    one = guided("a", [7], [5], SparseTargets.empty(1), -1.0)
    tokens = collate_tokens([one.trajectory, one.trajectory], CPU)
    assert tokens.input_ids_P.tolist() == [7, 7]
    assert tokens.segments.position_ids_P.tolist() == [0, 0]
    assert tokens.predictor_N.tolist() == [0, 1]


def test_a_response_token_is_predicted_from_the_token_before_it(pair: list[GuidedTrajectory]) -> None:
    tokens = collate_tokens([one.trajectory for one in pair], CPU)
    assert tokens.sampled_ids_N.tolist() == [1, 2, 3, 4, 5]
    before = tokens.input_ids_P[tokens.predictor_N]
    assert before.tolist() == [12, 1, 23, 3, 4]


def test_teacher_and_targets_lie_end_to_end(pair: list[GuidedTrajectory]) -> None:
    loss = collate(pair, CPU).loss
    assert loss.sampled_ids.tolist() == [1, 2, 3, 4, 5]
    assert loss.teacher_topk_ids.tolist() == [[1, 2], [2, 3], [3, 4], [4, 5], [5, 6]]
    assert loss.teacher_topk_logprobs.tolist() == [[-1, -11], [-2, -12], [-4, -14], [-5, -15], [-6, -16]]
    assert loss.teacher_sampled_logprobs.tolist() == [-1.25, -2.25, -4.25, -5.25, -6.25]
    assert loss.behaviour_logprobs.tolist() == [-1.5, -2.5, -4.5, -5.5, -6.5]
    assert loss.capped.tolist() == [True, False, True, False, False]
    assert loss.segment_ids.tolist() == [0, 0, 1, 1, 1]
    assert loss.target_indptr.tolist() == [0, 0, 0, 0, 2, 3]
    assert loss.target_ids.tolist() == [7, 8, 9]
    assert loss.target_weights.tolist() == [0.25, 0.75, 1.0]
    assert loss.target_entropy.tolist() == [0.0, 0.0, 0.0, 0.5, 0.0]


def test_targets_of_the_first_trajectory_shift_those_of_the_second(pair: list[GuidedTrajectory]) -> None:
    loss = collate(pair[::-1] + pair[1:], CPU).loss
    assert loss.target_indptr.tolist() == [0, 0, 2, 3, 3, 3, 3, 5, 6]
    assert loss.target_ids.tolist() == [7, 8, 9, 7, 8, 9]


def test_read_only_arrays_are_taken(pair: list[GuidedTrajectory], recwarn: pytest.WarningsRecorder) -> None:
    for array in (pair[0].trajectory.response_ids, pair[0].scores.topk_logprobs, pair[0].capped):
        array.flags.writeable = False
    assert collate(pair[:1], CPU).loss.sampled_ids.tolist() == [1, 2]
    assert not recwarn.list


def test_a_stand_in_weighs_nothing_and_fits() -> None:
    batch = collate([stand_in()], CPU, weight=0.0)
    assert batch.weight == 0.0
    assert batch.tokens.input_ids_P.tolist() == [0]
    assert batch.tokens.predictor_N.tolist() == [0]


@pytest.mark.parametrize("part", ["prompt", "response"])
def test_an_empty_part_is_refused(pair: list[GuidedTrajectory], part: str) -> None:
    empty = replace(pair[0].trajectory, **{f"{part}_ids": np.zeros(0, np.int32)})
    with pytest.raises(DataError, match=f"trajectory a has an empty {part}: give it at least one token"):
        collate_tokens([empty], CPU)


def test_parts_of_different_length_are_refused(pair: list[GuidedTrajectory]) -> None:
    short = replace(pair[1], scores=replace(pair[1].scores, sampled_logprobs=np.zeros(2, np.float32)))
    with pytest.raises(DataError, match=r"trajectory b: sampled_logprobs has shape \(2,\), and should have \(3,\)"):
        collate([pair[0], short], CPU)
    narrow = replace(pair[1], scores=replace(pair[1].scores, topk_ids=pair[1].scores.topk_ids[:, :1]))
    with pytest.raises(DataError, match=r"trajectory b: topk_ids has shape \(3, 1\), and should have \(3, 2\)"):
        collate([pair[0], narrow], CPU)


def test_stale_are_those_of_an_older_version(pair: list[GuidedTrajectory]) -> None:
    newer = replace(pair[0], trajectory=replace(pair[0].trajectory, policy_version=3))
    assert collate([pair[0], newer, pair[1]], CPU, policy_version=3).stale == (0, 2)
    assert collate([newer], CPU, policy_version=3).stale == ()
    assert collate(pair, CPU).stale == ()


def branched(one: GuidedTrajectory, positions: list[int], lengths: list[int]) -> GuidedTrajectory:
    """Branches whose tokens are 31, 32, ..., each of which learns the token 10 above it."""
    num_tokens = sum(lengths)
    token_ids = np.arange(31, 31 + num_tokens, dtype=np.int32)
    branches = Branches(
        positions=np.array(positions, np.int32),
        indptr=np.cumsum([0, *lengths]).astype(np.int64),
        token_ids=token_ids,
        targets=SparseTargets(
            indptr=np.arange(num_tokens + 1, dtype=np.int64),
            token_ids=token_ids + 10,
            weights=np.ones(num_tokens, np.float32),
            entropy=np.zeros(num_tokens, np.float32),
        ),
    )
    return replace(one, branches=branches)


def test_a_branch_lies_behind_its_prefix_with_its_own_targets(pair: list[GuidedTrajectory]) -> None:
    one = branched(pair[1], [0, 2], [2, 1])
    assert (one.num_guided, one.num_branch_tokens) == (2 + 3, (3 + 0 + 2) + (3 + 2 + 1))
    batch = collate(list(branch_rows(one)), CPU, policy_version=7, is_of_branches=True)
    assert batch.tokens.input_ids_P.tolist() == [21, 22, 23, 31, 21, 22, 23, 3, 4]
    assert batch.tokens.input_ids_P[batch.tokens.predictor_N].tolist() == [23, 31, 4]
    assert batch.loss.sampled_ids.tolist() == [31, 32, 33]
    assert batch.loss.target_ids.tolist() == [41, 42, 43]
    assert batch.loss.target_indptr.tolist() == [0, 1, 2, 3]
    assert batch.loss.segment_ids.tolist() == [0, 0, 1]
    assert batch.is_of_branches and batch.stale == ()
    assert list(branch_rows(pair[1])) == []


@pytest.mark.parametrize(("positions", "lengths"), [([3], [1]), ([-1], [1]), ([0, 1], [2, 0])])
def test_branches_that_cannot_be_are_refused(
    pair: list[GuidedTrajectory], positions: list[int], lengths: list[int]
) -> None:
    with pytest.raises(DataError, match=r"trajectory b: branches at .* each should leave it within its 3 tokens and"):
        list(branch_rows(branched(pair[1], positions, lengths)))
