"""A step refuses trajectories of another policy, too few of them, and a buffer that cannot hold them."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from topd_ray.actors.buffer import TrajectoryBuffer
from topd_ray.actors.messages import GuidedChunk, GuidedItem
from topd_ray.config.schema import BufferConfig
from topd_ray.errors import StalePolicyError, TopdError
from topd_ray.pipeline.step import train_step
from topd_ray.types import Metric, Prompt, RolloutRequest, UpdateReport


class Script:
    """A fleet that answers each request with a trajectory of `version`, `num_lost` excepted."""

    def __init__(self, *, version: int = 0, num_lost: int = 0, max_bytes: int = 1000) -> None:
        self.buffer = TrajectoryBuffer(BufferConfig(max_bytes=max_bytes))
        self.version = version
        self.num_lost = num_lost
        self.learnt: list[str] = []

    def rollout(self, requests: Sequence[RolloutRequest]) -> Sequence[RolloutRequest]:
        return requests

    def look_ahead(self, rollouts: Sequence[RolloutRequest], threshold: float) -> Iterator[GuidedChunk]:
        for number, request in enumerate(rollouts[self.num_lost :]):
            item = GuidedItem(
                handle=None,
                row=0,
                trajectory_id=request.trajectory_id,
                policy_version=self.version,
                num_tokens=5,
                num_sequence_tokens=8,
                num_guided=2.0,
                num_bytes=100,
                distances=(0.1 * number, threshold),
            )
            yield GuidedChunk(items=(item,), metrics=(Metric(key="near_future/windows", sum=2.0),))

    def learn(self, items: Sequence[GuidedItem]) -> UpdateReport:
        self.learnt = [item.trajectory_id for item in items]
        return UpdateReport(policy_version=1, metrics=[Metric(key="loss/total", sum=0.5)])

    def publish_weights(self) -> int:
        return 1


def requests(count: int = 3) -> list[RolloutRequest]:
    return [
        RolloutRequest(prompt=Prompt(prompt_id=f"p{i}", token_ids=(1,)), sample_index=0, epoch=0, seed=i)
        for i in reversed(range(count))
    ]


def step(fleet: Any) -> Any:
    return train_step(fleet, requests(), policy_version=0, threshold=0.25)


def test_a_step_learns_once_from_every_trajectory_in_the_order_of_ids() -> None:
    fleet = Script()
    result = step(fleet)
    assert fleet.learnt == ["p0/0/0", "p1/0/0", "p2/0/0"]
    assert (result.policy_version, result.num_tokens) == (1, 15)
    assert result.distances == (0.2, 0.25, 0.1, 0.25, 0.0, 0.25)
    counts = fleet.buffer.counts()
    assert (counts.num_acknowledged, counts.num_waiting, counts.num_bytes) == (3, 0, 0)
    keys = [metric.key for metric in result.metrics]
    assert keys.count("near_future/windows") == 3
    assert {"loss/total", "seconds/learn", "seconds/rollout_and_look_ahead", "seconds/publish_weights"} <= set(keys)


def test_a_trajectory_of_another_version_is_an_error() -> None:
    fleet = Script(version=7)
    with pytest.raises(StalePolicyError, match="written by policy version 7, the learner is at 0"):
        step(fleet)
    assert fleet.learnt == []


def test_a_lost_trajectory_is_an_error() -> None:
    with pytest.raises(TopdError, match="fewer than the 3 traj"):
        step(Script(num_lost=1))


def test_a_buffer_too_small_for_a_batch_is_an_error() -> None:
    with pytest.raises(TopdError, match=r"buffer.max_bytes is too small"):
        step(Script(max_bytes=250))
