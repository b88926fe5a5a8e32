"""A policy version as chunks that travel one by one: what the learner says of each, and how an engine's end checks it.

Every chunk is checked before the engine is touched: after a missing, double, foreign, cut or altered one, the engine
serves what it served before.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from topd_ray.errors import WeightSyncError
from topd_ray.types import Metric
from topd_ray.weights.bundle import Delivery, Named, WeightsBundle, timed
from topd_ray.weights.checksum import Fingerprint, fingerprint
from topd_ray.weights.chunks import Chunk, pack, unpack


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """Where a chunk is, and what has to be in it."""

    handle: Any
    fingerprint: Fingerprint


Parcels = tuple[Parcel, ...]


def bundle_of(
    version: int,
    tensors: Iterable[Named],
    *,
    chunk_bytes: int,
    put: Callable[[Chunk], Any],
    content: Callable[[Parcels], Any] = lambda parcels: parcels,
) -> WeightsBundle:
    """Pack `tensors` as they come. `put` takes each chunk for a handle; the bundle's content is made of the parcels."""
    started = time.perf_counter()
    parcels: list[Parcel] = []
    total, num_stored = Fingerprint(), 0
    for chunk in pack(tensors, version=version, chunk_bytes=chunk_bytes):
        packed = fingerprint(unpack(chunk))
        parcels.append(Parcel(handle=put(chunk), fingerprint=packed))
        total, num_stored = total + packed, num_stored + chunk.octets.nbytes
    return WeightsBundle(
        version=version,
        num_bytes=total.num_bytes,
        checksum=total.checksum,
        content=content(tuple(parcels)),
        metrics=(
            *timed("pack", time.perf_counter() - started),
            Metric(key="weights/chunks", sum=len(parcels)),
            Metric(key="weights/overhead", sum=num_stored, count=total.num_bytes),
        ),
    )


def delivery_of(
    bundle: WeightsBundle, parcels: Sequence[Parcel], chunks: Iterable[Chunk], *, started: float
) -> Delivery:
    """Check every chunk as it comes, in the order of `parcels`; fetching began at `started` (time.perf_counter).

    Raises WeightSyncError for chunks that are not exactly those of `bundle`.
    """
    named: list[Named] = []
    total = Fingerprint()
    for index, (chunk, parcel) in enumerate(zip(chunks, parcels, strict=True)):
        named += _checked(chunk, parcel.fingerprint, version=bundle.version, index=index)
        total += parcel.fingerprint
    if (total.num_bytes, total.checksum) != (bundle.num_bytes, bundle.checksum):
        raise WeightSyncError(
            f"the {len(parcels)} chunks of version {bundle.version} hold {total.num_bytes} bytes with checksum "
            f"{total.checksum:#x}, the learner packed {bundle.num_bytes} with {bundle.checksum:#x}"
        )
    seconds = time.perf_counter() - started
    rate = Metric(key="weights/fetch_bytes_per_second", sum=total.num_bytes, count=seconds)
    return Delivery(tensors=named, fingerprint=total, metrics=(*timed("fetch", seconds), rate))


def _checked(chunk: Chunk, expected: Fingerprint, *, version: int, index: int) -> list[Named]:
    """The tensors of `chunk`, if it is the one expected and holds what was packed."""
    if (chunk.version, chunk.index) != (version, index):
        raise WeightSyncError(
            f"found chunk {chunk.index} of version {chunk.version} of the weights in the place of chunk {index} of "
            f"version {version}"
        )
    tensors = list(unpack(chunk))
    found = fingerprint(tensors)
    if found != expected:
        raise WeightSyncError(
            f"chunk {index} of version {version} of the weights was altered on its way: found {found}, packed were "
            f"{expected}"
        )
    return tensors
