"""Named tensors as a few flat byte arrays, which an object store shares between processes without a copy."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from topd_ray.errors import WeightSyncError
from topd_ray.grouping import runs_within

ALIGNMENT = 64
"""Tensors start at multiples of this (bytes), whatever their dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor inside a chunk."""

    name: str
    dtype: str
    """torch's name without the prefix, for instance `bfloat16`"""
    shape: tuple[int, ...]
    start: int
    """offset of the first byte"""

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Some tensors of one policy version, one after the other in one array of bytes."""

    version: int
    index: int
    """place among the chunks of its version"""
    entries: tuple[Entry, ...]
    octets: NDArray[np.uint8]


def pack(tensors: Iterable[tuple[str, torch.Tensor]], *, version: int, chunk_bytes: int) -> Iterator[Chunk]:
    """Copy named tensors (of any device) into chunks of at most `chunk_bytes`, or of one larger tensor.

    A chunk is made as soon as its tensors are there, which go as they are copied: about one chunk is held at a time.
    """
    runs = runs_within(tensors, lambda named: _padded(named[1].nbytes), chunk_bytes)
    for index, run in enumerate(runs):
        yield _chunk(run, version=version, index=index)


def unpack(chunk: Chunk) -> Iterator[tuple[str, torch.Tensor]]:
    """The named CPU tensors of `chunk`, as views of its memory. Do not write to them: the memory may be shared.

    Raises WeightSyncError if the chunk ends before a tensor does.
    """
    octets = _shared_tensor(chunk.octets)
    for entry in chunk.entries:
        if entry.end > len(octets):
            raise WeightSyncError(
                f"chunk {chunk.index} of version {chunk.version} is cut off: it has {len(octets)} bytes, "
                f"{entry.name} ends at {entry.end}"
            )
        yield entry.name, octets[entry.start : entry.end].view(getattr(torch, entry.dtype)).view(entry.shape)


def _chunk(tensors: list[tuple[str, torch.Tensor]], *, version: int, index: int) -> Chunk:
    """Empties `tensors`."""
    octets = np.zeros(sum(_padded(tensor.nbytes) for _, tensor in tensors), np.uint8)
    target = torch.from_numpy(octets)
    entries = []
    start = 0
    while tensors:
        name, tensor = tensors.pop(0)
        dtype = str(tensor.dtype).removeprefix("torch.")
        target[start : start + tensor.nbytes].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
        entries.append(Entry(name=name, dtype=dtype, shape=tuple(tensor.shape), start=start))
        start += _padded(tensor.nbytes)
    return Chunk(version=version, index=index, entries=tuple(entries), octets=octets)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _shared_tensor(octets: NDArray[np.uint8]) -> torch.Tensor:
    """Arrays from an object store are read-only, of which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return torch.from_numpy(octets)
