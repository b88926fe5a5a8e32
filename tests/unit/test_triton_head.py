"""The Triton kernels against the torch path: on a GPU if there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("Triton is not part of the CPU environment", allow_module_level=True)

from tests.loss_case import COUNTS, SPEC, Case, N, V
from topd_ray.objective import LossSpec, topd_loss
from topd_ray.objective.head import Picks
from topd_ray.objective.triton_head import make_head

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton asks for it when it is first imported: these tests run in a process of their own.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs_kernels = pytest.mark.skipif(
    DEVICE.type == "cpu" and not IS_INTERPRETED, reason="test_in_the_interpreter runs these"
)
# What a kernel is specialised on, and the argument types that `triton.compile` wants to be told.
COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from topd_ray.objective import triton_kernels as kernels

numbers = {"num_rows": "i32", "num_tokens": "i32", "temperature": "fp32", "softcap": "fp32"}
pointers = {
    kernels._peaks_and_sums: {"peaks_SN": "*fp32", "sums_SN": "*fp32"},
    kernels._to_gradient: {"peak_N": "*fp32", "weight_N": "*fp32"},
}
sizes = {
    kernels._peaks_and_sums: (kernels.SUM_BLOCK_V, kernels.SUM_BLOCK_N),
    kernels._to_gradient: (kernels.BLOCK_V, kernels.BLOCK_N),
}
for kernel, outputs in pointers.items():
    constants = dict(zip(("BLOCK_V", "BLOCK_N"), sizes[kernel]), HAS_BIAS=True, HAS_SOFTCAP=True)
    if kernel is kernels._peaks_and_sums:
        constants["SHARE_ROWS"] = kernels.SHARE_ROWS
    signature = {"products_VN": "*bf16", "bias_V": "*fp32", **outputs, **numbers}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants)
    print(len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


def results(dtype: torch.dtype, spec: LossSpec, seed: int, **arguments: Any) -> tuple[Tensor, ...]:
    case = Case(seed, dtype)
    capped = torch.arange(N) % 5 == 0 if spec.divergence != "sampled_pg" else None
    batch = case.batch(4, capped, torch.linspace(0.0, 2.0, N))
    fields = {name: getattr(batch, name) for name in batch.__slots__}
    batch = type(batch)(**{name: None if one is None else one.to(DEVICE) for name, one in fields.items()})
    padding = torch.full((3, case.head.shape[1]), 100.0)
    head = torch.cat([case.head.detach(), padding.to(dtype)]).to(DEVICE).requires_grad_()
    hidden = case.hidden.detach().to(DEVICE).requires_grad_()
    bias = torch.linspace(-1, 1, V + 3, device=DEVICE).to(dtype).requires_grad_()
    loss, metrics = topd_loss(
        hidden, head, batch, spec, **COUNTS, head_bias=bias, num_vocabulary=V, check_finite=False, **arguments
    )
    loss.backward()  # type: ignore[no-untyped-call]
    figures = torch.tensor([metric.sum for metric in metrics.to_metrics()])
    assert hidden.grad is not None and head.grad is not None and bias.grad is not None
    return loss.detach(), figures, hidden.grad, head.grad, bias.grad


@runs_kernels
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"divergence": "forward", "logit_softcap": 2.0},
        {"divergence": "jsd", "temperature": 0.6},
        {"divergence": "sampled_pg", "method": "opd"},
    ],
)
def test_float32_agrees_with_the_torch_path(changes: dict[str, Any]) -> None:
    spec = replace(SPEC, **changes)
    found, expected = (results(torch.float32, replace(spec, kernel=kernel), 70) for kernel in ("triton", "torch"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-5)


@runs_kernels
@pytest.mark.parametrize("changes", [{}, {"logit_softcap": 2.0}])
def test_bfloat16_rounds_the_gradient_once_more(changes: dict[str, Any]) -> None:
    """Losses read the same rounded products; gradients of logits are rounded to 2^-9, and sums of them again."""
    spec = replace(SPEC, **changes)
    found, expected = (results(torch.bfloat16, replace(spec, kernel=kernel), 71) for kernel in ("triton", "torch"))
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.float() - other.float()).norm() / other.float().norm()) < 0.01


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_programs_work_on_one_chunk(dtype: torch.dtype) -> None:
    """More rows than a share holds, more tokens than a block, neither a multiple; rows of nothing but -inf."""
    from topd_ray.objective.triton_kernels import peaks_and_sums, to_gradient_

    generator = torch.Generator().manual_seed(0)
    products = (5.0 * torch.randn(4500, 75, generator=generator)).to(dtype)
    products[100:140] = products[:, 3] = -torch.inf
    products, bias = products.to(DEVICE), torch.linspace(-2, 2, 4500, device=DEVICE)
    logits = (3.0 * torch.tanh((products.float() + bias[:, None]) / 3.0)) / 0.7
    logits = logits.masked_fill(products == -torch.inf, -torch.inf)
    peak, total = peaks_and_sums(products, bias, 0.7, 3.0)
    is_left = logits.amax(0) > -torch.inf
    assert is_left.sum() == 74 and float(total[3]) == 0.0 and bool(peak.isfinite().all())
    torch.testing.assert_close(peak[is_left], logits.amax(0)[is_left], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close((peak + total.log())[is_left], logits.logsumexp(0)[is_left], atol=1e-5, rtol=1e-5)
    weight = torch.rand(75, generator=generator).to(DEVICE)
    slope = 1.0 - (logits * 0.7 / 3.0).square()
    expected = ((logits - peak).exp() * weight * slope).nan_to_num(0.0)
    to_gradient_(products, bias, peak, weight, 0.7, 3.0)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    assert products.dtype == dtype and bool(products.isfinite().all())
    torch.testing.assert_close(products.float(), expected, atol=tolerance, rtol=tolerance)


@runs_kernels
def test_nan_is_not_lost() -> None:
    case = Case(72, torch.float32)
    hidden, head = case.hidden.detach().to(DEVICE), case.head.detach().to(DEVICE)
    hidden[3, 0] = torch.nan
    logprobs = triton_logprobs(hidden, head, case.sampled.to(DEVICE))
    assert logprobs.isnan().nonzero().flatten().tolist() == [3]


@runs_kernels
def test_log_probs_are_those_of_the_softmax() -> None:
    case = Case(73, torch.float32)
    found = triton_logprobs(case.hidden.detach().to(DEVICE), case.head.detach().to(DEVICE), case.sampled.to(DEVICE))
    expected = case.student(SPEC).detach().gather(1, case.sampled[:, None]).squeeze(1)
    torch.testing.assert_close(found.double().cpu(), expected, atol=1e-5, rtol=1e-5)


def triton_logprobs(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    spec = replace(SPEC, kernel="triton", chunk_tokens=None)
    found = make_head(hidden, head, None, spec, num_vocabulary=V)
    rows = torch.arange(N, device=DEVICE)
    logits, peak, total = found.forward(slice(0, N), Picks(ids=ids, rows=rows, num_excluded=0))
    return logits - peak - total.log()


@pytest.mark.skipif(DEVICE.type == "cuda" or IS_INTERPRETED, reason="they run")
def test_in_the_interpreter() -> None:
    python = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        python, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert result.returncode == 0 and "10 passed" in result.stdout, result.stdout


@pytest.mark.skipif(DEVICE.type == "cuda" or IS_INTERPRETED, reason="they run")
def test_they_compile_for_a_gpu() -> None:
    result = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    sizes = [int(line) for line in result.stdout.split()]
    assert len(sizes) == 2 and min(sizes) > 1000
