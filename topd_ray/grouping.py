"""Splitting a sequence into runs of bounded size."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def runs_within(items: Iterable[Item], size_of: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Consecutive items, in order, of at most `limit` together; an item that is larger by itself goes alone."""
    run: list[Item] = []
    total = 0
    for item in items:
        size = size_of(item)
        if run and total + size > limit:
            yield run
            run, total = [], 0
        run.append(item)
        total += size
    if run:
        yield run
