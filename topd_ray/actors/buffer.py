"""The trajectory buffer: handles of guided trajectories in the object store, bounded in bytes, handed out on lease.

It lives in the driver, which alone knows what became of a lease; payloads stay where they are.
"""

from collections.abc import Collection, Container, Sequence

from topd_ray.actors.messages import GuidedItem, Lease
from topd_ray.config.schema import BufferConfig
from topd_ray.errors import TopdError


class TrajectoryBuffer:
    """Oldest policy first, then by trajectory id, within what is waiting; each id is held once."""

    def __init__(self, config: BufferConfig) -> None:
        self._config = config
        self._waiting: dict[str, GuidedItem] = {}
        self._leases: dict[int, tuple[GuidedItem, ...]] = {}
        self._held_ids: set[str] = set()
        self._num_leases = 0
        self.num_bytes = 0
        """of waiting and leased items"""

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_leased(self) -> int:
        return len(self._held_ids) - len(self._waiting)

    def put(self, items: Sequence[GuidedItem]) -> int:
        """Take items in order while they fit `buffer.max_bytes`; return how many were taken.

        The caller keeps the rest and offers them again later (back-pressure). Raises TopdError for an id that the
        buffer already holds.
        """
        for num_taken, item in enumerate(items):
            if self.num_bytes + item.num_bytes > self._config.max_bytes:
                return num_taken
            if item.trajectory_id in self._held_ids:
                raise TopdError(f"trajectory {item.trajectory_id} is already in the buffer: it was rolled out twice")
            self._waiting[item.trajectory_id] = item
            self._held_ids.add(item.trajectory_id)
            self.num_bytes += item.num_bytes
        return len(items)

    def take(self, num_items: int, *, first: Container[str] = ()) -> Lease | None:
        """Lease `num_items` waiting items, `first` and the oldest policies first; None while fewer are waiting."""
        if len(self._waiting) < num_items:
            return None
        ordered = sorted(
            self._waiting.values(),
            key=lambda item: (item.trajectory_id not in first, item.policy_version, item.trajectory_id),
        )
        items = tuple(ordered[:num_items])
        for item in items:
            del self._waiting[item.trajectory_id]
        self._num_leases += 1
        self._leases[self._num_leases] = items
        return Lease(lease_id=self._num_leases, items=items)

    def acknowledge(self, lease_id: int) -> None:
        """Forget the items of a lease: they have been trained on, or are lost."""
        if lease_id not in self._leases:
            raise TopdError(f"lease {lease_id} is not held: it was acknowledged before")
        self._forget(self._leases.pop(lease_id))

    def discard(self, trajectory_ids: Collection[str]) -> None:
        """Drop those of `trajectory_ids` that are waiting."""
        self._forget([self._waiting.pop(one) for one in trajectory_ids if one in self._waiting])

    def older_than(self, policy_version: int) -> list[str]:
        """Ids of waiting items that an earlier policy has written."""
        return [item.trajectory_id for item in self._waiting.values() if item.policy_version < policy_version]

    def _forget(self, items: Sequence[GuidedItem]) -> None:
        self._held_ids.difference_update(item.trajectory_id for item in items)
        self.num_bytes -= sum(item.num_bytes for item in items)
