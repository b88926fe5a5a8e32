"""Calls of actors that have not been answered, and how long an answer may take."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import ray

from topd_ray.actors.crew import Slot
from topd_ray.actors.messages import RolloutChunk
from topd_ray.config.schema import TopdConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How long something may take."""

    setting: str
    seconds: float
    is_silence: bool
    """counted from the last sign of life of the worker, not from the call"""

    def __str__(self) -> str:
        return f"{self.setting}={self.seconds:g} s"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """A call that has not been answered."""

    kind: str
    slot: Slot
    sources: tuple[RolloutChunk, ...] = ()
    """of `guide`"""
    bundle: ray.ObjectRef | None = None
    """of `update_weights`"""
    made_at: float
    limit: Limit | None
    """unset: the answer comes when there is something to say"""

    def is_late(self, now: float) -> bool:
        if self.limit is None:
            return False
        since = max(self.made_at, self.slot.heard_at) if self.limit.is_silence else self.made_at
        return since + self.limit.seconds < now


class Calls:
    """By the future of the answer."""

    def __init__(self, config: TopdConfig) -> None:
        faults = config.faults
        self.silence = Limit(setting="faults.stall_seconds", seconds=faults.stall_seconds, is_silence=True)
        self.loading = Limit(setting="faults.replace_seconds", seconds=faults.replace_seconds, is_silence=False)
        acknowledging = Limit(
            setting="weights.timeout_seconds", seconds=config.weights.timeout_seconds, is_silence=False
        )
        self._limits: dict[str, Limit | None] = {"look": self.loading, "setup": self.loading, "read": None}
        if config.pipeline.on_new_weights == "interrupt":  # or else what is being written comes first
            self._limits["update_weights"] = acknowledging
        self._calls: dict[ray.ObjectRef, Call] = {}

    def __contains__(self, future: ray.ObjectRef) -> bool:
        return future in self._calls

    def __iter__(self) -> Iterator[ray.ObjectRef]:
        return iter(self._calls)

    def add(
        self,
        kind: str,
        slot: Slot,
        future: ray.ObjectRef,
        *,
        sources: tuple[RolloutChunk, ...] = (),
        bundle: ray.ObjectRef | None = None,
        made_at: float | None = None,
    ) -> None:
        """`made_at`: when a call was made that this one carries on; unset: it is made now."""
        self._calls[future] = Call(
            kind=kind,
            slot=slot,
            sources=sources,
            bundle=bundle,
            made_at=time.monotonic() if made_at is None else made_at,
            limit=self._limits.get(kind, self.silence),
        )

    def pop(self, future: ray.ObjectRef) -> Call:
        return self._calls.pop(future)

    def drop(self, slot: Slot) -> None:
        """Forget what was asked of the slot's actor, which is gone: nothing it still says is heard."""
        self._calls = {future: call for future, call in self._calls.items() if call.slot is not slot}

    def of(self, *, kind: str | None = None, role: str | None = None) -> dict[ray.ObjectRef, Call]:
        return {
            future: call
            for future, call in self._calls.items()
            if kind in (None, call.kind) and role in (None, call.slot.role)
        }

    def late(self, now: float) -> list[Call]:
        return [call for call in self._calls.values() if call.is_late(now)]
