"""The chunked loss against naive full-vocabulary autograd in float64, window by window and token by token."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.loss_case import NUM_GUIDED, SEGMENTS, SPEC, Case, D, N, V, assert_gradient, figures, full_divergence, ours
from topd_ray.objective import LossMetrics, cap_mask, prefix_weights, student_logprobs, topd_loss
from topd_ray.objective.head import BLOCK_ELEMENTS
from topd_ray.types import Metric

ALL_DIVERGENCES = pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows: three for this vocabulary. (A chunk of up to 11 tokens is stored in the weight's gradient.)"""
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", 1)


@ALL_DIVERGENCES
@pytest.mark.parametrize("changes", [{}, {"guidance_reduction": "sum"}, {"method": "opd"}, {"logit_softcap": 1.5}])
def test_whole_vocabulary_is_the_naive_loss(divergence: str, changes: dict[str, Any]) -> None:
    case = Case()
    spec = replace(SPEC, divergence=divergence, jsd_beta=0.3, **changes)  # type: ignore[arg-type]
    actual, expected = ours(case, case.batch(), spec), case.naive(spec)
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(case.gradients(actual), case.gradients(expected), atol=1e-11, rtol=1e-11)


@ALL_DIVERGENCES
@pytest.mark.parametrize("chunk_tokens", [4, 17, None])
def test_everything_at_once_is_the_naive_loss(divergence: str, chunk_tokens: int | None) -> None:
    """Guidance, caps, softcap, temperature and a bias."""
    case = Case(2)
    case.bias = torch.linspace(-1, 1, V, dtype=torch.float64).requires_grad_()
    capped = torch.arange(N) % 2 == 1
    changes = {"divergence": divergence, "jsd_beta": 0.7, "logit_softcap": 2.5, "chunk_tokens": chunk_tokens}
    spec = replace(SPEC, temperature=0.7, guidance_weight=0.9, **changes)  # type: ignore[arg-type]
    actual, expected = ours(case, case.batch(capped=capped), spec), case.naive(spec, capped)
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(case.gradients(actual), case.gradients(expected), atol=1e-11, rtol=1e-11)


@ALL_DIVERGENCES
@pytest.mark.parametrize("changes", [{}, {"method": "opd"}, {"guidance_reduction": "sum", "logit_softcap": 2.5}])
def test_weights_multiply_every_term_of_their_position(divergence: str, changes: dict[str, Any]) -> None:
    """After caps, whose medians are of losses without weights; a (window, position) pair has its position's."""
    case, weight = Case(4), 2.0 * torch.rand(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weight[5] = 0.0
    capped = torch.arange(N) % 2 == 1
    spec = replace(SPEC, divergence=divergence, jsd_beta=0.3, **changes)  # type: ignore[arg-type]
    actual, expected = ours(case, case.batch(V, capped, weight), spec), case.naive(spec, capped, weight)
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(case.gradients(actual), case.gradients(expected), atol=1e-11, rtol=1e-11)
    assert abs(float((expected - case.naive(spec, capped)).detach())) > 1e-3


def test_weights_of_one_are_none() -> None:
    case, ones = Case(5), torch.ones(N, dtype=torch.float64)
    capped = torch.arange(N) % 2 == 1
    actual, expected = ours(case, case.batch(6, capped, ones)), ours(case, case.batch(6, capped))
    assert torch.equal(actual, expected)
    for one, other in zip(case.gradients(actual), case.gradients(expected), strict=True):
        assert torch.equal(one, other)


@ALL_DIVERGENCES
def test_gradient_against_finite_differences(divergence: str) -> None:
    case = Case(1)
    batch = case.batch(4)
    bias = torch.linspace(-1, 1, V, dtype=torch.float64).requires_grad_()
    spec = replace(SPEC, divergence=divergence, logit_softcap=3.0)  # type: ignore[arg-type]

    def loss(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        return topd_loss(hidden, head, batch, spec, num_tokens=N, num_guided=NUM_GUIDED, head_bias=bias)[0]

    assert_gradient(loss, (case.hidden, case.head, bias))


def test_policy_gradient_is_the_frozen_surrogate() -> None:
    case = Case(1)
    batch = case.batch(4)
    student = case.student().gather(1, case.sampled[:, None]).squeeze(1)
    weight = (student - batch.behaviour_logprobs).exp().clamp(max=2.0).detach()
    expected = -(weight * (batch.teacher_sampled_logprobs - student.detach()) * student).sum() / N
    actual = ours(case, batch, replace(SPEC, divergence="sampled_pg", method="opd"))
    torch.testing.assert_close(case.gradients(actual), case.gradients(expected), atol=1e-12, rtol=1e-12)


def test_policy_gradient_takes_the_ratio_of_prefix_and_token_once_each() -> None:
    """Where neither is clipped, their product is the ratio of the prefix with the token: no ratio comes twice."""
    case = Case(1)
    student = case.student().gather(1, case.sampled[:, None]).squeeze(1)
    behaviour = student.detach() + 0.1 * torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    case.behaviour = behaviour.clamp(max=0.0)
    weight = prefix_weights(student.detach(), case.behaviour, SEGMENTS, clip=1e9, horizon=N)
    batch = case.batch(4, weight=weight)
    log_ratios = (student.detach() - case.behaviour).split(SEGMENTS)
    whole = torch.cat([part.cumsum(0) for part in log_ratios]).exp()
    expected = -(whole * (batch.teacher_sampled_logprobs - student.detach()) * student).sum() / N
    spec = replace(SPEC, divergence="sampled_pg", method="opd", importance_clip=1e9)
    torch.testing.assert_close(
        case.gradients(ours(case, batch, spec)), case.gradients(expected), atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize("method", ["opd", "topd"])
def test_policy_gradient_with_a_discounted_future(method: str) -> None:
    """Token by token, each trajectory on its own; the advantage is a constant, and the guidance is as ever."""
    case = Case(1)
    spec = replace(SPEC, divergence="sampled_pg", method=method, kl_discount=0.6)  # type: ignore[arg-type]
    student = case.student().gather(1, case.sampled[:, None]).squeeze(1)
    frozen, teacher = student.detach(), case.teacher.gather(1, case.sampled[:, None]).squeeze(1)
    rewards, advantages = (teacher - frozen).split(SEGMENTS), []
    for part in rewards:
        advantages += [sum(0.6**k * float(reward) for k, reward in enumerate(part[t:])) for t in range(len(part))]
    ratio = (frozen - case.behaviour).exp().clamp(max=spec.importance_clip)
    expected = -(ratio * torch.tensor(advantages, dtype=torch.float64) * student).sum() / N
    if method == "topd":
        expected = expected + case.naive(replace(SPEC)) - case.naive(replace(SPEC, method="opd"))
    actual = ours(case, case.batch(4), spec)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(case.gradients(actual), case.gradients(expected), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 24, 1000])
def test_chunk_size_changes_nothing(chunk_tokens: int) -> None:
    case = Case(3)
    batch = case.batch(5, torch.arange(N) % 3 == 0)
    reference, actual = ours(case, batch), ours(case, batch, replace(SPEC, chunk_tokens=chunk_tokens))
    torch.testing.assert_close(actual, reference, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(case.gradients(actual), case.gradients(reference), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_add_up(reduction: str) -> None:
    case = Case(4)
    batch = case.batch(5, torch.arange(N) % 2 == 0)
    spec = replace(SPEC, guidance_reduction=reduction)  # type: ignore[arg-type]
    whole = ours(case, batch, spec)
    counts = {"num_tokens": N, "num_guided": NUM_GUIDED, "num_trajectories": len(SEGMENTS)}
    ends = np.cumsum(SEGMENTS).tolist()
    parts = [
        topd_loss(case.hidden[start:stop], case.head, batch.rows(start, stop), spec, **counts)[0]
        for start, stop in pairwise([0, *ends])
    ]
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(case.gradients(total), case.gradients(whole), atol=1e-12, rtol=1e-12)


@ALL_DIVERGENCES
def test_caps_bring_losses_to_the_sample_median(divergence: str) -> None:
    case = Case(6)
    capped = torch.arange(N) % 2 == 0
    spec = replace(SPEC, divergence=divergence)  # type: ignore[arg-type]
    actual, expected = ours(case, case.batch(capped=capped), spec), case.naive(spec, capped)
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(case.gradients(actual), case.gradients(expected), atol=1e-11, rtol=1e-11)


def test_a_capped_token_alone_costs_the_median() -> None:
    case = Case(7)
    spec = replace(SPEC, method="opd")
    losses = full_divergence(case.student(), case.teacher, spec).detach()[: SEGMENTS[0]]
    worst = int(losses.argmax())
    capped = torch.arange(N) == worst
    saved = (ours(case, case.batch(), spec) - ours(case, case.batch(capped=capped), spec)).detach()
    assert float(saved) * N == pytest.approx(float(losses[worst] - losses.median()), abs=1e-9)
    best = torch.arange(N) == int(losses.argmin())
    torch.testing.assert_close(ours(case, case.batch(capped=best), spec), ours(case, case.batch(), spec))


def test_zero_and_all_candidates_capped() -> None:
    case = Case(8)
    nothing = torch.from_numpy(cap_mask([], [], 0.3, "low_ot", N, np.random.default_rng(0)))
    torch.testing.assert_close(ours(case, case.batch(capped=nothing)), case.naive(), atol=1e-11, rtol=1e-11)
    every = torch.from_numpy(cap_mask(range(N), [0.0] * N, 0.3, "low_ot", N, np.random.default_rng(0)))
    assert bool(every.all())
    actual = ours(case, case.batch(capped=every))
    torch.testing.assert_close(actual, case.naive(capped=every), atol=1e-11, rtol=1e-11)


def test_no_guidance_is_opd() -> None:
    case = Case(9)
    case.windows = [[], [], []]
    for num_guided in (0.0, NUM_GUIDED):
        loss, metrics = topd_loss(case.hidden, case.head, case.batch(5), SPEC, num_tokens=N, num_guided=num_guided)
        torch.testing.assert_close(loss, ours(case, case.batch(5), replace(SPEC, method="opd")))
        guidance = next(metric for metric in metrics.to_metrics() if metric.key == "guidance_kl")
        assert (guidance.sum, guidance.count) == (0.0, 0.0)


@ALL_DIVERGENCES
@pytest.mark.parametrize("top_k", [0, 3, V])
def test_student_equal_to_teacher_gives_no_loss_and_no_gradient(divergence: str, top_k: int) -> None:
    case = Case(10, torch.float32)
    case.teacher = case.student().detach().float()
    spec = replace(SPEC, divergence=divergence, method="opd")  # type: ignore[arg-type]
    loss = ours(case, case.batch(top_k), spec)
    assert 0.0 <= float(loss.detach()) < 1e-6
    assert max(float(gradient.abs().max()) for gradient in case.gradients(loss)) < 1e-6


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd", "sampled_pg"])
def test_padded_columns_give_no_nan(divergence: str) -> None:
    case = Case(11)
    spec = replace(SPEC, divergence=divergence)  # type: ignore[arg-type]
    batch = case.batch(4)
    padded = replace(
        batch,
        teacher_topk_ids=torch.cat([batch.teacher_topk_ids, torch.full((N, 2), -1)], dim=1),
        teacher_topk_logprobs=torch.cat([batch.teacher_topk_logprobs, torch.full((N, 2), -torch.inf)], dim=1),
    )
    reference, actual = ours(case, batch, spec), ours(case, padded, spec)
    torch.testing.assert_close(actual, reference, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(case.gradients(actual), case.gradients(reference), atol=1e-13, rtol=1e-13)


@ALL_DIVERGENCES
def test_bf16_is_close_to_float32(divergence: str) -> None:
    """bfloat16 rounds logits of size ~5 by ~0.02: loss within 2 %, gradients within 5 % in norm."""
    spec = replace(SPEC, divergence=divergence)  # type: ignore[arg-type]
    low = Case(12, torch.bfloat16)
    high = Case(12, torch.float32)
    high.hidden, high.head = (x.detach().float().requires_grad_() for x in (low.hidden, low.head))
    low_loss, high_loss = ours(low, low.batch(6), spec), ours(high, high.batch(6), spec)
    assert low_loss.dtype == high_loss.dtype
    assert float(low_loss.detach()) == pytest.approx(float(high_loss.detach()), rel=0.02)
    for rough, fine in zip(low.gradients(low_loss), high.gradients(high_loss), strict=True):
        assert rough.dtype == torch.bfloat16
        assert float((rough.float() - fine).norm() / fine.norm()) < 0.05


def test_float32_is_close_to_float64() -> None:
    case = Case(13, torch.float32)
    names = ("teacher_topk_logprobs", "teacher_sampled_logprobs", "behaviour_logprobs")
    batch = case.batch(6)
    batch = replace(batch, **{name: getattr(batch, name).float() for name in names})
    loss = ours(case, batch)
    exact = Case(13)
    exact.hidden, exact.head = (x.detach().double().requires_grad_() for x in (case.hidden, case.head))
    expected = ours(exact, exact.batch(6))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    for rough, fine in zip(case.gradients(loss), exact.gradients(expected), strict=True):
        torch.testing.assert_close(rough.double(), fine, atol=1e-6, rtol=1e-4)


def test_no_tokens_give_a_zero_in_the_graph() -> None:
    case = Case(14)
    loss, metrics = topd_loss(case.hidden[:0], case.head, case.batch(4).rows(0, 0), SPEC, num_tokens=0, num_guided=0)
    assert float(loss.detach()) == 0.0
    for gradient in case.gradients(loss):
        assert float(gradient.abs().max()) == 0.0
    assert {(metric.sum, metric.count) for metric in metrics.to_metrics()} == {(0.0, 0.0)}


def test_figures_of_micro_batches_add_up_in_float64() -> None:
    parts = [
        LossMetrics(
            figures={"a": (torch.tensor(total), torch.tensor(2.0)), "b": (torch.tensor(1.0), torch.tensor(0.0))}
        )
        for total in (2.0**24, 1.0, 1.0)
    ]
    assert LossMetrics.total(parts).to_metrics("x/") == [
        Metric(key="x/a", sum=2.0**24 + 2.0, count=6.0),
        Metric(key="x/b", sum=3.0, count=0.0),
    ]


def test_head_bias_is_one_more_column() -> None:
    case = Case(15)
    bias = torch.linspace(-1, 1, V, dtype=torch.float64, requires_grad=True)
    wide_hidden = torch.cat([case.hidden.detach(), torch.ones(N, 1)], dim=1)
    wide_head = torch.cat([case.head.detach(), bias.detach()[:, None]], dim=1).requires_grad_()
    counts = {"num_tokens": N, "num_guided": NUM_GUIDED}
    expected, _ = topd_loss(wide_hidden, wide_head, case.batch(5), SPEC, **counts)
    actual, _ = topd_loss(case.hidden, case.head, case.batch(5), SPEC, **counts, head_bias=bias)
    torch.testing.assert_close(actual, expected)
    (of_bias,), (of_wide,) = torch.autograd.grad(actual, bias), torch.autograd.grad(expected, wide_head)
    torch.testing.assert_close(of_bias, of_wide[:, -1])


def test_metrics_are_sums_and_counts_of_the_batch() -> None:
    case = Case(16)
    capped = torch.arange(N) % 4 == 0
    got = figures(case, case.batch(capped=capped))
    student = case.student().detach()
    losses = full_divergence(student, case.teacher, SPEC)
    sampled = student.gather(1, case.sampled[:, None]).squeeze(1)
    opd = case.naive(replace(SPEC, method="opd"), capped).detach()
    medians = torch.cat([part.quantile(0.5).expand_as(part) for part in losses.split(SEGMENTS)])
    expected = {
        "token_loss": float(opd),
        "token_divergence": float(losses.mean()),
        "guidance_kl": float((case.naive(capped=capped).detach() - opd) / SPEC.guidance_weight),
        "student_entropy": float(-(student.exp() * student).sum(1).mean()),
        "mismatch": float((sampled - case.behaviour).mean()),
        "mismatch_abs": float((sampled - case.behaviour).abs().mean()),
        "capped": float((capped & (losses > medians)).double().mean()),
        "teacher_top1": float((student.argmax(1) == case.teacher.argmax(1)).double().mean()),
        "student_tail": 0.0,
        "teacher_tail": 0.0,
    }
    assert got == pytest.approx(expected, abs=1e-6)
    assert 0.0 < got["capped"] < 0.25, "some are at or below their median, and stay as they are"
    kept = case.batch(3)
    inside = torch.zeros(N, V, dtype=torch.bool).scatter(1, kept.teacher_topk_ids.long(), True)
    inside = inside.scatter(1, case.sampled[:, None], True)
    tails = figures(case, kept)
    assert tails["student_tail"] == pytest.approx(float(student.exp()[~inside].sum() / N), abs=1e-9)
    assert tails["teacher_tail"] == pytest.approx(float(case.teacher.exp()[~inside].sum() / N), abs=1e-9)


def test_student_logprobs() -> None:
    case = Case(17)
    expected = case.student().gather(1, case.sampled[:, None]).squeeze(1).detach()
    for chunk_tokens in (1, 7, 100):
        actual = student_logprobs(case.hidden, case.head, case.sampled, SPEC.temperature, chunk_tokens)
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
        assert not actual.requires_grad
    assert student_logprobs(case.hidden[:0], case.head, case.sampled[:0]).shape == (0,)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            self.numel = max(self.numel, value.numel() if isinstance(value, Tensor) else 0)
        return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_exist_for_one_chunk_only(dtype: torch.dtype) -> None:
    case = Case(21, dtype)
    batch, spec = case.batch(3), replace(SPEC, chunk_tokens=12)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        loss = ours(case, batch, spec)
    assert max(kept) < 12 * V, "a chunk's logits are kept between forward and backward"
    with LargestTensor() as largest:
        ours(case, batch, spec).backward()
    assert largest.numel == 12 * V
    assert case.hidden.grad is not None
    torch.testing.assert_close(case.hidden.grad, case.gradients(loss)[0])


def test_few_tokens_need_no_room_for_logits() -> None:
    """They are stored where the weight's gradient will be."""
    case = Case(22)
    case.hidden = case.hidden.detach()[:D].requires_grad_()
    batch, spec = case.batch(3).rows(0, D), replace(SPEC, chunk_tokens=D)
    with LargestTensor() as largest:
        loss, _ = topd_loss(case.hidden, case.head, batch, spec, num_tokens=D, num_guided=NUM_GUIDED)
        loss.backward()  # type: ignore[no-untyped-call]
    assert largest.numel == V * D
