"""The loss where training runs it: autocast, checkpointing, tied heads, padded vocabularies, parts of a sequence."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.loss_case import COUNTS, NUM_GUIDED, SPEC, Case, D, N, V, assert_gradient, figures, ours
from topd_ray.objective import (
    LossBatch,
    LossSpec,
    discounted_advantages,
    student_logprobs,
    token_losses,
    topd_loss,
    trajectory_medians,
)
from topd_ray.objective.head import BLOCK_ELEMENTS, Head

DIVERGENCES = ("reverse", "forward", "jsd")
EXACT = {"atol": 1e-12, "rtol": 1e-12}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", 1)


def relative_error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_autocast_is_close_to_float32(divergence: str) -> None:
    """The product rounds to bfloat16 (2^-9): loss within 2 %, gradients within 5 % in norm; all stay float32."""
    case = Case(30, torch.float32)
    batch, spec = case.batch(6), replace(SPEC, divergence=divergence)  # type: ignore[arg-type]
    exact = ours(case, batch, spec)
    with torch.autocast("cpu", torch.bfloat16):
        rough = ours(case, batch, spec)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=0.02)
    for found, right in zip(case.gradients(rough), case.gradients(exact), strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, right) < 0.05


def test_autocast_gives_what_a_bfloat16_head_gives() -> None:
    low, case = Case(31, torch.bfloat16), Case(31, torch.float32)
    case.hidden, case.head = (x.detach().float().requires_grad_() for x in (low.hidden, low.head))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(case, case.batch(6))
    expected = ours(low, low.batch(6))
    torch.testing.assert_close(loss, expected)
    for found, right in zip(case.gradients(loss), low.gradients(expected), strict=True):
        torch.testing.assert_close(found.bfloat16(), right)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing(use_reentrant: bool) -> None:
    case = Case(32)
    batch = case.batch(5)
    weight = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def layers_and_loss(hidden: Tensor) -> Tensor:
        return topd_loss(torch.tanh(hidden @ weight), case.head, batch, SPEC, **COUNTS)[0]

    leaves = (case.hidden, case.head, weight)
    layers_and_loss(case.hidden).backward()
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    checkpoint(layers_and_loss, case.hidden, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], expected, **EXACT)


def test_a_tied_head_gets_both_gradients() -> None:
    """The same matrix embeds the prompt and reads out the logits."""
    case = Case(33)
    batch = case.batch(V)
    ids = torch.arange(N) % V

    def gradient(loss_of: Any) -> Tensor:
        weight = case.head.detach().clone().requires_grad_()
        loss_of(weight).backward()
        assert weight.grad is not None
        return weight.grad

    def fused(weight: Tensor) -> Tensor:
        return topd_loss(torch.tanh(weight[ids]), weight, batch, SPEC, **COUNTS)[0]

    def naive(weight: Tensor) -> Tensor:
        twin = Case(33)
        twin.hidden, twin.head = torch.tanh(weight[ids]), weight
        return twin.naive(SPEC)

    torch.testing.assert_close(gradient(fused), gradient(naive), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_side_gets_no_gradient_and_changes_nothing(frozen: str) -> None:
    case = Case(34)
    expected = ours(case, case.batch(5))
    gradients = dict(zip(("hidden", "head"), case.gradients(expected), strict=True))
    setattr(case, frozen, getattr(case, frozen).detach())
    loss = ours(case, case.batch(5))
    other = "head" if frozen == "hidden" else "hidden"
    torch.testing.assert_close(torch.autograd.grad(loss, getattr(case, other))[0], gradients[other], **EXACT)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("num_padding", [1, 7, 40])
def test_padded_rows_take_no_part(softcap: float | None, num_padding: int) -> None:
    """The teacher's vocabulary is V, the student's head has more rows (151,936 against 152,064; trl#2215)."""
    case = Case(35)
    batch, spec = case.batch(6), replace(SPEC, logit_softcap=softcap)
    expected = ours(case, batch, spec)
    hidden_grad, head_grad = case.gradients(expected)
    logprobs = student_logprobs(case.hidden, case.head, case.sampled, logit_softcap=softcap)
    # Rows that would win every softmax, or spoil it.
    padding = torch.full((num_padding, D), 1e3, dtype=torch.float64)
    padding[0] = torch.nan
    case.head = torch.cat([case.head.detach(), padding]).requires_grad_()
    loss = ours(case, batch, spec, num_vocabulary=V)
    torch.testing.assert_close(loss, expected, **EXACT)
    found_hidden, found_head = case.gradients(loss)
    torch.testing.assert_close(found_hidden, hidden_grad, **EXACT)
    torch.testing.assert_close(found_head[:V], head_grad, **EXACT)
    assert float(found_head[V:].abs().max()) == 0.0
    found = student_logprobs(case.hidden, case.head, case.sampled, logit_softcap=softcap, num_vocabulary=V)
    torch.testing.assert_close(found, logprobs, **EXACT)


def test_a_softcap_that_saturates_loses_no_gradient() -> None:
    """Logits far above the cap, where 1 - tanh^2 is 1e-6: float32 against float64, and against finite differences."""
    case = Case(36)
    case.hidden = (6.0 * case.hidden.detach()).requires_grad_()
    spec = replace(SPEC, logit_softcap=4.0)
    batch = case.batch(5)
    assert_gradient(lambda hidden, head: topd_loss(hidden, head, batch, spec, **COUNTS)[0], (case.hidden, case.head))
    exact = case.gradients(ours(case, batch, spec))
    case.hidden, case.head = (x.detach().float().requires_grad_() for x in (case.hidden, case.head))
    for found, right in zip(case.gradients(ours(case, batch, spec)), exact, strict=True):
        assert relative_error(found, right) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [{}, {"guidance_reduction": "sum"}, {"logit_softcap": 1.5}, {"method": "opd"}, {"divergence": "sampled_pg"}],
)
@pytest.mark.parametrize("edges", [(0, 12, N), (0, 1, 9, 10, N), (0, 5, 5, N)])
def test_parts_of_a_sequence_add_up(changes: dict[str, Any], edges: tuple[int, ...]) -> None:
    """Context parallelism: a rank holds some positions of a trajectory, or none."""
    case = Case(37)
    batch, spec = case.batch(5), replace(SPEC, **changes)
    whole = ours(case, batch, spec)
    parts = [
        topd_loss(case.hidden[start:stop], case.head, part, spec, **COUNTS)[0]
        for (start, stop), part in zip(pairwise(edges), batch.split(edges), strict=True)
    ]
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole, **EXACT)
    torch.testing.assert_close(case.gradients(total), case.gradients(whole), **EXACT)


def test_parts_of_a_sequence_with_caps_need_the_medians_of_the_whole() -> None:
    case = Case(38)
    batch = case.batch(5, torch.arange(N) % 2 == 0)
    whole = ours(case, batch)
    edges = (0, 4, 12, N)
    shards = [
        (case.hidden[start:stop], part) for (start, stop), part in zip(pairwise(edges), batch.split(edges), strict=True)
    ]
    losses = torch.cat([token_losses(hidden, case.head, part, SPEC) for hidden, part in shards])
    medians = trajectory_medians(losses, batch.segment_ids).split([4, 8, 12])
    total = torch.stack(
        [
            topd_loss(hidden, case.head, part, SPEC, **COUNTS, median_N=median)[0]
            for (hidden, part), median in zip(shards, medians, strict=True)
        ]
    ).sum()
    torch.testing.assert_close(total, whole, **EXACT)
    torch.testing.assert_close(case.gradients(total), case.gradients(whole), **EXACT)
    alone = torch.stack([topd_loss(hidden, case.head, part, SPEC, **COUNTS)[0] for hidden, part in shards]).sum()
    assert abs(float((alone - whole).detach())) > 1e-4


def test_context_parallel_shards_with_a_discounted_future_add_up() -> None:
    """The shards cut through trajectories; their advantages come from all of them together."""
    case, spec = Case(36), replace(SPEC, divergence="sampled_pg", kl_discount=0.7)
    batch = case.batch(5)
    whole = ours(case, batch, spec)
    edges = (0, 4, 12, N)
    hidden = [case.hidden[start:stop] for start, stop in pairwise(edges)]
    parts = batch.split(edges)
    logprobs = [
        student_logprobs(rows, case.head, part.sampled_ids, SPEC.temperature)
        for rows, part in zip(hidden, parts, strict=True)
    ]
    advantages = discounted_advantages(torch.cat(logprobs), batch.teacher_sampled_logprobs, batch.segment_ids, 0.7)
    shards = replace(batch, advantage_N=advantages).split(edges)
    losses = [topd_loss(rows, case.head, part, spec, **COUNTS)[0] for rows, part in zip(hidden, shards, strict=True)]
    total = torch.stack(losses).sum()
    torch.testing.assert_close(total, whole, **EXACT)
    torch.testing.assert_close(case.gradients(total), case.gradients(whole), **EXACT)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(0.0, 9.0)), max_size=30))
def test_trajectory_medians_are_numpys(rows: list[tuple[int, float]]) -> None:
    segments = torch.tensor([segment for segment, _ in rows], dtype=torch.long)
    losses = torch.tensor([loss for _, loss in rows], dtype=torch.float64)
    expected = [float(losses[segments == segment].quantile(0.5)) for segment in segments.tolist()]
    assert trajectory_medians(losses, segments).tolist() == pytest.approx(expected)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    chunk_tokens=st.none() | st.integers(1, N + 3),
    top_k=st.integers(0, V),
    spec=st.fixed_dictionaries(
        {
            "divergence": st.sampled_from([*DIVERGENCES, "sampled_pg"]),
            "method": st.sampled_from(["topd", "opd"]),
            "logit_softcap": st.sampled_from([None, 3.0]),
            "temperature": st.sampled_from([1.0, 0.6]),
        }
    ),
    bias=st.booleans(),
    capped=st.booleans(),
    block=st.sampled_from([1, 24 * 20, 2**19]),
)
def test_chunks_and_blocks_change_nothing(
    seed: int, chunk_tokens: int | None, top_k: int, spec: dict[str, Any], bias: bool, capped: bool, block: int
) -> None:
    case = Case(seed)
    is_capped = torch.arange(N) % 3 == 0 if capped and spec["divergence"] != "sampled_pg" else None
    batch = case.batch(top_k, is_capped)
    offsets = torch.linspace(-1, 1, V, dtype=torch.float64).requires_grad_() if bias else None
    leaves = [case.hidden, case.head, *([offsets] if offsets is not None else [])]

    def results(spec: LossSpec, elements: int) -> tuple[Tensor, ...]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(BLOCK_ELEMENTS, "cpu", elements)
            loss = ours(case, batch, spec, head_bias=offsets)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

    whole = results(LossSpec(chunk_tokens=N, **spec), 2**19)
    torch.testing.assert_close(results(LossSpec(chunk_tokens=chunk_tokens, **spec), block), whole, **EXACT)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.permutations(range(N)))
def test_the_order_of_tokens_changes_nothing(seed: int, order: list[int]) -> None:
    case = Case(seed)
    batch = case.batch(4, torch.arange(N) % 4 == 1, torch.linspace(0.0, 2.0, N))
    expected = ours(case, batch)
    hidden_grad, head_grad = case.gradients(expected)
    case.hidden = case.hidden.detach()[order].requires_grad_()
    loss = ours(case, reordered(batch, order))
    torch.testing.assert_close(loss, expected, **EXACT)
    found_hidden, found_head = case.gradients(loss)
    torch.testing.assert_close(found_hidden, hidden_grad[order], **EXACT)
    torch.testing.assert_close(found_head, head_grad, **EXACT)


def reordered(batch: LossBatch, order: list[int]) -> LossBatch:
    rows = [batch.rows(index, index + 1) for index in order]
    given_names = [name for name in LossBatch.__slots__ if getattr(batch, name) is not None]
    columns = {name: torch.cat([getattr(row, name) for row in rows]) for name in given_names if name != "target_indptr"}
    counts = torch.tensor([0, *(len(row.target_ids) for row in rows)])
    return LossBatch(**columns, target_indptr=counts.cumsum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time(dtype: torch.dtype) -> None:
    def results() -> tuple[Tensor, ...]:
        case = Case(39, dtype)
        loss = ours(case, case.batch(5, torch.arange(N) % 2 == 0))
        return loss.detach(), *case.gradients(loss)

    for found, expected in zip(results(), results(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nothing_is_read_before_it_is_written(dtype: torch.dtype) -> None:
    """PyTorch's deterministic mode fills new memory with NaN."""
    case = Case(42, dtype)
    batch, spec = case.batch(5, torch.arange(N) % 2 == 0), replace(SPEC, logit_softcap=3.0)
    expected = ours(case, batch, spec)
    gradients = case.gradients(expected)
    torch.use_deterministic_algorithms(True)
    try:
        loss = ours(case, batch, spec)
        found = case.gradients(loss)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(loss, expected)
    assert all(torch.equal(one, other) for one, other in zip(found, gradients, strict=True))


def test_a_count_of_zero_makes_its_part_zero() -> None:
    case = Case(43)
    batch = case.batch(5)
    whole, no_tokens, no_guided = (
        topd_loss(case.hidden, case.head, batch, SPEC, num_tokens=num_tokens, num_guided=num_guided)[0]
        for num_tokens, num_guided in ((N, NUM_GUIDED), (0, NUM_GUIDED), (N, 0))
    )
    torch.testing.assert_close(no_tokens + no_guided, whole, **EXACT)
    torch.testing.assert_close(no_guided, ours(case, batch, replace(SPEC, method="opd")), **EXACT)


def test_a_loss_that_is_scaled_scales_its_gradients() -> None:
    case = Case(40)
    expected = case.gradients(ours(case, case.batch(5)))
    found = case.gradients(ours(case, case.batch(5)) * 3.0)
    torch.testing.assert_close(found, tuple(3.0 * one for one in expected), **EXACT)


def test_no_gradient_is_made_for_nobody() -> None:
    case = Case(41)
    expected = ours(case, case.batch(5)).detach()
    with torch.no_grad():
        loss = ours(case, case.batch(5))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, **EXACT)


def test_a_chunk_follows_from_the_memory_it_may_take() -> None:
    """48 MiB on a CPU or an eighth of the tokens, but for the first, which is stored in the weight's gradient."""

    def sizes(num_tokens: int, vocabulary: int, width: int, needs_grad: bool) -> list[int]:
        hidden, weight = torch.empty(num_tokens, width), torch.empty(vocabulary, width)
        head = Head(hidden, weight, None, LossSpec(), num_vocabulary=vocabulary, needs_grad=(needs_grad,) * 3)
        return [chunk.stop - chunk.start for chunk in head.chunks()]

    assert 48 * 2**20 // (32768 * 4) == 384
    assert sizes(2000, 32768, 600, needs_grad=False) == [336, 336, 336, 336, 336, 320]
    assert sizes(2000, 32768, 600, needs_grad=True) == [600, 352, 352, 352, 344]
    assert sizes(2000, 32768, 64, needs_grad=True) == [336, 336, 336, 336, 336, 320]
    assert sizes(500, 32768, 600, needs_grad=True) == [500]
    assert sizes(2000, 250_000, 8, needs_grad=True) == [224] * 8 + [208]
    assert sizes(20_000, 250_000, 2, needs_grad=True) == [1008] * 19 + [848]
    assert sizes(5, 100, 8, needs_grad=True) == [5]
    assert sizes(0, 100, 8, needs_grad=True) == [0]


def test_gradients_are_handed_out_once() -> None:
    """They have no copy: a second backward pass would scale, or add to, what the first gave away."""
    case = Case(42)
    loss = ours(case, case.batch(5))
    (first,) = torch.autograd.grad(loss, case.hidden, retain_graph=True)
    before = first.clone()
    with pytest.raises(RuntimeError, match="topd_loss makes its gradients once"):
        torch.autograd.grad(5 * loss, case.hidden)
    assert torch.equal(first, before)
    with pytest.raises(RuntimeError, match="topd_loss has no second derivative"):
        torch.autograd.grad(ours(case, case.batch(5)), case.hidden, create_graph=True)


def test_the_scale_of_a_loss_is_not_rounded() -> None:
    """To bfloat16, 0.33075 would be 0.3301; the gradient is rounded once more, each value of its own."""
    case = Case(43, torch.bfloat16)
    (plain,) = torch.autograd.grad(ours(case, case.batch(5)), case.head)
    (scaled,) = torch.autograd.grad(0.33075 * ours(case, case.batch(5)), case.head)
    assert torch.equal(scaled, (plain.double() * torch.tensor(0.33075).double()).bfloat16())


def test_teachers_of_low_precision_are_widened() -> None:
    case = Case(44)
    batch = case.batch(5)
    fields = ("teacher_topk_logprobs", "teacher_sampled_logprobs")
    narrow = replace(batch, **{name: getattr(batch, name).bfloat16() for name in fields})
    wide = replace(batch, **{name: getattr(narrow, name).float() for name in fields})
    assert torch.equal(ours(case, narrow), ours(case, wide))
    assert torch.equal(*(token_losses(case.hidden, case.head, one, SPEC) for one in (narrow, wide)))


def test_the_teachers_order_does_not_matter() -> None:
    case = Case(45)
    batch = case.batch(5)
    turned = replace(
        batch,
        teacher_topk_ids=batch.teacher_topk_ids.flip(1),
        teacher_topk_logprobs=batch.teacher_topk_logprobs.flip(1),
    )
    found, expected = figures(case, turned), figures(case, batch)
    assert found["teacher_top1"] == expected["teacher_top1"]
