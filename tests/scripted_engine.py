"""A rollout engine that takes steps when told to, for tests of the threads around it."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from topd_ray.types import Prompt, RolloutRequest, Trajectory
from topd_ray.weights.checksum import WeightReceipt

SECONDS = 10.0
"""How long a thread may take for what should take none."""


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class ScriptedEngine:
    """Writes a request in as many steps as its seed says, each taking a second of `clock` or a permit of `permits`."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.policy_version = 0
        self.is_whole = True
        self.clock = clock
        self.permits = threading.Semaphore(0)
        self.loaded: list[tuple[int, bool, int]] = []
        """(version, interrupt, requests running then)"""
        self.entered: list[tuple[str, int, int]] = []
        """(name, version, requests running then)"""
        self.error: Exception | None = None
        self._left: dict[str, tuple[int, int]] = {}
        self._in_use = threading.Lock()

    @property
    def num_running(self) -> int:
        return len(self._left)

    def add(self, requests: Sequence[RolloutRequest]) -> None:
        with self.alone():
            before = self.num_running
            for one in requests:
                self.entered.append((one.prompt.prompt_id, self.policy_version, before))
                self._left[one.prompt.prompt_id] = (one.seed, self.policy_version)

    def step(self) -> list[Trajectory]:
        with self.alone():
            if self.clock is not None:
                self.clock.now += 1.0
            else:
                assert self.permits.acquire(timeout=SECONDS), "nobody let the engine step"
            if self.error is not None:
                raise self.error
            self._left = {name: (left - 1, version) for name, (left, version) in self._left.items()}
            finished = [trajectory(name, version) for name, (left, version) in self._left.items() if left == 0]
            self._left = {name: rest for name, rest in self._left.items() if rest[0] > 0}
            return finished

    def abandon(self) -> None:
        self._left = {}

    def generate_by_step(self, requests: Sequence[RolloutRequest]) -> Iterator[list[Trajectory]]:
        self.add(requests)
        while self.num_running:
            yield self.step()

    def update_weights(self, version: int, tensors: Any, *, interrupt: bool) -> WeightReceipt:
        with self.alone():
            if isinstance(tensors, Exception):
                raise tensors
            self.loaded.append((version, interrupt, self.num_running))
            self.policy_version = version
            return receipt(version)

    @contextmanager
    def alone(self) -> Iterator[None]:
        assert self._in_use.acquire(blocking=False), "two threads at the engine"
        try:
            yield
        finally:
            self._in_use.release()


def receipt(version: int) -> WeightReceipt:
    return WeightReceipt(version=version, num_tensors=1, num_bytes=4, checksum=version)


def trajectory(name: str, version: int) -> Trajectory:
    return Trajectory(
        trajectory_id=name,
        prompt_id=name,
        sample_index=0,
        epoch=0,
        policy_version=version,
        finish_reason="stop",
        prompt_ids=np.array([1], np.int32),
        response_ids=np.array([2, 3], np.int32),
        behaviour_logprobs=np.zeros(2, np.float32),
    )


def requests(**steps: int) -> list[RolloutRequest]:
    """One by name and number of steps."""
    return [
        RolloutRequest(prompt=Prompt(prompt_id=name, token_ids=(1,)), sample_index=0, epoch=0, seed=number)
        for name, number in steps.items()
    ]


def names(batch: Sequence[Trajectory]) -> str:
    return "".join(one.trajectory_id for one in batch)
