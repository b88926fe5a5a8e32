"""The coarse-grained divergences against float64 enumeration of the whole vocabulary."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from topd_ray.errors import DataError
from topd_ray.objective import (
    Support,
    discounted_advantages,
    divergence,
    full_divergence,
    sampled_divergence,
    sampled_policy_gradient,
    topk_divergence,
)
from topd_ray.objective.divergence import MIN_LOGPROB, DivergenceKind

KINDS = get_args(DivergenceKind)
BETA = 0.3


def enumerated(student_NV: Tensor, teacher_NV: Tensor, kind: str) -> Tensor:
    def kl(left: Tensor, right: Tensor) -> Tensor:
        return (left.exp() * (left - right)).sum(1)

    if kind == "reverse":
        return kl(student_NV, teacher_NV)
    if kind == "forward":
        return kl(teacher_NV, student_NV)
    mixture = (BETA * teacher_NV.exp() + (1 - BETA) * student_NV.exp()).log()
    return BETA * kl(teacher_NV, mixture) + (1 - BETA) * kl(student_NV, mixture)


def logits_pair(seed: int, num_tokens: int, vocabulary: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(num_tokens, vocabulary, generator=generator, dtype=torch.float64)
    teacher = scale * torch.randn(num_tokens, vocabulary, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def build(teacher_NV: Tensor, sampled_N: Tensor, top_k: int) -> Support:
    logprobs, ids = teacher_NV.topk(top_k, 1)
    return Support.build(ids, logprobs, sampled_N, teacher_NV.gather(1, sampled_N[:, None]).squeeze(1))


def coarse(logits_NV: Tensor, support: Support, kind: str) -> Tensor:
    student_NC, _ = support.student_logp(*support.split(logits_NV))
    return divergence(student_NC, support.teacher_logp, support.mask, kind, BETA)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whole_vocabulary_gives_the_full_divergence_and_its_gradient(kind: str, dtype: torch.dtype) -> None:
    student, teacher = logits_pair(0, 8, 12, 2.0, torch.float64)
    teacher = teacher.log_softmax(1)
    sampled = torch.arange(8)
    reference = student.clone().requires_grad_()
    expected = enumerated(reference.log_softmax(1), teacher, kind)
    expected.sum().backward()
    ours = student.to(dtype).requires_grad_()
    actual = coarse(ours, build(teacher.to(dtype), sampled, 12), kind)
    actual.sum().backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
    assert reference.grad is not None and ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), reference.grad, atol=tolerance, rtol=tolerance)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 100_000),
    st.integers(0, 15),
    st.sampled_from(KINDS),
    st.floats(0.0, 12.0),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_never_negative_and_never_above_the_enumerated(
    seed: int, top_k: int, kind: str, scale: float, dtype: torch.dtype
) -> None:
    student, teacher = logits_pair(seed, 6, 15, scale, torch.float64)
    teacher = teacher.log_softmax(1)
    sampled = torch.randint(0, 15, (6,), generator=torch.Generator().manual_seed(seed))
    ours = student.to(dtype).requires_grad_()
    support = build(teacher.to(dtype), sampled, top_k)
    actual = coarse(ours, support, kind)
    actual.sum().backward()
    full = enumerated(student.log_softmax(1), teacher, kind)
    # 1 - sum knows the teacher's tail q to a few roundings of 1, which moves the divergence by at most roundings / q.
    slack = 4 * torch.finfo(dtype).eps * (1 / support.teacher_logp[:, -1].exp() + 10 * full)
    assert bool((actual >= 0.0).all())
    assert bool((actual.double() <= full + slack).all())
    assert ours.grad is not None and bool(ours.grad.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [0, 1, 4])
def test_coarse_graining_by_enumeration(kind: str, top_k: int) -> None:
    student, teacher = logits_pair(3, 5, 9, 1.5, torch.float64)
    teacher = teacher.log_softmax(1)
    sampled = torch.tensor([0, 1, 2, 3, int(teacher[4].argmax())])
    actual = coarse(student, build(teacher, sampled, top_k), kind)
    student = student.log_softmax(1)
    for row in range(5):
        kept = sorted({*teacher[row].topk(top_k).indices.tolist(), int(sampled[row])})
        lumped = [
            torch.cat([logp[row, kept], logp[row, [v for v in range(9) if v not in kept]].logsumexp(0, keepdim=True)])
            for logp in (student, teacher)
        ]
        expected = enumerated(lumped[0][None], lumped[1][None], kind)
        torch.testing.assert_close(actual[row : row + 1], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_more_teacher_tokens_never_give_less(kind: str) -> None:
    student, teacher = logits_pair(9, 8, 12, 2.0, torch.float64)
    teacher = teacher.log_softmax(1)
    values = torch.stack([coarse(student, build(teacher, torch.arange(8), top_k), kind) for top_k in range(13)])
    assert bool((values.diff(dim=0) >= -1e-12).all())
    torch.testing.assert_close(values[-1], enumerated(student.log_softmax(1), teacher, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [0, 3, 10])
def test_gradient_against_finite_differences(kind: str, top_k: int) -> None:
    student, teacher = logits_pair(4, 4, 10, 1.0, torch.float64)
    support = build(teacher.log_softmax(1), torch.tensor([0, 5, 9, 2]), top_k)
    assert torch.autograd.gradcheck(lambda logits: coarse(logits, support, kind), student.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [0, 5, 40])
def test_equal_models_give_no_loss_and_no_gradient(kind: str, top_k: int) -> None:
    logits, _ = logits_pair(5, 32, 40, 4.0, torch.float32)
    ours = logits.clone().requires_grad_()
    actual = coarse(ours, build(logits.log_softmax(1), torch.arange(32), top_k), kind)
    actual.sum().backward()
    assert float(actual.detach().max()) < 1e-6
    assert ours.grad is not None and float(ours.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_equal_columns_have_exactly_no_gradient(kind: str) -> None:
    """Not a constant that only the softmax's backward pass would cancel, up to rounding."""
    logp = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    student = logp.clone().requires_grad_()
    divergence(student, logp, torch.ones(4, 9, dtype=torch.bool), kind).sum().backward()  # type: ignore[arg-type]
    assert student.grad is not None and float(student.grad.abs().max()) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_below_float_resolution_still_teaches(kind: str) -> None:
    """The student's tail has mass 1e-13, the teacher's a half: 1 - sum in float32 would see no tail at all."""
    logits = torch.tensor([[30.0, 0.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    ours = logits.clone().requires_grad_()
    actual = coarse(ours, build(teacher, torch.tensor([0]), 1), kind)
    actual.sum().backward()
    reference = logits.double().requires_grad_()
    lumped = reference.log_softmax(1)
    lumped = torch.stack([lumped[:, 0], lumped[:, 1:].logsumexp(1)], dim=1)
    expected = enumerated(lumped, torch.full((1, 2), 0.5, dtype=torch.float64).log(), kind)
    expected.sum().backward()
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    assert ours.grad is not None and reference.grad is not None
    torch.testing.assert_close(ours.grad.double(), reference.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_may_not_make_the_teachers_tail_negative(kind: str) -> None:
    logprobs = torch.tensor([[0.5, 0.5 + 2e-7, 1e-9]]).log()
    support = Support.build(torch.tensor([[0, 1, 2]]), logprobs, torch.tensor([0]), logprobs[:, 0])
    logits = torch.zeros(1, 3, requires_grad=True)
    actual = coarse(logits, support, kind)
    actual.sum().backward()
    assert bool(support.is_floored.all()) and float(actual.detach()) < 20.0
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str) -> None:
    """Columns of log-prob -inf (trl#5594), whatever ids they hold, give the value and gradient of their absence."""
    student, teacher = logits_pair(6, 6, 11, 2.0, torch.float64)
    logprobs, ids = teacher.log_softmax(1).topk(3, 1)
    sampled = torch.arange(6)
    sampled_logprobs = teacher.log_softmax(1).gather(1, sampled[:, None]).squeeze(1)
    junk = torch.tensor([-1, 0, 999_999]).expand(6, 3)
    padded_ids = torch.cat([ids, junk, sampled[:, None]], dim=1)
    padded_logprobs = torch.cat([logprobs, torch.full((6, 4), -torch.inf)], dim=1)
    results = []
    for support in (
        Support.build(ids, logprobs, sampled, sampled_logprobs),
        Support.build(padded_ids, padded_logprobs, sampled, sampled_logprobs),
    ):
        logits = student.clone().requires_grad_()
        value = coarse(logits, support, kind)
        value.sum().backward()
        assert logits.grad is not None and bool(logits.grad.isfinite().all())
        results.append((value.detach(), logits.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_columns_may_hold_anything(kind: str) -> None:
    student = torch.tensor([[0.5, 0.0, 0.5]]).log().requires_grad_()
    teacher = torch.tensor([[0.25, 0.0, 0.75]]).log()
    mask = torch.tensor([[True, False, True]])
    value = divergence(student, teacher, mask, kind, BETA)  # type: ignore[arg-type]
    value.sum().backward()
    expected = enumerated(student.detach()[:, [0, 2]], teacher[:, [0, 2]], kind)
    torch.testing.assert_close(value.detach(), expected)
    assert student.grad is not None and bool(student.grad.isfinite().all()) and float(student.grad[0, 1]) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_unreachable_tokens_stay_finite(kind: str) -> None:
    """A sampled token that the teacher rules out, a teacher token that the student rules out."""
    logprobs = torch.tensor([[0.6, 0.4]]).log()
    support = Support.build(torch.tensor([[0, 1]]), logprobs, torch.tensor([2]), torch.tensor([-torch.inf]))
    logits = torch.tensor([[0.0, -torch.inf, 0.0, 1.0]], requires_grad=True)
    value = coarse(logits, support, kind)
    value.sum().backward()
    assert 0.0 < float(value.detach()) < -MIN_LOGPROB
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_only_the_student_has_are_pushed_down(kind: str) -> None:
    """Ids 4.. are the student's padded embedding rows; the teacher spreads all of its mass over 0 .. 3."""
    teacher = torch.zeros(1, 4).log_softmax(1)
    support = build(teacher, torch.tensor([1]), 4)
    logits = torch.zeros(1, 6, requires_grad=True)
    value = coarse(logits, support, kind)
    value.sum().backward()
    assert logits.grad is not None
    assert bool((logits.grad[0, 4:] > 0.01).all()) and bool((logits.grad[0, :4] < 0).all())


def test_student_log_probs_are_of_the_whole_softmax() -> None:
    student, teacher = logits_pair(7, 5, 30, 3.0, torch.float64)
    support = build(teacher.log_softmax(1), torch.arange(5), 6)
    student_NC, normaliser = support.student_logp(*support.split(student))
    torch.testing.assert_close(normaliser, student.logsumexp(1))
    expected = student.log_softmax(1).gather(1, support.ids).masked_fill(~support.mask[:, :-1], 0.0)
    torch.testing.assert_close(student_NC[:, :-1], expected)
    mass = (student_NC.exp() * support.mask).sum(1)
    torch.testing.assert_close(mass, torch.ones_like(mass))


def test_nan_in_is_nan_out() -> None:
    logprobs = torch.tensor([[float("nan"), -1.0]])
    support = Support.build(torch.tensor([[0, 1]]), logprobs, torch.tensor([2]), torch.tensor([-2.0]))
    assert bool(coarse(torch.zeros(1, 4), support, "reverse").isnan().all())


def test_shapes_are_checked() -> None:
    with pytest.raises(DataError, match=r"topk_logprobs has shape \[2, 2\], and should have \[2, 3\]"):
        Support.build(torch.zeros(2, 3).long(), torch.zeros(2, 2), torch.zeros(2).long(), torch.zeros(2))


def test_policy_gradient_in_expectation_is_the_gradient_of_the_reverse_kl() -> None:
    student, teacher = logits_pair(8, 1, 7, 1.0, torch.float64)
    teacher = teacher.log_softmax(1)[0]
    behaviour = (student[0] + 0.3 * torch.arange(7).double().sin()).log_softmax(0)
    reference = student[0].clone().requires_grad_()
    enumerated(reference.log_softmax(0)[None], teacher[None], "reverse").sum().backward()
    ours = student[0].clone().requires_grad_()
    losses = sampled_policy_gradient(ours.log_softmax(0), teacher, behaviour, importance_clip=1e9)
    (behaviour.exp() * losses).sum().backward()
    assert reference.grad is not None and ours.grad is not None
    torch.testing.assert_close(ours.grad, reference.grad, atol=1e-12, rtol=1e-12)


def test_policy_gradient_truncates_its_weight() -> None:
    student = torch.tensor([-1.0, -1.0], requires_grad=True)
    losses = sampled_policy_gradient(student, torch.tensor([-3.0, -0.5]), torch.tensor([-4.0, -0.5]), 2.0)
    losses.sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.tensor([2.0 * 2.0, -float(torch.tensor(-0.5).exp()) * 0.5]))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), max_size=6), st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.integers(0, 99))
def test_discounted_advantages_are_summed_within_each_trajectory(
    lengths: list[int], discount: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.rand(2, sum(lengths), generator=generator, dtype=torch.float64).mul(-5).unbind()
    segments = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.long)) % 3  # ids may come again
    expected = []
    for part in (teacher - student).split(lengths):
        expected += [sum(discount**k * float(value) for k, value in enumerate(part[t:])) for t in range(len(part))]
    actual = discounted_advantages(student, teacher, segments, discount)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)


def test_undiscounted_future_gives_the_gradient_of_the_kl_of_trajectories() -> None:
    """All 27 trajectories of three tokens; the student's distribution of a token depends on the one before."""
    generator = torch.Generator().manual_seed(3)
    logits, teacher = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).unbind()
    leaf = logits.requires_grad_()
    student, teacher = leaf.log_softmax(1), teacher.log_softmax(1)
    trajectories = torch.cartesian_prod(*[torch.arange(3)] * 3)
    before = torch.cat([torch.full((27, 1), 3), trajectories[:, :2]], dim=1)
    of_student, of_teacher = student[before, trajectories], teacher[before, trajectories]
    weight = of_student.sum(1).exp()
    expected = (weight * (of_student - of_teacher).sum(1)).sum()
    flat = of_student.reshape(-1), of_teacher.reshape(-1)
    advantages = discounted_advantages(*flat, torch.arange(27).repeat_interleave(3), 1.0)
    losses = sampled_policy_gradient(*flat, flat[0].detach(), 2.0, advantages)
    actual = (weight.detach().repeat_interleave(3) * losses).sum()
    gradients = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_discounted_advantages_of_odd_input() -> None:
    nan, ruled_out = torch.tensor([-1.0, float("nan"), -1.0]), torch.tensor([-2.0, -2.0, -torch.inf])
    found = discounted_advantages(nan, ruled_out, torch.tensor([0, 0, 1]), 0.5)
    assert found.isnan().tolist() == [True, True, False] and float(found[2]) == MIN_LOGPROB + 1.0
    for arguments, message in (
        ((nan, ruled_out, torch.tensor([0, 0, 1]), 1.5), "discount is 1.5, and should lie in"),
        ((nan, ruled_out[:2], torch.tensor([0, 0, 1]), 0.5), r"teacher_logp_N has shape \[2\], and should have \[3\]"),
        ((nan, -ruled_out, torch.tensor([0, 0, 1]), 0.5), "teacher_logp_N holds 2.0, and should hold log-probs"),
        ((nan, ruled_out, torch.tensor([0.0, 0.0, 1.0]), 0.5), "segment_ids"),
    ):
        with pytest.raises(DataError, match=message):
            discounted_advantages(*arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_divergence_of_logits(kind: str, temperature: float) -> None:
    student, teacher = logits_pair(20, 6, 13, 2.0, torch.float64)
    ours = student.clone().requires_grad_()
    actual = full_divergence(ours, teacher, kind, BETA, temperature=temperature)  # type: ignore[arg-type]
    reference = student.clone().requires_grad_()
    right = enumerated((reference / temperature).log_softmax(1), (teacher / temperature).log_softmax(1), kind)
    torch.testing.assert_close(actual, right, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(value.sum(), leaf)[0] for value, leaf in ((actual, ours), (right, reference))]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: full_divergence(x, teacher, kind, BETA), ours)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_full_divergence_in_low_precision_is_that_of_the_rounded_logits(kind: str) -> None:
    student, teacher = logits_pair(21, 6, 13, 2.0, torch.bfloat16)
    actual = full_divergence(student, teacher, kind, BETA)  # type: ignore[arg-type]
    right = enumerated(student.double().log_softmax(1), teacher.double().log_softmax(1), kind)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), right, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_ruled_out_on_both_sides_do_not_exist(kind: str) -> None:
    student, teacher = logits_pair(22, 4, 9, 1.0, torch.float64)
    kept = torch.arange(9) < 6
    ours = student.masked_fill(~kept, -torch.inf).requires_grad_()
    actual = full_divergence(ours, teacher.masked_fill(~kept, -torch.inf), kind, BETA)  # type: ignore[arg-type]
    right = enumerated(student[:, :6].log_softmax(1), teacher[:, :6].log_softmax(1), kind)
    torch.testing.assert_close(actual, right, atol=1e-12, rtol=1e-12)
    (gradient,) = torch.autograd.grad(actual.sum(), ours)
    assert bool(gradient.isfinite().all()) and float(gradient[:, 6:].abs().max()) < 1e-40


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 100_000), st.integers(1, 15), st.sampled_from(KINDS), st.booleans())
def test_topk_divergence_never_exceeds_the_full_one(seed: int, top_k: int, kind: DivergenceKind, sampled: bool) -> None:
    student, teacher = logits_pair(seed, 5, 15, 2.0, torch.float64)
    logprobs, ids = teacher.log_softmax(1).topk(top_k, 1)
    sampled_ids = torch.arange(5)
    extra = {
        "sampled_ids": sampled_ids,
        "sampled_logprobs": teacher.log_softmax(1).gather(1, sampled_ids[:, None]).squeeze(1),
    }
    actual = topk_divergence(student, ids, logprobs, kind, BETA, **(extra if sampled else {}))
    full = full_divergence(student, teacher, kind, BETA)
    assert bool((actual >= 0.0).all()) and bool((actual <= full + 1e-12).all())
    if top_k == 15:
        torch.testing.assert_close(actual, full, atol=1e-12, rtol=1e-12)
    kept = ids if not sampled else torch.cat([ids, sampled_ids[:, None]], dim=1)
    inside = torch.zeros(5, 15, dtype=torch.bool).scatter(1, kept, True)
    for row in range(5):
        columns = [
            torch.cat([logp[row][inside[row]], logp[row][~inside[row]].logsumexp(0, keepdim=True)])[None]
            for logp in (student.log_softmax(1), teacher.log_softmax(1))
        ]
        if top_k < 14:
            torch.testing.assert_close(actual[row : row + 1], enumerated(*columns, kind), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_divergence_is_that_of_no_topk(kind: str) -> None:
    student, teacher = logits_pair(23, 8, 10, 2.0, torch.float64)
    sampled = torch.arange(8)
    ours = student.clone().requires_grad_()
    of_student = ours.log_softmax(1).gather(1, sampled[:, None]).squeeze(1)
    of_teacher = teacher.log_softmax(1).gather(1, sampled[:, None]).squeeze(1)
    actual = sampled_divergence(of_student, of_teacher, kind, BETA)  # type: ignore[arg-type]
    reference = student.clone().requires_grad_()
    right = coarse(reference, build(teacher.log_softmax(1), sampled, 0), kind)
    torch.testing.assert_close(actual, right, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(value.sum(), leaf)[0] for value, leaf in ((actual, ours), (right, reference))]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_divergence_of_certain_and_impossible_tokens_is_finite(kind: str) -> None:
    student = torch.tensor([0.0, -torch.inf, -1e-9, -2.0], requires_grad=True)
    teacher = torch.tensor([0.0, -1.0, -torch.inf, -torch.inf])
    value = sampled_divergence(student, teacher, kind, BETA)  # type: ignore[arg-type]
    value.sum().backward()
    assert bool(value.isfinite().all()) and bool((value >= 0.0).all()) and float(value.detach()[0]) < 1e-7
    assert student.grad is not None and bool(student.grad.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_padding_may_stand_in_any_column(kind: DivergenceKind) -> None:
    student, teacher = logits_pair(9, 3, 7, 1.0, torch.float64)
    logprobs, ids = teacher.log_softmax(1).topk(2, 1)
    padding = torch.full((3, 1), -torch.inf, dtype=torch.float64)
    expected = topk_divergence(student, ids, logprobs, kind, BETA)
    for stray in (0, 99):  # whatever its id
        found = topk_divergence(
            student, torch.cat([torch.full((3, 1), stray), ids], 1), torch.cat([padding, logprobs], 1), kind, BETA
        )
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    leaf = student.clone().requires_grad_()
    nothing = topk_divergence(leaf, torch.full((3, 2), 99), padding.expand(3, 2), kind, BETA)
    assert float(nothing.detach().abs().max()) < 1e-15
    assert float(torch.autograd.grad(nothing.sum(), leaf)[0].abs().max()) < 1e-15


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = (x.log_softmax(1).requires_grad_() for x in logits_pair(10, 3, 5, 1.0, torch.float64))
    logprobs, ids = teacher.topk(2, 1)
    row = teacher[:, 0]
    values = (
        divergence(student, teacher),
        topk_divergence(student, ids, logprobs, sampled_ids=ids[:, 1], sampled_logprobs=logprobs[:, 1]),
        topk_divergence(student, ids, logprobs),
        sampled_policy_gradient(student[:, 0], row, row, 2.0),
    )
    for value in values:
        to_student, to_teacher = torch.autograd.grad(value.sum(), (student, teacher), allow_unused=True)
        assert to_teacher is None and bool(to_student.any())


def test_a_support_is_at_least_float32() -> None:
    logprobs = torch.tensor([[-0.5, -1.5]])
    narrow = Support.build(torch.tensor([[0, 1]]), logprobs.bfloat16(), torch.tensor([2]), torch.tensor([-3.0]).half())
    wide = Support.build(torch.tensor([[0, 1]]), logprobs, torch.tensor([2]), torch.tensor([-3.0]))
    assert torch.equal(narrow.teacher_logp, wide.teacher_logp)
