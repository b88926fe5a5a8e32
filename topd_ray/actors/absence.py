"""Workers that are lost and not back yet: what they wait for, and that somebody says so."""

import time
from collections.abc import Callable, Sequence

from ray.util.placement_group import PlacementGroup, placement_group_table

from topd_ray.actors.crew import Slot
from topd_ray.actors.placement import cluster_nodes
from topd_ray.actors.room import Need, Node

FIRST_SECONDS = 10.0


class Absence:
    """Says of a worker that is made anew, after 10, 20, 40, ... seconds, what it waits for, and when it is back."""

    def __init__(
        self,
        group: PlacementGroup,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group = group
        self._say = say
        self._clock = clock
        self._since: dict[Slot, float] = {}
        self._next: dict[Slot, float] = {}

    def begin(self, slot: Slot) -> None:
        """The worker is gone. If it is lost again before it is back, it has been away since the first time."""
        self._since.setdefault(slot, self._clock())
        self._next.setdefault(slot, FIRST_SECONDS)

    def end(self, slot: Slot) -> None:
        """The worker is ready, for the first time or again."""
        if slot in self._since:
            self._say(f"{slot} is back after {self._clock() - self._since.pop(slot):.0f} s")
            del self._next[slot]

    def look(self) -> None:
        """Say what is due."""
        for slot, since in self._since.items():
            seconds = self._clock() - since
            if seconds >= self._next[slot]:
                self._say(f"{slot} has been away for {seconds:.0f} s: {self.waits_for(slot)}")
                self._next[slot] *= 2

    def waits_for(self, slot: Slot) -> str:
        places = placement_group_table(self._group)["bundles_to_node_id"]
        return waits_for(slot.need, places.get(slot.bundle), cluster_nodes())


def waits_for(need: Need, node_id: str | None, nodes: Sequence[Node]) -> str:
    """What a worker whose place is on node `node_id` waits for, if `nodes` are those alive."""
    for node in nodes:
        if node.node_id == node_id:
            return f"its process starts and loads its model on {node.address}"
    if any(node.can_hold(need) for node in nodes):
        return f"the nodes that can hold {need} are full"
    listed = "; ".join(map(str, nodes))
    return f"no node can hold {need}. The nodes there are: {listed}"
