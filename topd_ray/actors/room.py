"""Whether nodes can hold workers, all of them at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

UNITS = 10_000
"""Of a CPU or a GPU: how finely Ray counts."""
MAX_PLACEMENTS = 50_000
"""Tried, within about a second, to find out that workers do not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one actor asks Ray for."""

    role: str
    index: int
    num_cpus: int
    num_gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)
    """of the nodes it may be on"""

    @property
    def bundle(self) -> dict[str, float]:
        gpus = {"GPU": self.num_gpus} if self.num_gpus else {}
        return {"CPU": float(self.num_cpus), **gpus}

    def __str__(self) -> str:
        where = f", a node labelled {_listed(self.labels)}" if self.labels else ""
        return f"{self.role} {self.index}: {self.num_cpus} CPU, {self.num_gpus:g} GPU{where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of the cluster and all it has, busy or not."""

    node_id: str
    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def can_hold(self, need: Need) -> bool:
        """Whether it could, were it empty."""
        fits = all(_units(self.resources.get(kind, 0.0)) >= _units(amount) for kind, amount in need.bundle.items())
        return fits and self.suits(need)

    def suits(self, need: Need) -> bool:
        """Whether it carries the labels."""
        return all(self.labels.get(name) == value for name, value in need.labels.items())

    def __str__(self) -> str:
        own = {name: value for name, value in self.labels.items() if name != "ray.io/node-id"}
        has = f"{self.resources.get('CPU', 0.0):g} CPU, {self.resources.get('GPU', 0.0):g} GPU"
        return f"{self.address}: {has}{', ' + _listed(own) if own else ''}"


class Room(NamedTuple):
    """What is free on a node, in units; equal for nodes that are alike."""

    suits: tuple[bool, ...]
    """whether the node carries the labels, for each need in question"""
    cpus: int
    gpus: tuple[int, ...]
    """of each GPU, in ascending order: a share is of one GPU, and more than one are whole"""

    @classmethod
    def of(cls, node: Node, wanted: Sequence[Need]) -> "Room":
        num_gpus, part = divmod(_units(node.resources.get("GPU", 0.0)), UNITS)
        gpus = ([part] if part else []) + [UNITS] * num_gpus
        return cls(tuple(node.suits(need) for need in wanted), _units(node.resources.get("CPU", 0.0)), tuple(gpus))

    def after(self, number: int, need: Need) -> "Iterator[Room]":
        """What may be left when it holds `need`, the one of this number: a share from the fullest GPU comes first."""
        cpus, gpus = self.cpus - _units(need.num_cpus), _units(need.num_gpus)
        if not self.suits[number] or cpus < 0:
            return
        if gpus == 0:
            yield self._replace(cpus=cpus)
        elif gpus <= UNITS:
            for at, free in enumerate(self.gpus):
                if free >= gpus and free not in self.gpus[:at]:
                    rest = sorted((*self.gpus[:at], free - gpus, *self.gpus[at + 1 :]))
                    yield self._replace(cpus=cpus, gpus=tuple(rest))
        elif self.gpus.count(UNITS) >= gpus // UNITS:
            taken = gpus // UNITS
            yield self._replace(cpus=cpus, gpus=(0,) * taken + self.gpus[:-taken])

    def __str__(self) -> str:
        parts = [free / UNITS for free in self.gpus if 0 < free < UNITS] + [self.gpus.count(UNITS)]
        gpus = " + ".join(f"{part:g}" for part in parts if part) or "0"
        return f"{self.cpus / UNITS:g} CPU, {gpus} GPU"


def shortage(wanted: Sequence[Need], nodes: Sequence[Node]) -> list[str]:
    """What `nodes` lack, busy or not, to hold `wanted`: in total, for a worker alone, or for one beside the others.

    Names only what is certain: where this is empty, Ray may still find no placement.
    """
    lines = []
    for kind in ("CPU", "GPU"):
        asked = sum(_units(need.bundle.get(kind, 0.0)) for need in wanted)
        there = sum(_units(node.resources.get(kind, 0.0)) for node in nodes)
        if asked > there:
            lines.append(f"the run needs {asked / UNITS:g} {kind}s, the cluster has {there / UNITS:g}")
    alone = [need for need in wanted if any(node.can_hold(need) for node in nodes)]
    lines += [f"no node can hold {need}" for need in wanted if need not in alone]
    return lines + _crowded_out(alone, nodes)


def _crowded_out(wanted: Sequence[Need], nodes: Sequence[Node]) -> list[str]:
    """What first fit, the most constrained first, has no room for; nothing where another placement may hold all."""

    def fewest_nodes_first(need: Need) -> tuple[float, ...]:
        return sum(node.can_hold(need) for node in nodes), -need.num_gpus, -need.num_cpus

    order = sorted(wanted, key=fewest_nodes_first)
    empty = [Room.of(node, order) for node in nodes]
    rooms, left_out = list(empty), []
    for number, need in enumerate(order):
        fits = next(((at, after) for at, room in enumerate(rooms) for after in room.after(number, need)), None)
        if fits is None:
            left_out.append((number, need))
        else:
            rooms[fits[0]] = fits[1]
    if not left_out or _may_fit(order, empty):
        return []
    lines = []
    for number, need in left_out:
        suitable = [at for at, room in enumerate(rooms) if room.suits[number]]
        best = max(suitable, key=lambda at: (sum(rooms[at].gpus) if need.num_gpus else 0, rooms[at].cpus))
        lines.append(f"no room beside the others for {need}; {nodes[best].address} has most left: {rooms[best]}")
    return lines


def _may_fit(wanted: Sequence[Need], nodes: Sequence[Room]) -> bool:
    """Whether some placement holds all; True as well where more than MAX_PLACEMENTS would have to be tried."""
    for number, need in enumerate(wanted):  # and the others that may be on no other nodes
        bound = [other for other in wanted if need.labels.items() <= other.labels.items()]
        suitable = [room for room in nodes if room.suits[number]]
        if sum(_units(other.num_cpus) for other in bound) > sum(room.cpus for room in suitable):
            return False
        if sum(_units(other.num_gpus) for other in bound) > sum(sum(room.gpus) for room in suitable):
            return False
    placements, num_tried = {tuple(sorted(nodes))}, 0
    for number, need in enumerate(wanted):
        longer = set()
        for rooms in placements:
            for at, room in enumerate(rooms):
                if room in rooms[:at]:
                    continue
                for after in room.after(number, need):
                    longer.add(tuple(sorted((*rooms[:at], after, *rooms[at + 1 :]))))
                    num_tried += 1
            if num_tried > MAX_PLACEMENTS:
                return True
        placements = longer
    return bool(placements)


def _units(amount: float) -> int:
    return round(amount * UNITS)


def _listed(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(labels.items()))
