"""Did the weights arrive as they were sent? A checksum that costs one pass over memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch

_WORD = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What a set of named tensors holds, whatever the order of the names."""

    num_tensors: int
    num_bytes: int
    checksum: int
    """sum over tensors of an odd hash of (name, dtype, shape) times the sum of the tensor's 8-byte words, mod 2^64"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReceipt:
    """An engine's acknowledgement that it serves a policy version."""

    version: int
    num_tensors: int
    num_bytes: int
    checksum: int


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> Fingerprint:
    """The fingerprint of named tensors, wherever they are."""
    num_tensors = num_bytes = checksum = 0
    for name, tensor in tensors:
        num_tensors += 1
        num_bytes += tensor.nbytes
        checksum += _header_hash(name, tensor) * (1 + _word_sum(tensor))
    return Fingerprint(num_tensors=num_tensors, num_bytes=num_bytes, checksum=checksum % _WORD)


def _header_hash(name: str, tensor: torch.Tensor) -> int:
    return 2 * crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()) + 1


def _word_sum(tensor: torch.Tensor) -> int:
    octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    whole = len(octets) // 8 * 8
    tail = int.from_bytes(octets[whole:].tobytes(), "little")
    return (int(octets[:whole].view(np.uint64).sum(dtype=np.uint64)) + tail) % _WORD
