"""The output layer on a GPU: a chunk's logits stay in the dtype of the product, two Triton kernels read them.

The torch path of `head` is the reference: the kernels are compared with it in Triton's interpreter on a CPU, and on a
GPU where there is one (tests/unit/test_triton_head.py).

Axes: N tokens of a chunk, V rows of the vocabulary, D hidden width, P picked logits.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from topd_ray.errors import DataError
from topd_ray.objective.head import GPU_CHUNK_BYTES, Head, Picks, add_product, ceil_div
from topd_ray.objective.loss_data import LossSpec

# Two bytes a logit instead of four allow larger chunks than those of the torch path, in multiples of a product's tiles.
CHUNK_SHARE = 5
CHUNK_MULTIPLE = 128
MOST_CHUNK_TOKENS = 2048
# What Triton reads as yes in TRITON_INTERPRET.
INTERPRETED = ("1", "true", "yes", "on", "y")


def make_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    spec: LossSpec,
    *,
    num_vocabulary: int,
    needs_grad: tuple[bool, bool, bool] = (False, False, False),
) -> Head:
    """The head that `spec.kernel` asks for. Raises DataError if it asks for Triton in vain."""
    if spec.kernel == "triton" and (obstacle := _obstacle(hidden_ND)):
        raise DataError(f"kernel is triton, and should be torch: {obstacle}")
    kind = TritonHead if spec.kernel == "triton" and len(hidden_ND) else Head
    return kind(hidden_ND, weight_VD, bias_V, spec, num_vocabulary=num_vocabulary, needs_grad=needs_grad)


def _obstacle(hidden_ND: Tensor) -> str | None:
    """Why the kernels cannot run on these hidden states."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if hidden_ND.dtype == torch.float64:
        return "hidden_ND is of torch.float64, which is too wide for its kernels"
    if hidden_ND.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0").lower() not in INTERPRETED:
        return f"hidden_ND is on {hidden_ND.device}, and its kernels run on CUDA devices"
    return None


class TritonHead(Head):
    """A chunk is one product; products become gradients in place."""

    def forward(self, rows: slice, picks: Picks) -> tuple[Tensor, Tensor, Tensor]:
        from topd_ray.objective.triton_kernels import peaks_and_sums

        hidden_ND, spec = self.hidden_ND[rows], self.spec
        self._products_VN = self._buffer(len(hidden_ND), hidden_ND.dtype)
        torch.mm(self.weight_VD[: self.num_vocabulary], hidden_ND.T, out=self._products_VN)
        flat = self._products_VN.view(-1)
        self._places_P = picks.ids * len(hidden_ND) + picks.rows
        bias_P = None if self.bias_V is None else self.bias_V[picks.ids]
        self._picked_P = self.finish_(flat[self._places_P].to(self.dtype), bias_P)
        flat.index_fill_(0, self._places_P[: picks.num_excluded], -torch.inf)
        self._rows = rows
        self._peak_N, sum_N = peaks_and_sums(self._products_VN, self.bias_V, spec.temperature, spec.logit_softcap)
        return self._picked_P, self._peak_N, sum_N

    def backward(self, weight_N: Tensor, grad_P: Tensor) -> None:
        from topd_ray.objective.triton_kernels import to_gradient_

        grad_VN, spec = self._products_VN, self.spec
        weight_N = weight_N / spec.temperature
        to_gradient_(grad_VN, self.bias_V, self._peak_N, weight_N, spec.temperature, spec.logit_softcap)
        grad_P = grad_P * self.slope(self._picked_P) / spec.temperature
        grad_VN.view(-1).index_add_(0, self._places_P, grad_P.to(grad_VN.dtype))
        weight_VD, hidden_ND = self.weight_VD[: self.num_vocabulary], self.hidden_ND[self._rows]
        if self.bias_grad_V is not None:
            self.bias_grad_V[: self.num_vocabulary] += grad_VN.sum(1, dtype=self.dtype)
        if self.hidden_grad_ND is not None:
            add_product(self.hidden_grad_ND[self._rows], grad_VN.T, weight_VD)
        if self.weight_grad is not None:
            self.weight_grad.add(slice(0, self.num_vocabulary), grad_VN, hidden_ND, overwrite=self.is_first)
        self.is_first = False

    def chunks(self) -> list[slice]:
        """As many tokens in each but the last: a fifth of all, or more where that takes few bytes."""
        num_rows, size = len(self.hidden_ND), self.spec.chunk_tokens
        if size is None:
            at_least = GPU_CHUNK_BYTES // (self.num_vocabulary * self.hidden_ND.dtype.itemsize)
            most = max(at_least, min(num_rows // CHUNK_SHARE, MOST_CHUNK_TOKENS), 1)
            size = ceil_div(ceil_div(num_rows, ceil_div(num_rows, most)), CHUNK_MULTIPLE) * CHUNK_MULTIPLE
        return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]

    def _stores_in_weight_grad(self, num_tokens: int) -> bool:
        return False
