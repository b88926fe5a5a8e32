"""The trajectory buffer: handles of guided trajectories in the object store, bounded in bytes, leased to the learner.

It lives in the driver, which alone knows what became of a lease; payloads stay where they are.
"""

from collections import Counter
from collections.abc import Collection, Sequence

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
        self._leased_ids: frozenset[str] = frozenset()
        self.num_waiting_of: Counter[int] = Counter()
        """by policy version"""
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
        for num_taken, item in enumerate(items):
            if self.num_bytes + item.num_bytes > self._config.max_bytes:
                return num_taken
            if item.trajectory_id in self._waiting or item.trajectory_id in self._leased_ids:
                raise TopdError(f"trajectory {item.trajectory_id} is already in the buffer: it was rolled out twice")
            self._waiting[item.trajectory_id] = item
            self.num_waiting_of[item.policy_version] += 1
            self.num_bytes += item.num_bytes
        return len(items)

    def take(self, num_items: int) -> tuple[GuidedItem, ...]:
        """Lease `num_items` waiting items; none while fewer are waiting. Raises TopdError while others are leased.

        Those of the oldest policies come first, then the ids in their order.
        """
        if self.leased:
            raise TopdError(f"{len(self.leased)} trajectories are still leased: release them first")
        if len(self._waiting) < num_items:
            return ()
        ordered = sorted(self._waiting.values(), key=lambda item: (item.policy_version, item.trajectory_id))
        self.leased = tuple(self._remove(item.trajectory_id) for item in ordered[:num_items])
        self._leased_ids = frozenset(item.trajectory_id for item in self.leased)
        return self.leased

    def release(self) -> tuple[GuidedItem, ...]:
        """Forget what is leased, and return it: it has been trained on, or is lost."""
        released, self.leased, self._leased_ids = self.leased, (), frozenset()
        self.num_bytes -= sum(item.num_bytes for item in released)
        return released

    def discard(self, trajectory_ids: Collection[str]) -> None:
        """Drop those of `trajectory_ids` that are waiting."""
        for item in [self._remove(one) for one in trajectory_ids if one in self._waiting]:
            self.num_bytes -= item.num_bytes

    def _remove(self, trajectory_id: str) -> GuidedItem:
        item = self._waiting.pop(trajectory_id)
        self.num_waiting_of[item.policy_version] -= 1
        return item
