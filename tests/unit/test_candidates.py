"""Candidates against a brute-force greedy choice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topd_ray.errors import DataError
from topd_ray.objective import random_candidates, select_candidates, token_loss


def greedy(losses: list[float], num_wanted: int, min_distance: int) -> list[int]:
    chosen: list[int] = []
    for position in sorted(range(len(losses)), key=lambda p: (-losses[p], p)):
        if len(chosen) < num_wanted and all(abs(position - other) >= min_distance for other in chosen):
            chosen.append(position)
    return sorted(chosen)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.floats(0.01, 1.0), st.integers(1, 6))
def test_matches_brute_force_with_many_ties(losses: list[int], fraction: float, min_distance: int) -> None:
    chosen = select_candidates(np.array(losses, np.float32), fraction, min_distance)
    num_wanted = max(1, int(fraction * len(losses) + 0.5))
    assert chosen.tolist() == greedy([float(loss) for loss in losses], num_wanted, min_distance)
    assert chosen.dtype == np.int32


def test_the_papers_share() -> None:
    losses = np.random.default_rng(0).random(9688).astype(np.float32)
    chosen = select_candidates(losses, 0.0225, 1)
    assert len(chosen) == 218
    assert losses[chosen].min() >= np.sort(losses)[-218]


def test_ties_go_to_the_earlier_position() -> None:
    assert select_candidates(np.zeros(10, np.float32), 0.3, 1).tolist() == [0, 1, 2]
    assert select_candidates(np.zeros(10, np.float32), 0.3, 4).tolist() == [0, 4, 8]


def test_one_token_is_a_candidate_whatever_the_fraction() -> None:
    assert select_candidates(np.array([-3.0], np.float32), 0.0001, 5).tolist() == [0]


def test_all_tokens_are_candidates_at_fraction_one() -> None:
    assert select_candidates(np.arange(7, dtype=np.float32), 1.0, 1).tolist() == list(range(7))


def test_infinite_loss_ranks_first() -> None:
    assert select_candidates(np.array([1.0, np.inf, 2.0], np.float32), 0.1, 1).tolist() == [1]


@pytest.mark.parametrize(
    ("losses", "fraction", "min_distance", "message"),
    [
        ([], 0.1, 1, "losses_T: shape .0,., want a vector of at least one token"),
        ([1.0, float("nan")], 0.1, 1, "position 1 is NaN"),
        ([1.0], 0.0, 1, "fraction"),
        ([1.0], 1.5, 1, "fraction"),
        ([1.0], 0.5, 0, "min_distance"),
        ([[1.0]], 0.5, 1, "losses_T: shape .1, 1., want a vector"),
    ],
)
def test_refuses(losses: list, fraction: float, min_distance: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        select_candidates(np.array(losses, np.float32), fraction, min_distance)


def test_token_loss() -> None:
    teacher = np.array([-4.0, -0.5], np.float32)
    student = np.array([-1.0, -2.0], np.float32)
    np.testing.assert_array_equal(token_loss(teacher, student, "teacher_nll"), np.array([4.0, 0.5], np.float32))
    np.testing.assert_array_equal(token_loss(teacher, student, "sampled_kl"), np.array([3.0, -1.5], np.float32))
    assert token_loss(teacher, student, "sampled_kl").dtype == np.float32
    with pytest.raises(DataError, match="one each"):
        token_loss(teacher, student[:1], "sampled_kl")
    with pytest.raises(DataError, match=r"sampled_teacher_logprobs: shape .1, 2., want a vector"):
        token_loss(teacher[None], student, "teacher_nll")
    with pytest.raises(DataError, match="ranking: found 'loss', want one of teacher_nll, sampled_kl"):
        token_loss(teacher, student, "loss")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.float64])
def test_losses_of_any_dtype_rank_the_same(dtype: type) -> None:
    assert select_candidates(np.array([0, 3, 200 if dtype is np.uint8 else -9, 5], dtype), 0.5, 1).tolist() == (
        [2, 3] if dtype is np.uint8 else [1, 3]
    )
    lowest = np.array([np.iinfo(np.int32).min, 0], np.int32)
    assert select_candidates(lowest, 0.5, 1).tolist() == [1]


def test_refuses_what_is_no_log_prob() -> None:
    for bad in (np.nan, 0.5, np.inf):
        with pytest.raises(DataError, match=r"sampled_teacher_logprobs: holds .*, want log-probs: at most 0"):
            token_loss(np.array([-1.0, bad]), np.array([-1.0, -1.0]), "teacher_nll")
        with pytest.raises(DataError, match="behaviour_logprobs: holds"):
            token_loss(np.array([-1.0, -1.0]), np.array([-1.0, bad]), "sampled_kl")
    with pytest.raises(DataError, match="behaviour_logprobs: -inf at position 1"):
        token_loss(np.array([-1.0, -np.inf]), np.array([-1.0, -np.inf]), "sampled_kl")
    assert token_loss(np.array([-np.inf]), np.array([-1.0]), "sampled_kl").tolist() == [np.inf]
    with pytest.raises(DataError, match=r"min_distance is 1\.5, and should be a whole number of at least 1"):
        select_candidates(np.array([1.0]), 0.5, 1.5)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="losses_T: <U1, want numbers"):
        select_candidates(["a"], 0.5)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(1, 6), st.integers(0, 99))
def test_random_candidates_keep_number_and_distance(num: int, fraction: float, min_distance: int, seed: int) -> None:
    chosen = random_candidates(num, fraction, np.random.default_rng(seed), min_distance)
    num_wanted = max(1, int(fraction * num + 0.5))
    assert len(chosen) == num_wanted if min_distance == 1 else 1 <= len(chosen) <= num_wanted
    assert (np.diff(chosen) >= min_distance).all() and chosen[0] >= 0 and chosen[-1] < num
    assert chosen.dtype == np.int32
    assert chosen.tolist() == random_candidates(num, fraction, np.random.default_rng(seed), min_distance).tolist()


def test_random_candidates_are_uniform() -> None:
    """Each of the 15 pairs of 6 positions in 3,000 draws: 200 +- 14, so 5 standard deviations are 70."""
    rng = np.random.default_rng(0)
    pairs = [tuple(random_candidates(6, 1 / 3, rng).tolist()) for _ in range(3000)]
    counts = [pairs.count(pair) for pair in set(pairs)]
    assert len(counts) == 15 and max(abs(count - 200) for count in counts) < 70
    with pytest.raises(DataError, match="num_tokens is 0, and should be a whole number of at least 1"):
        random_candidates(0, 0.5, rng)
