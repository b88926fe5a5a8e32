"""vLLM's C norms in an eager engine on a CPU, against its native ones in float32."""

import pytest
import torch
from vllm import ir

from topd_ray.engines.cpu_norms import PROVIDER, SUPPORTED

EPSILON = 1e-6
BF16 = 2**-7 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 2**-6
"""Two roundings of 2^-8. With AVX2 alone vLLM's C code cuts instead, and the sum of the fused norm as well."""
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="vLLM is not a CPU build")


def inputs(dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and residual as slices of wider tensors, so that their rows do not follow each other, and a weight."""
    torch.manual_seed(0)
    wide, residual = torch.randn(2, *shape[:-1], 2 * shape[-1]).to(dtype).unbind(0)
    return wide[..., : shape[-1]], residual[..., : shape[-1]], (torch.rand(shape[-1]) + 0.5).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, BF16)])
@pytest.mark.parametrize("shape", [(1, 8), (70, 128), (5, 4, 32)])
def test_they_are_the_native_norms_up_to_rounding(dtype, tolerance, shape):
    x, residual, weight = inputs(dtype, *shape)
    for name, arguments in (
        ("rms_norm", (x,)),
        ("fused_add_rms_norm", (x.contiguous(), residual.contiguous())),
    ):
        impls = getattr(ir.ops, name).impls
        right = impls["native"].impl_fn(*(one.float() for one in arguments), weight.float(), EPSILON)
        ours = impls[PROVIDER].impl_fn(*(one.clone() for one in arguments), weight, EPSILON)
        torch.testing.assert_close(ours, right, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_a_norm_leaves_its_input_as_it_was():
    x, _, weight = inputs(torch.float32, 3, 16)
    before = x.clone()
    ir.ops.rms_norm.impls[PROVIDER].impl_fn(x, weight, EPSILON)
    assert torch.equal(x, before)


def test_what_the_kernels_cannot_do_stays_with_the_native_code():
    rms_norm, fused = (getattr(ir.ops, name).impls[PROVIDER] for name in ("rms_norm", "fused_add_rms_norm"))
    x, residual, weight = inputs(torch.float32, 3, 16)
    assert rms_norm.supports_args(x, weight, EPSILON)
    assert not rms_norm.supports_args(x, None, EPSILON)  # no weight
    assert not rms_norm.supports_args(x, weight.double(), EPSILON)  # another dtype
    assert not rms_norm.supports_args(x, weight, EPSILON, 8)  # a mean over a part
    assert not rms_norm.supports_args(x[..., :12], weight[:12], EPSILON)  # no whole vectors
    assert fused.supports_args(x.contiguous(), residual.contiguous(), weight, EPSILON)
    assert not fused.supports_args(x, residual.contiguous(), weight, EPSILON)  # rows apart
