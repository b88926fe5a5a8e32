"""The two passes over a chunk's products that a GPU's head needs, in Triton; importing this needs Triton.

Both turn products into logits / temperature in registers, in float32, whatever dtype the products have: add the bias,
cap, divide. A product of -inf stays out of everything.

Axes: V rows of the vocabulary, N tokens of a chunk, S shares of the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Among the fastest of those tried on one H200, in bfloat16.
BLOCK_V, BLOCK_N = 32, 128
SUM_BLOCK_V, SUM_BLOCK_N = 256, 32
# Rows that one program of `peaks_and_sums` goes through: enough programs to fill a GPU, few partial results.
SHARE_ROWS = 2048


@triton.jit
def _logits(product, bias, temperature, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    logits = product + bias
    ratio = logits
    if HAS_SOFTCAP:
        ratio = 2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0  # tanh
        logits = softcap * ratio
    return tl.where(product == float("-inf"), float("-inf"), logits / temperature), ratio


@triton.jit
def _peaks_and_sums(  # type: ignore[no-untyped-def]
    products_VN,
    bias_V,
    peaks_SN,
    sums_SN,
    num_rows,
    num_tokens,
    temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SHARE_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(1)
    is_token = tokens < num_tokens
    peak = tl.full([BLOCK_N], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, SHARE_ROWS, BLOCK_V):
        rows = share * SHARE_ROWS + start + tl.arange(0, BLOCK_V)
        is_row = rows < num_rows
        places = rows.to(tl.int64)[:, None] * num_tokens + tokens[None, :]
        is_inside = is_row[:, None] & is_token[None, :]
        product = tl.load(products_VN + places, mask=is_inside, other=float("-inf")).to(tl.float32)
        bias = tl.zeros([BLOCK_V], tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_V + rows, mask=is_row, other=0.0).to(tl.float32)
        logits, _ = _logits(product, bias[:, None], temperature, softcap, HAS_SOFTCAP)
        higher = tl.maximum(peak, tl.max(logits, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[None, :]), 0)
        peak = higher
    tl.store(peaks_SN + share * num_tokens + tokens, peak, mask=is_token)
    tl.store(sums_SN + share * num_tokens + tokens, total, mask=is_token)


@triton.jit
def _to_gradient(  # type: ignore[no-untyped-def]
    products_VN,
    bias_V,
    peak_N,
    weight_N,
    num_rows,
    num_tokens,
    temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    tokens = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_token = rows < num_rows, tokens < num_tokens
    places = rows.to(tl.int64)[:, None] * num_tokens + tokens[None, :]
    is_inside = is_row[:, None] & is_token[None, :]
    product = tl.load(products_VN + places, mask=is_inside, other=float("-inf")).to(tl.float32)
    bias = tl.zeros([BLOCK_V], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_V + rows, mask=is_row, other=0.0).to(tl.float32)
    peak = tl.load(peak_N + tokens, mask=is_token, other=0.0)
    weight = tl.load(weight_N + tokens, mask=is_token, other=0.0)
    logits, ratio = _logits(product, bias[:, None], temperature, softcap, HAS_SOFTCAP)
    grad = tl.exp(logits - peak[None, :]) * weight[None, :]
    if HAS_SOFTCAP:
        grad = grad * (1.0 - ratio * ratio)
    tl.store(products_VN + places, grad.to(products_VN.dtype.element_ty), mask=is_inside)


def peaks_and_sums(
    products_VN: Tensor, bias_V: Tensor | None, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Peak of the logits and sum of exp(logit - peak), both [N] float32."""
    num_rows, num_tokens = products_VN.shape
    num_shares = triton.cdiv(num_rows, SHARE_ROWS)
    peaks_SN = products_VN.new_empty((num_shares, num_tokens), dtype=torch.float32)
    sums_SN = torch.empty_like(peaks_SN)
    with torch.cuda.device_of(products_VN):
        _peaks_and_sums[(triton.cdiv(num_tokens, SUM_BLOCK_N), num_shares)](
            products_VN,
            products_VN if bias_V is None else bias_V,
            peaks_SN,
            sums_SN,
            num_rows,
            num_tokens,
            float(temperature),
            float(softcap or 1.0),
            HAS_BIAS=bias_V is not None,
            HAS_SOFTCAP=softcap is not None,
            SHARE_ROWS=SHARE_ROWS,
            BLOCK_V=SUM_BLOCK_V,
            BLOCK_N=SUM_BLOCK_N,
        )
    peak_N = peaks_SN.amax(0)
    return peak_N, (sums_SN * (peaks_SN - peak_N).exp()).sum(0)


def to_gradient_(
    products_VN: Tensor,
    bias_V: Tensor | None,
    peak_N: Tensor,
    weight_N: Tensor,
    temperature: float,
    softcap: float | None,
) -> None:
    """Products become weight_N * exp(logit - peak) * d (capped logit) / d (product), in place."""
    num_rows, num_tokens = products_VN.shape
    with torch.cuda.device_of(products_VN):
        _to_gradient[(triton.cdiv(num_rows, BLOCK_V), triton.cdiv(num_tokens, BLOCK_N))](
            products_VN,
            products_VN if bias_V is None else bias_V,
            peak_N.contiguous(),
            weight_N.contiguous(),
            num_rows,
            num_tokens,
            float(temperature),
            float(softcap or 1.0),
            HAS_BIAS=bias_V is not None,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_V=BLOCK_V,
            BLOCK_N=BLOCK_N,
        )
