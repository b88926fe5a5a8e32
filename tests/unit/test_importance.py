"""Prefix weights against the formula, one position at a time."""

import math
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from topd_ray.errors import DataError
from topd_ray.objective import prefix_weights

LENGTHS = (4, 1, 3)
STUDENT = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0, -2.0, -4.0, -1.0], dtype=torch.float64)
BEHAVIOUR = torch.tensor([-1.5, -1.0, -0.75, -1.0, -2.0, -1.0, -4.5, -6.0], dtype=torch.float64)


def plain(student: Tensor, behaviour: Tensor, lengths: tuple[int, ...], clip: float, horizon: int) -> list[float]:
    found = []
    for stop, length in zip(accumulate(lengths), lengths, strict=True):
        ratios = [math.exp(float(student[i]) - float(behaviour[i])) for i in range(stop - length, stop)]
        found += [min(clip, math.prod(ratios[max(0, t - horizon) : t])) for t in range(length)]
    return found


@pytest.mark.parametrize("horizon", [0, 1, 2, 3, 10**9])
@pytest.mark.parametrize("clip", [0.5, 1.7, math.inf])
def test_weights_are_the_formula(horizon: int, clip: float) -> None:
    weights = prefix_weights(STUDENT, BEHAVIOUR, LENGTHS, clip=clip, horizon=horizon)
    assert weights.dtype == torch.float64
    assert weights.tolist() == pytest.approx(plain(STUDENT, BEHAVIOUR, LENGTHS, clip, horizon), rel=1e-14)


def test_by_hand() -> None:
    """log ratios 0.5, -1, 0.25, -2 | 1 | -1, 0.5, 5"""
    e = math.exp
    near = prefix_weights(STUDENT, BEHAVIOUR, LENGTHS, clip=1.5, horizon=1)
    assert near.tolist() == pytest.approx([1, 1.5, e(-1), e(0.25), 1, 1, e(-1), 1.5])
    far = prefix_weights(STUDENT, BEHAVIOUR, LENGTHS, clip=1.5, horizon=2)
    assert far.tolist() == pytest.approx([1, 1.5, e(-0.5), e(-0.75), 1, 1, e(-1), e(-0.5)])


def test_the_same_policy_weighs_exactly_one() -> None:
    logprobs = -torch.rand(500, generator=torch.Generator().manual_seed(0))
    assert prefix_weights(logprobs, logprobs, (300, 200), clip=2.0, horizon=64).tolist() == [1.0] * 500


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=6).map(tuple),
    horizon=st.integers(0, 40),
    clip=st.floats(0.01, 100.0),
    seed=st.integers(0, 10_000),
)
def test_properties(lengths: tuple[int, ...], horizon: int, clip: float, seed: int) -> None:
    """The plain loop's values; no trajectory changes another's, bit by bit, and no token its own or earlier weights."""
    rng, count = np.random.default_rng(seed), sum(lengths)
    student, behaviour = (torch.from_numpy(-rng.exponential(2.0, count)) for _ in range(2))
    weights = prefix_weights(student, behaviour, lengths, clip=clip, horizon=horizon)
    assert weights.tolist() == pytest.approx(plain(student, behaviour, lengths, clip, horizon), rel=1e-10)
    alone = [
        prefix_weights(one, other, (len(one),), clip=clip, horizon=horizon)
        for one, other in zip(torch.split(student, lengths), torch.split(behaviour, lengths), strict=True)
    ]
    assert weights.tolist() == [weight for part in alone for weight in part.tolist()]
    for token in range(count)[:: max(count // 3, 1)]:
        moved = student.clone()
        moved[token] -= 1.0
        changed = prefix_weights(moved, behaviour, lengths, clip=clip, horizon=horizon)
        assert changed[: token + 1].tolist() == weights[: token + 1].tolist()


def test_the_unbiased_weight_is_unbiased() -> None:
    """Over all prefixes of 4 tokens of 3: the mean over b of weight * f is that of f over p_S."""
    generator = torch.Generator().manual_seed(3)
    student, behaviour = (torch.randn(4, 3, generator=generator).double().log_softmax(1) for _ in range(2))
    paths = torch.cartesian_prod(*[torch.arange(3)] * 4)
    values = torch.randn(len(paths), generator=generator, dtype=torch.float64)
    p, b = (side[torch.arange(4), paths] for side in (student, behaviour))
    # a fifth token, whose own ratio must not matter
    rows = [torch.cat([side, torch.full((len(paths), 1), last)], 1) for side, last in ((p, -0.1), (b, -5.0))]
    weights = prefix_weights(rows[0].flatten(), rows[1].flatten(), (5,) * len(paths), clip=math.inf, horizon=5)
    found = (b.sum(1).exp() * weights.view(-1, 5)[:, 4] * values).sum()
    torch.testing.assert_close(found, (p.sum(1).exp() * values).sum(), atol=1e-14, rtol=1e-13)


def test_sums_are_as_wide_as_they_have_to_be() -> None:
    """100,000 ratios of bfloat16 and float32 log-probs, and of products that overflow on the way."""
    behaviour = torch.full((100_000,), -1.0)
    weights = prefix_weights(behaviour + 2.0**-20, behaviour, (100_000,), clip=9.0, horizon=10**6)
    assert float(weights[-1]) == pytest.approx(math.exp(99_999 * 2.0**-20), rel=1e-6)
    assert weights.dtype == torch.float32
    narrow = prefix_weights(STUDENT.bfloat16(), BEHAVIOUR.bfloat16(), LENGTHS, clip=2.0, horizon=2)
    assert narrow.dtype == torch.float32
    assert narrow.tolist() == pytest.approx(plain(STUDENT, BEHAVIOUR, LENGTHS, 2.0, 2), rel=1e-6)
    huge = prefix_weights(torch.zeros(30), torch.full((30,), -500.0), (30,), clip=2.0, horizon=64)
    assert huge.tolist() == [1.0, *[2.0] * 29]


def test_there_is_no_gradient() -> None:
    student = STUDENT.clone().requires_grad_()
    assert not prefix_weights(student, BEHAVIOUR, LENGTHS, clip=2.0, horizon=3).requires_grad


def test_nan_that_the_caller_looks_for_stays_in_its_trajectory() -> None:
    student = STUDENT.clone()
    student[1] = math.nan
    weights = prefix_weights(student, BEHAVIOUR, LENGTHS, clip=2.0, horizon=1, check_finite=False)
    assert weights.isnan().nonzero().flatten().tolist() == [2, 3]


def spoilt(values: Tensor, value: float) -> Tensor:
    values = values.clone()
    values[2] = value
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprob_N": STUDENT[:-1]}, r"behaviour_logprob_N has shape \[8\], and should have \[7\]"),
        ({"logprob_N": STUDENT[None]}, r"logprob_N has shape \[1, 8\], and should have \[N\]"),
        ({"logprob_N": STUDENT.int()}, "logprob_N is of torch.int32, and should be of a float dtype"),
        ({"behaviour_logprob_N": BEHAVIOUR.to("meta")}, "behaviour_logprob_N is on meta, and should be on cpu"),
        ({"logprob_N": spoilt(STUDENT, math.nan)}, "^logprob_N holds nan, and should hold log-probs: at most 0"),
        ({"logprob_N": spoilt(STUDENT, 0.5)}, "^logprob_N holds 0.5, and should hold log-probs: at most 0"),
        ({"logprob_N": spoilt(STUDENT, -math.inf)}, "^logprob_N holds -inf in row 2, and should be finite: the token"),
        ({"behaviour_logprob_N": spoilt(BEHAVIOUR, math.nan)}, "behaviour_logprob_N holds nan, and should hold log-p"),
        ({"behaviour_logprob_N": spoilt(BEHAVIOUR, -math.inf)}, "behaviour_logprob_N holds -inf in row 2, and should"),
        (
            {"behaviour_logprob_N": spoilt(BEHAVIOUR, -math.inf), "check_finite": False},
            "behaviour_logprob_N holds -inf in row 2",
        ),
        ({"lengths": (4, 3)}, "lengths sum to 7, and should sum to 8, the tokens of logprob_N"),
        ({"lengths": (9, -1)}, "lengths is -1, and should be a whole number of at least 0"),
        ({"clip": 0.0}, "clip is 0.0, and should be above 0; inf clips nothing"),
        ({"clip": math.nan}, "clip is nan, and should be above 0"),
        ({"horizon": -1}, "horizon is -1, and should be a whole number of at least 0"),
        ({"horizon": 1.5}, "horizon is 1.5, and should be a whole number of at least 0"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logprob_N": STUDENT,
        "behaviour_logprob_N": BEHAVIOUR,
        "lengths": LENGTHS,
        "clip": 2.0,
        "horizon": 64,
    }
    with pytest.raises(DataError, match=message):
        prefix_weights(**{**arguments, **changes})
