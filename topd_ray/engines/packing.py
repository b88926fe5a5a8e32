"""Which trajectories share a forward pass, and which rank computes them. Imports no torch: the driver uses it."""

from collections.abc import Sequence

from topd_ray.errors import DataError

QUADRATIC_TOKENS = 24_576
"""Length at which causal attention costs as much as the rest of a layer, 12 times the width: here of a width of 2,048.
A guess for all models: between widths of 1,024 and 4,096 it weighs attention by half or double."""


def cost(num_tokens: int) -> float:
    """Compute of a trajectory, L (1 + L / QUADRATIC_TOKENS), in tokens of a short one."""
    return num_tokens * (1.0 + num_tokens / QUADRATIC_TOKENS)


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the sequences of each micro-batch, at most `budget` tokens in each, the costliest micro-batch first.

    As few as first-fit decreasing needs (at most 11/9 of the fewest possible, and one), and of about equal cost where
    the budget leaves room for that. A sequence longer than the budget gets a micro-batch of its own, so a budget of 1
    packs nothing. The order of equally long sequences decides their place, nothing else does.

    Raises DataError if the budget or a length is below 1.
    """
    if budget < 1:
        raise DataError(f"budget is {budget} tokens, and should be at least 1")
    if shortest := [length for length in lengths if length < 1]:
        raise DataError(f"lengths holds {shortest[0]}, and a sequence has at least 1 token")
    fewest = _first_fit(lengths, budget)
    parts = _even(lengths, budget, len(fewest)) or fewest
    return sorted(parts, key=lambda part: -sum(cost(lengths[index]) for index in part))


def balance(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Indices of the items of each share, in descending cost: each item goes to the share that has least so far.

    The largest share is at most 4/3 of the best possible one, and no share is ahead of another by more than one item's
    cost (Graham 1969). With fewer items than shares some are empty.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [0.0] * num_shares
    for index in _descending(costs):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += costs[index]
    return shares


def _descending(sizes: Sequence[float]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda index: -sizes[index])


def _first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Longest first, each into the first part with room for it."""
    parts: list[list[int]] = []
    room: list[int] = []
    for index in _descending(lengths):
        place = next((part for part, left in enumerate(room) if lengths[index] <= left), len(parts))
        if place == len(parts):
            parts.append([])
            room.append(budget)
        parts[place].append(index)
        room[place] -= lengths[index]
    return parts


def _even(lengths: Sequence[int], budget: int, num_parts: int) -> list[list[int]] | None:
    """Longest first, each into the part of least cost with room for it; None where one finds no room."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    room, loads = [budget] * num_parts, [0.0] * num_parts
    for index in _descending(lengths):
        open_parts = [part for part in range(num_parts) if lengths[index] <= room[part] or not parts[part]]
        if not open_parts:
            return None
        place = min(open_parts, key=lambda part: loads[part])
        parts[place].append(index)
        room[place] -= lengths[index]
        loads[place] += cost(lengths[index])
    return parts
