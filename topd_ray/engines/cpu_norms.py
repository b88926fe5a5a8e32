"""RMS norms of eager vLLM engines on CPUs: its own C kernels, which by itself it takes on GPUs only.

They pass over the memory once, where its native code passes five times (float32, one core: [64, 128] in 3 us instead of
13, [2048, 256] in 0.07 ms instead of 1.6), and round once, at the end. Importing this module registers them.

Axes: any leading ones, D width of what is normalised.
"""

import torch
import vllm.kernels  # noqa: F401  (loads the C kernels)
from torch import Tensor
from vllm import ir
from vllm.platforms import current_platform

PROVIDER = "topd_cpu"
"""Name of these implementations in vLLM's `ir_op_priority`."""
OP_PRIORITY = {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}
VECTOR = 8
"""Elements at a time in vLLM's CPU kernels; they take no other multiples."""
SUPPORTED = current_platform.is_cpu() and all(hasattr(torch.ops._C, name) for name in OP_PRIORITY)


def fits(x_D: Tensor, weight_D: Tensor | None, variance_size: int | None) -> bool:
    """Whether vLLM's CPU kernels take these arguments; its native code takes the others."""
    is_plain = variance_size is None and weight_D is not None and weight_D.dtype == x_D.dtype
    return is_plain and x_D.shape[-1] % VECTOR == 0


@ir.ops.rms_norm.register_impl(
    PROVIDER,
    supports_args=lambda x, weight, epsilon, variance_size=None: fits(x, weight, variance_size),
    supported=SUPPORTED,
)
def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in float32."""
    x = x.contiguous()
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


@ir.ops.fused_add_rms_norm.register_impl(
    PROVIDER,
    supports_args=lambda x, x_residual, weight, epsilon, variance_size=None: (
        fits(x, weight, variance_size) and x.is_contiguous() and x_residual.is_contiguous()
    ),
    supported=SUPPORTED,
    inplace=True,
)
def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), in the memory of the two."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
