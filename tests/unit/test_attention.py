"""Attention over a packed row, against softmax written out."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from topd_ray.engines.attention import Segments, packed_attention

CPU = torch.device("cpu")
MODULE = torch.nn.Module()


def make_row(lengths: list[int], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query [1, 4, P, 8], key and value [1, 2, P, 8], laid out as a model makes them."""
    draw = torch.Generator().manual_seed(seed)
    row = [torch.randn(1, sum(lengths), heads, 8, generator=draw, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2)]
    return [one.requires_grad_() for one in row]


def attend(row: list[torch.Tensor], lengths: list[int], **arguments: Any) -> torch.Tensor:
    out, _ = packed_attention(MODULE, *row, None, segments=Segments.of(tuple(lengths), CPU), **arguments)
    return out


def written_out(row: list[torch.Tensor], lengths: list[int], scaling: float, window: int | None) -> torch.Tensor:
    """softmax(scaling q k^T + mask) v over the whole row, [1, P, H, D]."""
    query, key, value = row
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    distance = place[:, None] - place
    seen = (owner[:, None] == owner) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2)


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 14),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_softmax(lengths: list[int], window: int | None, seed: int) -> None:
    row = make_row(lengths, seed=seed)
    found = attend(row, lengths, scaling=0.3, sliding_window=window)
    right = written_out(row, lengths, 0.3, window)
    torch.testing.assert_close(found, right)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed), dtype=found.dtype)
    for mine, theirs in zip(
        torch.autograd.grad(found, row, upstream), torch.autograd.grad(right, row, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_another_trajectory_changes_no_bit() -> None:
    lengths = [5, 1, 9, 3]
    row, other = make_row(lengths, dtype=torch.float32), make_row(lengths, seed=1, dtype=torch.float32)
    mixed = [torch.cat([theirs[:, :, :6], mine[:, :, 6:]], 2) for mine, theirs in zip(row, other, strict=True)]
    before, after = attend(row, lengths), attend(mixed, lengths)
    assert torch.equal(before[:, 6:], after[:, 6:])
    assert not torch.equal(before[:, 5:6], after[:, 5:6])
    alone = attend([one[:, :, 6:15] for one in row], [9])
    assert torch.equal(before[:, 6:15], alone)


def test_bfloat16_is_within_its_rounding() -> None:
    row = make_row([20, 7], dtype=torch.bfloat16)
    right = written_out([one.double() for one in row], [20, 7], 8**-0.5, None)
    assert (attend(row, [20, 7]) - right).abs().max() < 2e-2


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"is_causal": False}, "a mask of its own"),
        ({"segments": None}, "no segments"),
    ],
)
def test_other_attention_is_refused(arguments: dict[str, Any], what: str) -> None:
    arguments = {"segments": Segments.of((3,), CPU), **arguments}
    with pytest.raises(NotImplementedError, match=f"Module asks for {what}: this is plain causal attention"):
        packed_attention(MODULE, *make_row([3]), None, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_variable_length_attention_is_that_of_softmax(window: int | None) -> None:
    lengths = [20, 1, 130]
    row = make_row(lengths, dtype=torch.bfloat16)
    on_gpu = [one.detach().cuda().requires_grad_() for one in row]
    segments = Segments.of(tuple(lengths), torch.device("cuda"))
    found, _ = packed_attention(MODULE, *on_gpu, None, segments=segments, scaling=0.3, sliding_window=window)
    exact = [one.detach().double().requires_grad_() for one in row]
    right = written_out(exact, lengths, 0.3, window)
    assert (found.cpu() - right).abs().max() < 3e-2
    for mine, theirs in zip(
        torch.autograd.grad(found.sum(), on_gpu), torch.autograd.grad(right.sum(), exact), strict=True
    ):
        assert (mine.cpu() - theirs).norm() < 3e-2 * theirs.norm()
