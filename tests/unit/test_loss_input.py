"""What divergences and loss refuse: the error names the argument, what was found and what would be right."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.loss_case import COUNTS, SPEC, Case, D, N, V, figures, ours
from topd_ray.errors import DataError, NonFiniteLossError
from topd_ray.objective import (
    LossBatch,
    LossSpec,
    Support,
    divergence,
    full_divergence,
    sampled_divergence,
    sampled_policy_gradient,
    student_logprobs,
    token_losses,
    topd_loss,
    topk_divergence,
    trajectory_medians,
)

ID_RANGE = rf"and should hold 0\.\.{V - 1}, the vocabulary's"


def spoilt(tensor: Tensor, place: Any, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


BAD_VALUES: list[tuple[str, Callable[[LossBatch], Tensor], str]] = [
    ("sampled_ids", lambda b: spoilt(b.sampled_ids, 3, V), rf"sampled_ids holds the id {V}, {ID_RANGE}"),
    ("sampled_ids", lambda b: spoilt(b.sampled_ids, 3, -1), rf"sampled_ids holds the id -1, {ID_RANGE}"),
    ("teacher_topk_ids", lambda b: spoilt(b.teacher_topk_ids, (2, 1), V), rf"teacher_topk_ids holds the id {V}, "),
    ("target_ids", lambda b: spoilt(b.target_ids, -1, V), rf"target_ids holds the id {V}, {ID_RANGE}"),
    (
        "teacher_topk_ids",
        lambda b: spoilt(b.teacher_topk_ids, (4, 1), int(b.teacher_topk_ids[4, 0])),
        r"teacher_topk_ids: row 4 holds a token twice, and should hold each once",
    ),
    (
        "teacher_topk_logprobs",
        lambda b: spoilt(b.teacher_topk_logprobs, (5, 2), math.nan),
        r"teacher_topk_logprobs holds nan, and should hold log-probs: at most 0",
    ),
    (
        "teacher_topk_logprobs",
        lambda b: spoilt(b.teacher_topk_logprobs, (5, 2), math.inf),
        r"teacher_topk_logprobs holds inf, and should hold log-probs",
    ),
    (
        "teacher_topk_logprobs",
        lambda b: b.teacher_topk_logprobs.clamp(min=-0.5),
        r"teacher_topk_logprobs: with the sampled token, row 0 holds the probability [1-9].*, and should hold at most",
    ),
    (
        "teacher_sampled_logprobs",
        lambda b: spoilt(b.teacher_sampled_logprobs, 0, 0.5),
        r"teacher_sampled_logprobs holds 0.5, and should hold log-probs: at most 0",
    ),
    ("behaviour_logprobs", lambda b: spoilt(b.behaviour_logprobs, 0, math.nan), r"behaviour_logprobs holds nan"),
    (
        "target_weights",
        lambda b: spoilt(b.target_weights, 0, -0.25),
        r"target_weights holds -0.25, and should be finite and not negative",
    ),
    ("target_weights", lambda b: spoilt(b.target_weights, 0, math.inf), r"target_weights holds inf"),
    (
        "target_weights",
        lambda b: 0.5 * b.target_weights,
        r"target_weights of row 0 sum to 0.5, and should sum to the number of windows that cover it",
    ),
    ("target_entropy", lambda b: spoilt(b.target_entropy, 1, math.nan), r"target_entropy holds nan"),
    (
        "target_entropy",
        lambda b: torch.where(b.target_indptr.diff() == 0, 0.5, b.target_entropy),
        r"target_entropy of row \d+ is 0.5, and should be 0: the row has no target_weights",
    ),
    ("weight_N", lambda b: torch.full((N,), -0.5), r"weight_N holds -0.5, and should be finite and not negative"),
    ("weight_N", lambda b: spoilt(torch.ones(N), 2, math.inf), r"weight_N holds inf, and should be finite and not"),
    ("weight_N", lambda b: spoilt(torch.ones(N), 2, math.nan), r"weight_N holds nan, and should be finite and not"),
    (
        "target_indptr",
        lambda b: b.target_indptr + 1,
        r"target_indptr goes from 1 to \d+, and should rise from 0 to \d+, the length of target_ids",
    ),
    ("target_indptr", lambda b: b.target_indptr.flip(0), r"target_indptr goes from \d+ to 0, and should rise"),
]


@pytest.mark.parametrize(("field", "change", "message"), BAD_VALUES)
def test_bad_values_are_refused(field: str, change: Callable[[LossBatch], Tensor], message: str) -> None:
    case = Case(50)
    batch = case.batch(3)
    broken = replace(batch, **{field: change(batch)})
    with pytest.raises(DataError, match=message):
        ours(case, broken)
    with pytest.raises(DataError, match=message):
        token_losses(case.hidden, case.head, broken, SPEC)


BAD_SHAPES: list[tuple[str, Callable[[LossBatch], Tensor], str]] = [
    ("sampled_ids", lambda b: b.sampled_ids[:-1], rf"sampled_ids has shape \[{N - 1}\], and should have \[{N}\]"),
    ("teacher_topk_ids", lambda b: b.teacher_topk_ids[0], rf"has shape \[3\], and should have \[{N}, K\]"),
    ("teacher_topk_logprobs", lambda b: b.teacher_topk_logprobs[:, :2], rf"\[{N}, 2\], and should have \[{N}, 3\]"),
    ("teacher_sampled_logprobs", lambda b: b.teacher_sampled_logprobs[1:], "teacher_sampled_logprobs has shape"),
    ("behaviour_logprobs", lambda b: b.behaviour_logprobs[None], rf"\[1, {N}\], and should have \[{N}\]"),
    ("capped", lambda b: b.capped[:1], rf"capped has shape \[1\], and should have \[{N}\]"),
    ("segment_ids", lambda b: b.segment_ids[:0], "segment_ids has shape"),
    ("target_indptr", lambda b: b.target_indptr[:-1], rf"target_indptr has shape \[{N}\], and should have \[{N + 1}\]"),
    ("target_weights", lambda b: b.target_weights[:-1], "target_weights has shape"),
    ("target_entropy", lambda b: b.target_entropy[:-1], "target_entropy has shape"),
    ("weight_N", lambda b: torch.ones(N - 1), rf"weight_N has shape \[{N - 1}\], and should have \[{N}\]"),
    ("weight_N", lambda b: torch.ones(N).int(), "weight_N is of torch.int32, and should be of a float dtype"),
    ("weight_N", lambda b: torch.ones(N, device="meta"), "weight_N is on meta, and should be on cpu"),
    ("capped", lambda b: b.capped.int(), "capped is of torch.int32, and should be of a bool dtype"),
    ("sampled_ids", lambda b: b.sampled_ids.float(), "sampled_ids is of torch.float32, and should be of a integer"),
    ("target_weights", lambda b: b.target_weights.int(), "target_weights is of torch.int32, and should be of a float"),
]


@pytest.mark.parametrize(("field", "change", "message"), BAD_SHAPES)
def test_bad_shapes_are_refused(field: str, change: Callable[[LossBatch], Tensor], message: str) -> None:
    case = Case(51)
    batch = case.batch(3)
    with pytest.raises(DataError, match=message):
        ours(case, replace(batch, **{field: change(batch)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_ND": torch.zeros(N, D + 1)},
            rf"head_weight_VD has shape \[{V}, {D}\], and should have \[V, {D + 1}\]",
        ),
        ({"hidden_ND": torch.zeros(N)}, rf"hidden_ND has shape \[{N}\], and should have \[N, D\]"),
        ({"hidden_ND": torch.zeros(N, D).int()}, "hidden_ND is of torch.int32, and should be of a float dtype"),
        (
            {"hidden_ND": torch.zeros(N - 1, D)},
            rf"teacher_topk_ids has shape \[{N}, 3\], and should have \[{N - 1}, K\]",
        ),
        ({"head_weight_VD": torch.zeros(V, D, 1)}, "head_weight_VD has shape"),
        ({"head_bias": torch.zeros(V + 1)}, rf"head_bias has shape \[{V + 1}\], and should have \[{V}\]"),
        ({"num_vocabulary": 0}, rf"num_vocabulary is 0, and should be 1\.\.{V}, the rows of head_weight_VD"),
        ({"num_vocabulary": V + 1}, rf"num_vocabulary is {V + 1}, and should be 1\.\.{V}"),
        ({"num_vocabulary": 2}, r"holds the id \d+, and should hold 0\.\.1, the vocabulary's"),
        ({"median_N": torch.zeros(N - 1)}, rf"median_N has shape \[{N - 1}\], and should have \[{N}\]"),
        ({"median_N": torch.full((N,), -1.0)}, "median_N holds -1.0, and should be finite and not negative"),
        ({"num_tokens": -1.0}, "num_tokens is -1.0, and should be finite and not negative"),
        ({"num_guided": math.nan}, "num_guided is nan"),
        ({"num_tokens": None}, "num_tokens is None, and should be finite and not negative"),
        ({"num_guided": "3"}, "num_guided is '3', and should be finite and not negative"),
        ({"num_vocabulary": 8.5}, "num_vocabulary is 8.5, and should be 1"),
        ({"head_weight_VD": torch.zeros(V, D, device="meta")}, "head_weight_VD is on meta, and should be on cpu"),
        ({"hidden_ND": [[0.0]]}, "hidden_ND is a list, and should be a tensor"),
        (
            {"hidden_ND": torch.zeros(N, D), "spec": replace(SPEC, kernel="triton")},
            "torch: (Triton is not installed|hidden_ND is on cpu, and its kernels run on CUDA devices)",
        ),
        (
            {"spec": replace(SPEC, guidance_reduction="sum"), "num_trajectories": None},
            "num_trajectories is None, and should be given: guidance_reduction=sum divides by it",
        ),
        ({"spec": replace(SPEC, kernel="triton")}, "kernel is triton, and should be torch"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    case = Case(52)
    arguments = {"hidden_ND": case.hidden, "head_weight_VD": case.head, "batch": case.batch(3), "spec": SPEC, **COUNTS}
    with pytest.raises(DataError, match=message):
        topd_loss(**{**arguments, **changes})


def test_float16_is_too_narrow_for_gradients_of_logits() -> None:
    case = Case(60, torch.float16)
    with pytest.raises(DataError, match=r"torch\.float16, and should be of bfloat16 or float32"):
        ours(case, case.batch(3))
    assert bool(student_logprobs(case.hidden, case.head, case.sampled).isfinite().all())
    for side, name in (("hidden", "hidden_ND"), ("head", "head_weight_VD")):
        case = Case(60, torch.bfloat16)
        setattr(case, side, getattr(case, side).detach().half().requires_grad_())
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(DataError, match=rf"{name} is of torch\.float16"):
            ours(case, case.batch(3))
    case = Case(60, torch.float32)
    with torch.autocast("cpu", torch.float16), pytest.raises(DataError, match=r"torch\.float16, and should be"):
        ours(case, case.batch(3))


def test_caps_need_a_token_loss() -> None:
    case = Case(53)
    batch = case.batch(3, torch.ones(N, dtype=torch.bool))
    with pytest.raises(DataError, match="no token loss to cap"):
        ours(case, batch, replace(SPEC, divergence="sampled_pg"))


def test_advantages_go_with_a_discount_and_weights_do_not() -> None:
    case, weight = Case(), torch.ones(N)
    spec = replace(SPEC, divergence="sampled_pg", kl_discount=0.5)
    with pytest.raises(DataError, match=r"weight_N is given, and should be None: kl_discount is 0\.5"):
        ours(case, case.batch(4, weight=weight), spec)
    with pytest.raises(DataError, match="advantage_N is given, and should be None: kl_discount is 0"):
        ours(case, replace(case.batch(4), advantage_N=weight), replace(spec, kl_discount=0.0))
    with pytest.raises(DataError, match=rf"advantage_N has shape \[{N - 1}\], and should have \[{N}\]"):
        ours(case, replace(case.batch(4), advantage_N=weight[1:]), spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0, and should be finite and above 0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"logit_softcap": -1.0}, "logit_softcap is -1.0"),
        ({"importance_clip": 0.0}, "importance_clip is 0.0"),
        ({"divergence": "sampled_pg", "kl_discount": 1.0}, r"kl_discount is 1.0, and should lie in \[0, 1\)"),
        ({"kl_discount": 0.5}, "kl_discount is 0.5 under reverse, and should be 0"),
        ({"guidance_weight": -0.1}, "guidance_weight is -0.1, and should be finite and not negative"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0, and should be a whole number of at least 1"),
        ({"divergence": "jsd", "jsd_beta": 1.0}, r"jsd_beta is 1.0, and should lie inside \(0, 1\)"),
        ({"chunk_tokens": 1.5}, "chunk_tokens is 1.5, and should be a whole number"),
        ({"chunk_tokens": True}, "chunk_tokens is True"),
        ({"temperature": None}, "temperature is None, and should be finite and above 0"),
        ({"temperature": "1"}, "temperature is '1', and should be finite and above 0"),
        ({"guidance_weight": "1"}, "guidance_weight is '1'"),
        ({"divergence": "jsd", "jsd_beta": "1"}, "jsd_beta is '1'"),
        ({"divergence": "jsd", "jsd_beta": math.nan}, "jsd_beta is nan"),
        ({"divergence": "kl"}, "divergence is 'kl', and should be one of reverse, forward, jsd, sampled_pg"),
        ({"method": "gkd"}, "method is 'gkd', and should be one of topd, opd"),
        ({"guidance_reduction": "max"}, "guidance_reduction is 'max', and should be one of mean, sum"),
        ({"kernel": "cuda"}, "kernel is 'cuda', and should be one of torch, triton"),
    ],
)
def test_a_loss_is_not_put_together_at_random(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LossSpec(**changes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["hidden_ND", "head_weight_VD"])
def test_a_loss_that_is_not_finite_names_who_is_to_blame(name: str, value: float) -> None:
    case = Case(54)
    batch = case.batch(3)
    side = "hidden" if name == "hidden_ND" else "head"
    setattr(case, side, spoilt(getattr(case, side).detach(), (2, 3), value).requires_grad_())
    message = f"the loss is nan .*: {name} holds 1 values that are NaN or infinite, of"
    with pytest.raises(NonFiniteLossError, match=message):
        ours(case, batch)
    with pytest.raises(NonFiniteLossError, match=message):
        token_losses(case.hidden, case.head, batch, SPEC)
    assert not ours(case, batch, check_finite=False).isfinite()
    assert not token_losses(case.hidden, case.head, batch, SPEC, check_finite=False).isfinite().all()
    assert not ours(case, replace(batch, capped=~batch.capped), check_finite=False).isfinite()


def test_an_overflowing_product_is_named() -> None:
    case = Case(55, torch.float32)
    case.hidden, case.head = (x.detach().mul(1e30).requires_grad_() for x in (case.hidden, case.head))
    with pytest.raises(NonFiniteLossError, match="all inputs are finite, so their product has overflowed"):
        ours(case, case.batch(3))


def test_the_caller_may_look_for_nan_himself() -> None:
    case = Case(56)
    batch = case.batch(3)
    for name in ("teacher_topk_logprobs", "teacher_sampled_logprobs", "target_weights", "target_entropy"):
        broken = replace(batch, **{name: torch.full_like(getattr(batch, name), torch.nan)})
        loss = ours(case, broken, check_finite=False)
        assert bool(loss.isnan()) or name == "teacher_sampled_logprobs", name
    weight = spoilt(torch.ones(N), 3, math.nan)
    assert bool(ours(case, replace(batch, weight_N=weight), check_finite=False).isnan())
    with pytest.raises(DataError, match="sampled_ids holds the id"):
        ours(case, replace(batch, sampled_ids=batch.sampled_ids - V), check_finite=False)


def test_a_teacher_may_rule_tokens_out_and_round() -> None:
    """-inf, padding with any id, masses of 1 + 1e-4, and a head that rules a token out: no error, no NaN."""
    case = Case(57)
    batch = case.batch(V)
    ruled_out = batch.teacher_topk_logprobs[:, -1:]
    batch = replace(
        batch,
        teacher_sampled_logprobs=batch.teacher_sampled_logprobs.masked_fill(torch.arange(N) == 3, -torch.inf),
        teacher_topk_ids=torch.cat([batch.teacher_topk_ids, torch.full((N, 2), 999)], dim=1),
        teacher_topk_logprobs=torch.cat(
            [batch.teacher_topk_logprobs + 1e-4, torch.full_like(ruled_out, -torch.inf).expand(-1, 2)], dim=1
        ),
    )
    bias = torch.zeros(V, dtype=torch.float64).index_fill(0, torch.tensor([5]), -torch.inf).requires_grad_()
    loss = ours(case, batch, replace(SPEC, method="opd"), head_bias=bias)
    gradients = torch.autograd.grad(loss, (case.hidden, case.head, bias))
    assert all(bool(one.isfinite().all()) for one in (loss, *gradients))


def test_no_tokens_are_no_error() -> None:
    case = Case(58)
    batch = case.batch(3).rows(0, 0)
    assert token_losses(case.hidden[:0], case.head, batch, SPEC).shape == (0,)
    case.hidden = case.hidden.detach()[:0].requires_grad_()
    assert float(ours(case, batch, replace(SPEC, guidance_reduction="sum")).detach()) == 0.0
    assert full_divergence(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)
    assert topk_divergence(torch.zeros(0, 5), torch.zeros(0, 2).long(), torch.zeros(0, 2)).shape == (0,)
    assert sampled_divergence(torch.zeros(0), torch.zeros(0)).shape == (0,)


def test_guidance_of_nobody_is_no_guidance() -> None:
    case = Case(59)
    case.windows = [[], [], []]
    assert figures(case, case.batch(3), replace(SPEC, method="opd"))["token_loss"] > 0.0
    loss = topd_loss(case.hidden, case.head, case.batch(3), SPEC, num_tokens=N, num_guided=0.0)[0]
    torch.testing.assert_close(loss, ours(case, case.batch(3), replace(SPEC, method="opd")))


LOGITS, LOGP = torch.zeros(2, 4), torch.zeros(2, 4).log_softmax(1)
IDS, TOPK = torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), -2.0)
ROW = torch.full((2,), -1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: divergence(LOGP, LOGP[:1]), r"teacher_logp_NC has shape \[1, 4\], and should have \[2, 4\]"),
        (lambda: divergence(LOGP, LOGP, torch.ones(2, 3) > 0), r"mask_NC has shape \[2, 3\], and should have \[2, 4\]"),
        (lambda: divergence(LOGP[0], LOGP[0]), r"student_logp_NC has shape \[4\], and should have \[N, C\]"),
        (lambda: divergence(LOGP, LOGP, kind="kl"), "kind is 'kl', and should be one of reverse, forward, jsd"),  # type: ignore[arg-type]
        (lambda: divergence(LOGP, LOGP, kind="jsd", jsd_beta=0.0), "jsd_beta is 0.0, and should lie inside"),
        (lambda: full_divergence(LOGITS, LOGITS[:, :3]), r"teacher_logits_NV has shape \[2, 3\], and should have"),
        (lambda: full_divergence(LOGITS, LOGITS, temperature=-1.0), "temperature is -1.0"),
        (lambda: full_divergence(LOGITS.int(), LOGITS), "student_logits_NV is of torch.int32"),
        (lambda: full_divergence(LOGITS[:, :0], LOGITS[:, :0]), "should have at least one column"),
        (
            lambda: full_divergence(spoilt(LOGITS, (1, 2), math.nan), LOGITS),
            "student_logits_NV: row 1 has",
        ),
        (
            lambda: full_divergence(LOGITS, spoilt(LOGITS, (1, 2), math.inf)),
            "teacher_logits_NV: row 1 has",
        ),
        (lambda: full_divergence(LOGITS, LOGITS - torch.inf), "teacher_logits_NV: row 0 .* no finite logit at all"),
        (lambda: topk_divergence(LOGITS, IDS + 1, TOPK), r"^topk_ids holds the id 4, and should hold 0\.\.3"),
        (lambda: topk_divergence(LOGITS, IDS * 0, TOPK), "row 0 holds a token twice"),
        (lambda: topk_divergence(LOGITS, IDS, TOPK * 0.1), "holds the probability 1.6.*, and should hold at most 1"),
        (lambda: topk_divergence(LOGITS, IDS, TOPK * math.nan), "logprobs holds nan, and should hold log-probs"),
        (lambda: topk_divergence(LOGITS, IDS, TOPK[:, :1]), r"topk_logprobs has shape \[2, 1\], and should have"),
        (lambda: topk_divergence(LOGITS, IDS[:, :0], TOPK[:, :0]), "K should be at least 1 without sampled_ids"),
        (lambda: topk_divergence(LOGITS, IDS, TOPK, sampled_ids=IDS[:, 0]), "one is given, and should be both or none"),
        (lambda: topk_divergence(LOGITS * math.nan, IDS, TOPK), "student_logits_NV: row 0 has the logsumexp nan"),
        (lambda: topk_divergence(LOGITS, IDS, TOPK, temperature=0.0), "temperature is 0.0"),
        (lambda: sampled_divergence(ROW, ROW[:1]), r"teacher_logp_N has shape \[1\], and should have \[2\]"),
        (lambda: sampled_divergence(-ROW, ROW), "student_logp_N holds 1.0, and should hold log-probs: at most 0"),
        (lambda: sampled_divergence(ROW, ROW * math.nan), "teacher_logp_N holds nan"),
        (lambda: sampled_policy_gradient(ROW, ROW, ROW[:1], 2.0), "behaviour_logp_N has shape"),
        (lambda: sampled_policy_gradient(ROW, ROW, ROW, -2.0), "importance_clip is -2.0"),
        (lambda: sampled_policy_gradient(ROW, ROW, -ROW, 2.0), "behaviour_logp_N holds 1.0"),
        (lambda: sampled_policy_gradient(ROW * math.nan, ROW, ROW, 2.0), "student_logp_N holds nan"),
        (lambda: sampled_divergence(ROW.int(), ROW), "student_logp_N is of torch.int32, and should be of a float"),
        (lambda: divergence(LOGP, LOGP, torch.ones(2, 4)), "mask_NC is of torch.float32, and should be of a bool"),
        (lambda: full_divergence(LOGITS, LOGITS.to("meta")), "teacher_logits_NV is on meta, and should be on cpu"),
        (
            lambda: topk_divergence(LOGITS, IDS, TOPK, sampled_ids=ROW, sampled_logprobs=ROW),
            "sampled_ids is of torch.float32, and should be of a integer",
        ),
        (
            lambda: topk_divergence(LOGITS, IDS, TOPK, sampled_ids=IDS[:, 0], sampled_logprobs=IDS[:, 0]),
            "sampled_logprobs is of torch.int64, and should be of a float",
        ),
        (lambda: trajectory_medians(ROW * math.nan, IDS[0]), "token_loss_N holds NaN in row 0"),
        (lambda: Support.build(IDS, TOPK, IDS[:1, 0], ROW), r"sampled_logprobs has shape \[2\], and should have \[1\]"),
        (
            lambda: student_logprobs(LOGITS, LOGITS, torch.tensor([0, 2])),
            r"token_ids holds the id 2, .* 0\.\.1",
        ),
        (
            lambda: student_logprobs(LOGITS, LOGITS, torch.tensor([0])),
            r"token_ids has shape \[1\], .* \[2\]",
        ),
        (lambda: student_logprobs(LOGITS, LOGITS, torch.zeros(2).long(), temperature=0.0), "temperature is 0.0"),
        (lambda: trajectory_medians(ROW, IDS[0, :1]), r"segment_ids has shape \[1\], and should have \[2\]"),
    ],
)
def test_divergences_refuse(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()
