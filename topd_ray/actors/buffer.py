"""The trajectory buffer: handles of guided trajectories in the object store, bounded in bytes, leased to the learner.

It lives in the driver, which alone knows what became of a lease; payloads stay where they are.
"""

from collections.abc import Collection, Container, Sequence

from topd_ray.actors.messages import GuidedItem
from topd_ray.config.schema import BufferConfig
from topd_ray.errors import TopdError


class TrajectoryBuffer:
    """Items wait, are leased in batches, one batch at a time, and forgotten when it is released."""

    def __init__(self, config: BufferConfig) -> None:
        self._config = config
        self._waiting: dict[str, GuidedItem] = {}
        self.leased: tuple[GuidedItem, ...] = ()
        """what the learner has"""
        self.num_bytes = 0
        """of waiting and leased items"""

    @property
    def waiting(self) -> Collection[GuidedItem]:
        return self._waiting.values()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def put(self, items: Sequence[GuidedItem]) -> int:
        """Take items in order while they fit `buffer.max_bytes`; return how many were taken.

        The caller keeps the rest and offers them again later (back-pressure). Raises TopdError for an id that the
        buffer already holds.
        """
        leased = {item.trajectory_id for item in self.leased}
        for num_taken, item in enumerate(items):
            if self.num_bytes + item.num_bytes > self._config.max_bytes:
                return num_taken
            if item.trajectory_id in self._waiting or item.trajectory_id in leased:
                raise TopdError(f"trajectory {item.trajectory_id} is already in the buffer: it was rolled out twice")
            self._waiting[item.trajectory_id] = item
            self.num_bytes += item.num_bytes
        return len(items)

    def take(self, num_items: int, *, first: Container[str] = ()) -> tuple[GuidedItem, ...]:
        """Lease `num_items` waiting items; none while fewer are waiting. Raises TopdError while others are leased.

        Those whose id is in `first` come first, then the oldest policies, then the ids in their order.
        """
        if self.leased:
            raise TopdError(f"{len(self.leased)} trajectories are still leased: release them first")
        if len(self._waiting) < num_items:
            return ()
        ordered = sorted(
            self._waiting.values(),
            key=lambda item: (item.trajectory_id not in first, item.policy_version, item.trajectory_id),
        )
        self.leased = tuple(ordered[:num_items])
        for item in self.leased:
            del self._waiting[item.trajectory_id]
        return self.leased

    def release(self) -> tuple[GuidedItem, ...]:
        """Forget what is leased, and return it: it has been trained on, or is lost."""
        released, self.leased = self.leased, ()
        self.num_bytes -= sum(item.num_bytes for item in released)
        return released

    def discard(self, trajectory_ids: Collection[str]) -> None:
        """Drop those of `trajectory_ids` that are waiting."""
        for item in [self._waiting.pop(one) for one in trajectory_ids if one in self._waiting]:
            self.num_bytes -= item.num_bytes
