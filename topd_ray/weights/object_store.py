"""Weights by way of Ray's object store: works everywhere, and a node fetches a version once for all its engines."""

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from topd_ray.weights.bundle import Delivery, Named, WeightsBundle
from topd_ray.weights.chunks import Chunk
from topd_ray.weights.parcels import Parcel, bundle_of, delivery_of


class ObjectStore(Protocol):
    """Puts payloads where other workers can get them (`actors.store.Store`)."""

    spans_processes: bool

    def put(self, payload: Any) -> Any: ...

    def get(self, handles: Sequence[Any]) -> list[Any]: ...

    def node_address(self) -> str: ...


class ObjectStoreChannel:
    """Every chunk of a version is an object of its own.

    The learner holds one chunk besides the store. Ray keeps the objects as long as anybody holds the bundle: whoever
    drops it frees the version, in the learner's store and in those of all nodes that fetched it.

    An engine's chunks are views of its node's store, which therefore has to hold one version.
    """

    staging_device = "cpu"

    def __init__(self, store: ObjectStore, *, chunk_bytes: int) -> None:
        self._store = store
        self._chunk_bytes = chunk_bytes

    def send(self, version: int, tensors: Iterable[Named]) -> WeightsBundle:
        """Put `tensors` into the store, chunk by chunk as they come."""
        return bundle_of(version, tensors, chunk_bytes=self._chunk_bytes, put=self._store.put)

    def fetch(self, bundle: WeightsBundle) -> Delivery:
        """Fetch and check every chunk, the next on its way meanwhile."""
        started = time.perf_counter()
        parcels: Sequence[Parcel] = bundle.content
        return delivery_of(bundle, parcels, self._chunks(parcels), started=started)

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
