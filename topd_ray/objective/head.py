"""The student's output layer, a chunk of tokens at a time: logits forward, and their gradient back through it.

A chunk is walked twice, each time in blocks of the vocabulary that fit the processor's cache. Forward, a block's logits
are made, the picked ones are read off, and the exponentials of the others are stored, relative to the block's own peak.
Once the loss is known, the stored block becomes the gradient with respect to its logits in one multiplication and goes
into the gradients of hidden states and weight. So logits are made once, and the memory sees each of them written once
and read once.

Blocks lie as [vocabulary, tokens]: the product of weight rows with a few tokens is up to a third faster that way than
its transpose.

Axes: N tokens (of all chunks, or of one), D hidden width, V rows of the head, B rows of a block, X blocks,
P picked logits.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from topd_ray.errors import DataError
from topd_ray.objective.loss_data import LossSpec

# Elements of a block: 2 MB of float32 stay in a processor's cache, and 32 MB in a GPU's.
BLOCK_ELEMENTS = {"cpu": 2**19}
GPU_BLOCK_ELEMENTS = 2**23
# Larger chunks read the weight less often. An eighth of the tokens takes a sixteenth of the memory of a loss over all
# logits; where that is less than so many bytes, a chunk takes these; above so many tokens nothing is gained.
CHUNK_SHARE = 8
CHUNK_BYTES = {"cpu": 48 * 2**20}
GPU_CHUNK_BYTES = 512 * 2**20
CHUNK_MULTIPLE = 16
MOST_CHUNK_TOKENS = 1024
# Rows of the weight's gradient that are rounded at once.
ROUNDED_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Picks:
    """Single logits of a chunk that the loss reads and has a gradient for."""

    ids: Tensor
    """[P] int64"""
    rows: Tensor
    """[P] int64, the token of the chunk"""
    num_excluded: int
    """the first so many are left out of the sum over the vocabulary"""


class Head:
    """Output layer of one micro-batch, and the gradients of its inputs; call `forward`, then `backward`, per chunk.

    The product runs in the autocast dtype, or else that of the hidden states, the rest in float32 (float64 for
    float64). Rows from `num_vocabulary` on take no part. Raises DataError for gradients in float16.
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        spec: LossSpec,
        *,
        num_vocabulary: int,
        needs_grad: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        product_dtype = hidden_ND.dtype
        device = hidden_ND.device.type
        if torch.is_autocast_enabled(device):
            product_dtype = torch.get_autocast_dtype(device)
        if any(needs_grad):
            refuse_float16("hidden_ND (or autocast)", product_dtype)
        names = ("hidden_ND", "head_weight_VD", "head_bias")
        for name, tensor, needs in zip(names, (hidden_ND, weight_VD, bias_V), needs_grad, strict=True):
            if needs and tensor is not None:
                refuse_float16(name, tensor.dtype)
        self.dtype = torch.promote_types(product_dtype, torch.float32)
        self.spec = spec
        self.num_vocabulary = num_vocabulary
        self._dtypes = (hidden_ND.dtype, None if bias_V is None else bias_V.dtype)
        self.hidden_ND = hidden_ND.to(product_dtype)
        self.weight_VD = weight_VD.to(product_dtype)
        self.bias_V = None if bias_V is None else bias_V.to(self.dtype)
        self.hidden_grad_ND = torch.zeros_like(hidden_ND, dtype=self.dtype) if needs_grad[0] else None
        self.weight_grad: WeightGradient | None = None
        if needs_grad[1]:
            self.weight_grad = WeightGradient(weight_VD, self.dtype, num_vocabulary if len(hidden_ND) else 0)
        self.bias_grad_V = None
        if needs_grad[2] and bias_V is not None:
            self.bias_grad_V = torch.zeros_like(bias_V, dtype=self.dtype)
        self.is_first = True
        self._block_BN = self._buffer_VN = self.hidden_ND.new_empty(0)
        self._stored_VN: Tensor | None = None

    @property
    def needs_grad(self) -> bool:
        return any(one is not None for one in (self.hidden_grad_ND, self.weight_grad, self.bias_grad_V))

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """With respect to hidden states, weight and bias, in the dtypes these came in. Call it once, at the end."""
        hidden_dtype, bias_dtype = self._dtypes
        return (
            None if self.hidden_grad_ND is None else self.hidden_grad_ND.to(hidden_dtype),
            None if self.weight_grad is None else self.weight_grad.rounded(),
            None if self.bias_grad_V is None else self.bias_grad_V.to(bias_dtype),
        )

    def chunks(self) -> list[slice]:
        """The tokens of each chunk, in order; at least one chunk, also without tokens."""
        num_rows, chunk_tokens = len(self.hidden_ND), self.spec.chunk_tokens
        if chunk_tokens is not None:
            edges = [*range(0, max(num_rows, 1), chunk_tokens), num_rows]
            return [slice(start, stop) for start, stop in pairwise(edges)]
        most, first = self._tokens_per_chunk(), 0
        free = min(num_rows, self.weight_VD.shape[1], MOST_CHUNK_TOKENS)
        if free > most and self._stores_in_weight_grad(free):  # a larger first chunk that costs no memory
            first = free
        others = max(num_rows - first, 1)
        # None of these is much smaller than the rest: each reads the whole weight.
        size = ceil_div(ceil_div(others, ceil_div(others, most)), CHUNK_MULTIPLE) * CHUNK_MULTIPLE
        edges = [*([0] if first else []), *range(first, max(num_rows, 1), size), num_rows]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def forward(self, rows: slice, picks: Picks) -> tuple[Tensor, Tensor, Tensor]:
        """Logits / temperature of one chunk: those picked, [P], the peak of the others, [N], and sum exp(. - peak).

        A peak is finite also where nothing is left of the vocabulary; the sum is then 0.
        """
        hidden_ND = self.hidden_ND[rows]
        num_tokens = len(hidden_ND)
        blocks = self._blocks(num_tokens)
        self._picked = _SortedPicks(picks, blocks, num_tokens, self.dtype)
        stored_VN = self._storage(num_tokens) if self.needs_grad else None
        peaks, sums = [], []
        for index, block in enumerate(blocks):
            logits_BN = self._logits(hidden_ND, block)
            self._picked.read_and_exclude(index, logits_BN)
            peak_N = logits_BN.amax(0).clamp_(min=torch.finfo(self.dtype).min)
            outside_BN = torch.exp(logits_BN.sub_(peak_N), out=logits_BN if stored_VN is None else stored_VN[block])
            peaks.append(peak_N)
            sums.append(outside_BN.sum(0))
        self._rows, self._stored_VN, self._peaks_XN = rows, stored_VN, torch.stack(peaks)
        self._peak_N = self._peaks_XN.amax(0)
        sum_N = (torch.stack(sums) * (self._peaks_XN - self._peak_N).exp()).sum(0)
        return self._picked.values(), self._peak_N, sum_N

    def backward(self, weight_N: Tensor, grad_P: Tensor) -> None:
        """Take the gradients of the last chunk's `forward`: that of its sums, and those of its picked logits."""
        hidden_ND, stored_VN = self.hidden_ND[self._rows], self._stored_VN
        assert stored_VN is not None, "nothing needs a gradient"
        scale_XN = (self._peaks_XN - self._peak_N).exp() * (weight_N / self.spec.temperature)
        picked_grad = self._picked.sort(grad_P * self.slope(self._picked.values()) / self.spec.temperature)
        blocks = self._blocks(len(hidden_ND))
        for index, block in enumerate(blocks):
            outside_BN = stored_VN[block]
            grad_BN = torch.mul(outside_BN, scale_XN[index], out=self._block(outside_BN.shape))
            if self.spec.logit_softcap is not None:
                # exp(logit - peak) was stored: its log leads back to the logit, up to the rounding of the logit.
                grad_BN.mul_(self.slope(outside_BN.log().add_(self._peaks_XN[index])))
            self._picked.add(index, grad_BN, picked_grad)
            self._add_gradient(block, grad_BN, hidden_ND)
        self.is_first = False

    def _logits(self, hidden_ND: Tensor, block: slice) -> Tensor:
        """Logits / temperature of one block; overwritten by the next call."""
        weight_BD = self.weight_VD[block]
        logits_BN = self._block((len(weight_BD), len(hidden_ND)))
        if weight_BD.dtype == self.dtype:
            torch.mm(weight_BD, hidden_ND.T, out=logits_BN)
        else:
            logits_BN.copy_(torch.mm(weight_BD, hidden_ND.T))
        return self.finish_(logits_BN, None if self.bias_V is None else self.bias_V[block].unsqueeze(1))

    def finish_(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Products with the head's rows become logits / temperature, in place."""
        if bias is not None:
            products.add_(bias)
        if self.spec.logit_softcap is not None:
            products.div_(self.spec.logit_softcap).tanh_().mul_(self.spec.logit_softcap)
        return products if self.spec.temperature == 1.0 else products.div_(self.spec.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """d (capped logit) / d (product), from logits / temperature; 0 where it cannot be told from it."""
        if self.spec.logit_softcap is None:
            return 1.0
        ratio = logits * (self.spec.temperature / self.spec.logit_softcap)
        return (1.0 - ratio.square()).clamp(min=0.0)

    def _add_gradient(self, block: slice, grad_BN: Tensor, hidden_ND: Tensor) -> None:
        if self.bias_grad_V is not None:
            self.bias_grad_V[block] += grad_BN.sum(1)
        grad_BN = grad_BN.to(hidden_ND.dtype)
        if self.hidden_grad_ND is not None:
            add_product(self.hidden_grad_ND[self._rows], grad_BN.T, self.weight_VD[block])
        if self.weight_grad is not None:
            self.weight_grad.add(block, grad_BN, hidden_ND, overwrite=self.is_first)

    def _tokens_per_chunk(self) -> int:
        num_bytes = CHUNK_BYTES.get(self.hidden_ND.device.type, GPU_CHUNK_BYTES)
        at_least = num_bytes // (self.num_vocabulary * self.dtype.itemsize)
        num_tokens = max(at_least, min(len(self.hidden_ND) // CHUNK_SHARE, MOST_CHUNK_TOKENS))
        return max(num_tokens // CHUNK_MULTIPLE, 1) * CHUNK_MULTIPLE

    def _blocks(self, num_tokens: int) -> list[slice]:
        num_elements = BLOCK_ELEMENTS.get(self.hidden_ND.device.type, GPU_BLOCK_ELEMENTS)
        size = max(num_elements // max(num_tokens, 1), CHUNK_MULTIPLE)
        return [slice(start, min(start + size, self.num_vocabulary)) for start in range(0, self.num_vocabulary, size)]

    def _block(self, shape: tuple[int, ...]) -> Tensor:
        """Room for one block, used again by every block."""
        num_elements = shape[0] * shape[1]
        if self._block_BN.numel() < num_elements or self._block_BN.dtype != self.dtype:
            self._block_BN = self.hidden_ND.new_empty(num_elements, dtype=self.dtype)
        return self._block_BN[:num_elements].view(shape)

    def _stores_in_weight_grad(self, num_tokens: int) -> bool:
        """Whether a first chunk of so many tokens may keep its exponentials where its weight gradient will go.

        A block of rows is read whole before the gradient is written to the same rows.
        """
        whole_VD = None if self.weight_grad is None else self.weight_grad.whole_VD
        return self.is_first and whole_VD is not None and num_tokens <= whole_VD.shape[1]

    def _storage(self, num_tokens: int) -> Tensor:
        if self._stores_in_weight_grad(num_tokens):
            assert self.weight_grad is not None and self.weight_grad.whole_VD is not None
            return self.weight_grad.whole_VD[:, :num_tokens]
        return self._buffer(num_tokens, self.dtype)

    def _buffer(self, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """[V, N], used again by every chunk."""
        num_elements = self.num_vocabulary * num_tokens
        if self._buffer_VN.numel() < num_elements:
            self._buffer_VN = self.hidden_ND.new_empty(num_elements, dtype=dtype)
        return self._buffer_VN[:num_elements].view(self.num_vocabulary, num_tokens)


class WeightGradient:
    """The sum over chunks of the weight's gradient, [V, D], in a dtype that may be wider than the weight's.

    One of twice the width lies in two halves: once rounded, all rows fit into the memory of the first half, so that
    the gradient never takes more than its sum did.
    """

    def __init__(self, weight_VD: Tensor, dtype: torch.dtype, num_vocabulary: int) -> None:
        """Room for it; rows from `num_vocabulary` on are zeros, the others what is first added to them."""
        num_rows, width = weight_VD.shape
        size = ceil_div(num_rows, 2) if dtype.itemsize == 2 * weight_VD.dtype.itemsize else num_rows
        self._shape, self._dtype = weight_VD.shape, weight_VD.dtype
        self._starts = range(0, num_rows, size)
        self._parts = [weight_VD.new_empty((min(size, num_rows - start), width), dtype=dtype) for start in self._starts]
        for start, part in zip(self._starts, self._parts, strict=True):
            part[max(num_vocabulary - start, 0) :].zero_()

    @property
    def whole_VD(self) -> Tensor | None:
        """All rows of the sum, if they lie in one tensor."""
        return self._parts[0] if len(self._parts) == 1 else None

    def add(self, rows: slice, left: Tensor, right: Tensor, *, overwrite: bool) -> None:
        """Add left @ right to some rows."""
        for start, part in zip(self._starts, self._parts, strict=True):
            first, last = max(rows.start, start), min(rows.stop, start + len(part))
            if first < last:
                own = slice(first - rows.start, last - rows.start)
                add_product(part[first - start : last - start], left[own], right, overwrite=overwrite)

    def rounded(self) -> Tensor:
        """The sum in the weight's dtype, [V, D]. It takes the memory of the sum, which is lost."""
        if (whole_VD := self.whole_VD) is not None:
            return whole_VD.to(self._dtype)
        rounded_VD = self._parts[0].view(self._dtype).view(-1, self._shape[1])
        for start, part in zip(self._starts, self._parts, strict=True):
            for first in range(0, len(part), ROUNDED_ROWS):
                rows_RD = part[first : first + ROUNDED_ROWS].to(self._dtype)  # what is overwritten next has been read
                rounded_VD[start + first : start + first + len(rows_RD)] = rows_RD
        return rounded_VD[: self._shape[0]]


def refuse_float16(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        raise DataError(
            f"{name} is of torch.float16, and should be of bfloat16 or float32: gradients are made before a loss could "
            "be scaled up, and most are too small for float16"
        )


class _SortedPicks:
    """Picked logits in the order in which the blocks of the vocabulary come to them."""

    def __init__(self, picks: Picks, blocks: list[slice], num_tokens: int, dtype: torch.dtype) -> None:
        ids_P, self._order_P = picks.ids.sort()
        starts = ids_P.new_tensor([block.start for block in blocks])
        block_P = torch.bucketize(ids_P, starts, right=True) - 1
        self._bounds = [*torch.searchsorted(ids_P, starts).tolist(), len(ids_P)]
        self._places_P = (ids_P - starts[block_P]) * num_tokens + picks.rows[self._order_P]
        self._exclusion_P = torch.zeros_like(ids_P, dtype=dtype)
        self._exclusion_P.masked_fill_(self._order_P < picks.num_excluded, -torch.inf)
        self._values_P = torch.empty_like(self._exclusion_P)

    def read_and_exclude(self, index: int, logits_BN: Tensor) -> None:
        """Read off those in this block; there, the excluded ones become -inf."""
        own = slice(*self._bounds[index : index + 2])
        places, flat = self._places_P[own], logits_BN.view(-1)
        torch.index_select(flat, 0, places, out=self._values_P[own])
        flat.index_add_(0, places, self._exclusion_P[own])

    def add(self, index: int, grad_BN: Tensor, grad_P: Tensor) -> None:
        own = slice(*self._bounds[index : index + 2])
        grad_BN.view(-1).index_add_(0, self._places_P[own], grad_P[own])

    def sort(self, values_P: Tensor) -> Tensor:
        return values_P[self._order_P]

    def values(self) -> Tensor:
        """What was read off, in the order of the picks."""
        return torch.empty_like(self._values_P).index_copy_(0, self._order_P, self._values_P)


def add_product(sum_: Tensor, left: Tensor, right: Tensor, *, overwrite: bool = False) -> None:
    """sum += left @ right; products of a lower precision are added up in that of the sum."""
    beta = 0.0 if overwrite else 1.0
    if sum_.dtype == left.dtype:
        sum_.addmm_(left, right, beta=beta)
    elif sum_.is_cuda:  # without a product in the lower precision between
        torch.addmm(sum_, left, right, out_dtype=sum_.dtype, beta=beta, out=sum_)
    elif overwrite:
        sum_.copy_(left @ right)
    else:
        sum_.add_(left @ right)


def ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
