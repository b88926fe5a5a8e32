"""The trajectory buffer: handles and counts of guided trajectories, bounded in bytes, handed out under leases."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from topd_ray.actors.messages import GuidedItem, Lease
from topd_ray.config.schema import BufferConfig
from topd_ray.errors import TopdError


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferCounts:
    """How much the buffer holds, and what has passed through it."""

    num_waiting: int
    num_leased: int
    num_bytes: int
    """of waiting and leased items"""
    num_acknowledged: int
    num_expired: int
    """items that went back because their lease ran out or was given back"""


class TrajectoryBuffer:
    """First in, first out by trajectory id within what is waiting; each id is held once.

    Payloads stay in the object store; the handles held here keep them alive.
    """

    def __init__(self, config: BufferConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._waiting: dict[str, GuidedItem] = {}
        self._leases: dict[int, tuple[float, tuple[GuidedItem, ...]]] = {}
        self._held_ids: set[str] = set()
        self._num_bytes = 0
        self._num_leases = 0
        self._num_acknowledged = 0
        self._num_expired = 0

    def put(self, items: Sequence[GuidedItem]) -> int:
        """Take items in order while they fit `buffer.max_bytes`; return how many were taken.

        The caller keeps the rest and offers them again later (back-pressure). Raises TopdError for an id that the
        buffer already holds.
        """
        for num_taken, item in enumerate(items):
            if self._num_bytes + item.num_bytes > self._config.max_bytes:
                return num_taken
            if item.trajectory_id in self._held_ids:
                raise TopdError(f"trajectory {item.trajectory_id} is already in the buffer: it was rolled out twice")
            self._waiting[item.trajectory_id] = item
            self._held_ids.add(item.trajectory_id)
            self._num_bytes += item.num_bytes
        return len(items)

    def take(self, num_items: int) -> Lease | None:
        """Lease `num_items` waiting items, smallest trajectory ids first; None while fewer are waiting."""
        self._expire()
        if len(self._waiting) < num_items:
            return None
        ids = sorted(self._waiting)[:num_items]
        items = tuple(self._waiting.pop(trajectory_id) for trajectory_id in ids)
        self._num_leases += 1
        self._leases[self._num_leases] = (self._clock() + self._config.lease_seconds, items)
        return Lease(lease_id=self._num_leases, items=items)

    def acknowledge(self, lease_id: int) -> None:
        """Forget the items of a lease: they have been trained on."""
        items = self._release(lease_id)
        self._held_ids.difference_update(item.trajectory_id for item in items)
        self._num_bytes -= sum(item.num_bytes for item in items)
        self._num_acknowledged += len(items)

    def give_back(self, lease_id: int) -> None:
        """Put the items of a lease back: whoever held it did not use them."""
        items = self._release(lease_id)
        self._waiting.update((item.trajectory_id, item) for item in items)
        self._num_expired += len(items)

    def clear(self) -> int:
        """Drop everything, leases included; return how many items that were."""
        num_dropped = len(self._held_ids)
        self._waiting.clear()
        self._leases.clear()
        self._held_ids.clear()
        self._num_bytes = 0
        return num_dropped

    def counts(self) -> BufferCounts:
        return BufferCounts(
            num_waiting=len(self._waiting),
            num_leased=sum(len(items) for _, items in self._leases.values()),
            num_bytes=self._num_bytes,
            num_acknowledged=self._num_acknowledged,
            num_expired=self._num_expired,
        )

    def _release(self, lease_id: int) -> tuple[GuidedItem, ...]:
        if lease_id not in self._leases:
            raise TopdError(f"lease {lease_id} is not held: it ran out, or was acknowledged before")
        return self._leases.pop(lease_id)[1]

    def _expire(self) -> None:
        now = self._clock()
        for lease_id in [lease_id for lease_id, (deadline, _) in self._leases.items() if deadline <= now]:
            self.give_back(lease_id)
