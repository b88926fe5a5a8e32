"""Weights by way of Ray's object store: works everywhere, and a node fetches a version once for all its engines."""

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from topd_ray.errors import WeightSyncError
from topd_ray.types import Metric
from topd_ray.weights.bundle import Delivery, Named, WeightsBundle, timed
from topd_ray.weights.checksum import Fingerprint, fingerprint
from topd_ray.weights.chunks import Chunk, pack, unpack


class ObjectStore(Protocol):
    """Puts payloads where other workers can get them (`actors.store.Store`)."""

    spans_processes: bool

    def put(self, payload: Any) -> Any: ...

    def get(self, handles: Sequence[Any]) -> list[Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """Where a chunk is, and what has to be in it."""

    handle: Any
    fingerprint: Fingerprint


class ObjectStoreChannel:
    """Every chunk of a version is an object of its own.

    The learner holds one chunk besides the store. Ray keeps the objects as long as anybody holds the bundle: whoever
    drops it frees the version, in the learner's store and in those of all nodes that fetched it.

    An engine's chunks are views of its node's store, which therefore has to hold one version. That lets every chunk be
    checked before the engine is touched: after a bundle with a missing, double, foreign, cut or altered chunk, the
    engine serves what it served before.
    """

    staging_device = "cpu"

    def __init__(self, store: ObjectStore, *, chunk_bytes: int) -> None:
        self._store = store
        self._chunk_bytes = chunk_bytes

    def send(self, version: int, tensors: Iterable[Named]) -> WeightsBundle:
        """Put `tensors` into the store, chunk by chunk as they come."""
        started = time.perf_counter()
        parcels: list[Parcel] = []
        total, num_stored = Fingerprint(), 0
        for chunk in pack(tensors, version=version, chunk_bytes=self._chunk_bytes):
            content = fingerprint(unpack(chunk))
            parcels.append(Parcel(handle=self._store.put(chunk), fingerprint=content))
            total, num_stored = total + content, num_stored + chunk.octets.nbytes
        return WeightsBundle(
            version=version,
            num_bytes=total.num_bytes,
            checksum=total.checksum,
            content=tuple(parcels),
            metrics=(
                *timed("pack", time.perf_counter() - started),
                Metric(key="weights/chunks", sum=len(parcels)),
                Metric(key="weights/overhead", sum=num_stored, count=total.num_bytes),
            ),
        )

    def fetch(self, bundle: WeightsBundle) -> Delivery:
        """Fetch and check every chunk, the next on its way meanwhile."""
        started = time.perf_counter()
        parcels: Sequence[Parcel] = bundle.content
        named: list[Named] = []
        total = Fingerprint()
        for index, (chunk, parcel) in enumerate(zip(self._chunks(parcels), parcels, strict=True)):
            tensors = _checked(chunk, parcel.fingerprint, version=bundle.version, index=index)
            named += tensors
            total += parcel.fingerprint
        if (total.num_bytes, total.checksum) != (bundle.num_bytes, bundle.checksum):
            raise WeightSyncError(
                f"the {len(parcels)} chunks of version {bundle.version} hold {total.num_bytes} bytes with checksum "
                f"{total.checksum:#x}, the learner packed {bundle.num_bytes} with {bundle.checksum:#x}"
            )
        seconds = time.perf_counter() - started
        rate = Metric(key="weights/fetch_bytes_per_second", sum=total.num_bytes, count=seconds)
        fetched = (*timed("fetch", seconds), rate)
        return Delivery(tensors=named, fingerprint=total, metrics=fetched)

    def _chunks(self, parcels: Sequence[Parcel]) -> Iterator[Chunk]:
        """The chunks in order; while the caller looks at one the next is being fetched."""
        if len(parcels) < 2:
            yield from self._store.get([parcel.handle for parcel in parcels])
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch-weights") as fetcher:
            coming = [fetcher.submit(self._store.get, [parcel.handle]) for parcel in parcels[:1]]
            for following in [*parcels[1:], None]:
                (chunk,) = coming.pop().result()
                if following is not None:
                    coming.append(fetcher.submit(self._store.get, [following.handle]))
                yield chunk


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
