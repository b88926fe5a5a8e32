"""Did the weights arrive as they were sent? A checksum that costs one pass over memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch

from topd_ray.types import Metric

_WORD = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What a set of named tensors holds, whatever the order of the names; that of two sets together is their sum."""

    num_tensors: int = 0
    num_bytes: int = 0
    checksum: int = 0
    """sum over tensors of an odd hash of (name, dtype, shape) times one more than the sum of the tensor's 8-byte words,
    mod 2^64"""

    def __add__(self, other: "Fingerprint") -> "Fingerprint":
        return Fingerprint(
            num_tensors=self.num_tensors + other.num_tensors,
            num_bytes=self.num_bytes + other.num_bytes,
            checksum=(self.checksum + other.checksum) % _WORD,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReceipt:
    """An engine's acknowledgement that it serves a policy version."""

    version: int
    num_tensors: int
    num_bytes: int
    checksum: int
    """of the tensors that the engine was given"""
    metrics: tuple[Metric, ...] = ()
    """`weights/...`: seconds and bytes of this engine's side"""

    @classmethod
    def of(cls, version: int, given: Fingerprint) -> "WeightReceipt":
        return cls(version=version, num_tensors=given.num_tensors, num_bytes=given.num_bytes, checksum=given.checksum)


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> Fingerprint:
    """The fingerprint of named tensors, wherever they are; those on a GPU are summed there."""
    num_tensors = num_bytes = checksum = 0
    for name, tensor in tensors:
        num_tensors += 1
        num_bytes += tensor.nbytes
        checksum += _header_hash(name, tensor) * (1 + _word_sum(tensor))
    return Fingerprint(num_tensors=num_tensors, num_bytes=num_bytes, checksum=checksum % _WORD)


def _header_hash(name: str, tensor: torch.Tensor) -> int:
    return 2 * crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()) + 1


def _word_sum(tensor: torch.Tensor) -> int:
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return _sum_with_numpy(octets) if octets.device.type == "cpu" else _sum_with_torch(octets)


def _sum_with_numpy(octets: torch.Tensor) -> int:
    array = octets.numpy()
    whole = len(array) // 8 * 8
    tail = int.from_bytes(array[whole:].tobytes(), "little")
    return int(array[:whole].view(np.uint64).sum(dtype=np.uint64)) + tail


def _sum_with_torch(octets: torch.Tensor) -> int:
    """The same where NumPy cannot go. int64 wraps round as uint64 does; a view as words has to start at one."""
    whole = len(octets) // 8 * 8
    tail = int.from_bytes(octets[whole:].cpu().numpy().tobytes(), "little")
    words = octets[:whole] if octets.storage_offset() % 8 == 0 else octets[:whole].clone()
    return int(words.view(torch.int64).sum(dtype=torch.int64)) + tail
