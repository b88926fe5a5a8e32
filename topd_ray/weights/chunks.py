"""Named tensors as a few flat byte arrays, which an object store shares between processes without a copy."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from topd_ray.grouping import runs_within
from topd_ray.weights.checksum import Fingerprint, fingerprint

MAX_CHUNK_BYTES = 256 * 1024**2
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Some tensors, one after the other in one array of bytes."""

    entries: tuple[Entry, ...]
    octets: NDArray[np.uint8]


def pack(
    tensors: Iterable[tuple[str, torch.Tensor]], max_chunk_bytes: int = MAX_CHUNK_BYTES
) -> tuple[list[Chunk], Fingerprint]:
    """Copy named tensors (of any device) into chunks of at most `max_chunk_bytes`, or of one larger tensor."""
    runs = runs_within(tensors, lambda named: _padded(named[1].nbytes), max_chunk_bytes)
    chunks = [_chunk(run) for run in runs]
    return chunks, fingerprint(unpack(chunks))


def unpack(chunks: Sequence[Chunk]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named CPU tensors of `chunks`, as views of their memory. Do not write to them: the memory may be shared."""
    for chunk in chunks:
        octets = _shared_tensor(chunk.octets)
        for entry in chunk.entries:
            dtype = getattr(torch, entry.dtype)
            num_bytes = math.prod(entry.shape) * dtype.itemsize
            yield entry.name, octets[entry.start : entry.start + num_bytes].view(dtype).view(entry.shape)


def _chunk(tensors: Sequence[tuple[str, torch.Tensor]]) -> Chunk:
    octets = np.zeros(sum(_padded(tensor.nbytes) for _, tensor in tensors), np.uint8)
    target = torch.from_numpy(octets)
    entries = []
    start = 0
    for name, tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        target[start : start + tensor.nbytes].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
        entries.append(Entry(name=name, dtype=dtype, shape=tuple(tensor.shape), start=start))
        start += _padded(tensor.nbytes)
    return Chunk(entries=tuple(entries), octets=octets)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _shared_tensor(octets: NDArray[np.uint8]) -> torch.Tensor:
    """Arrays from an object store are read-only, of which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return torch.from_numpy(octets)
