"""One training step: the whole algorithm of a synchronous run.

    prompts -> rollout (student) -> look_ahead (teacher: scores, windows, transport, sparse targets)
            -> buffer -> learn (one update) -> publish_weights -> the next step's rollouts

Nothing here knows a tensor: trajectories pass between workers by handle.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from topd_ray.actors.messages import GuidedItem, Lease
from topd_ray.errors import StalePolicyError, TopdError
from topd_ray.metrics.timing import Stopwatch
from topd_ray.pipeline.fleet import Buffer, Fleet
from topd_ray.types import Metric, RolloutRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did."""

    policy_version: int
    num_tokens: int
    """response tokens trained on"""
    distances: tuple[float, ...]
    """of all windows, in the order of trajectory ids and positions"""
    metrics: tuple[Metric, ...]


def train_step(
    fleet: Fleet, requests: Sequence[RolloutRequest], *, policy_version: int, threshold: float
) -> StepResult:
    """Roll out `requests`, guide them, learn from them once, and publish the new policy."""
    watch = Stopwatch()
    metrics: list[Metric] = []

    with watch.time("rollout_and_look_ahead"):
        for guided in fleet.look_ahead(fleet.rollout(requests), threshold):
            put_all(fleet.buffer, guided.items)
            metrics += guided.metrics
        lease = take_all(fleet.buffer, len(requests))
        refuse_other_versions(lease.items, policy_version)

    with watch.time("learn"):
        report = fleet.learn(lease.items)
        fleet.buffer.acknowledge(lease.lease_id)

    with watch.time("publish_weights"):
        version = fleet.publish_weights()

    return StepResult(
        policy_version=version,
        num_tokens=sum(item.num_tokens for item in lease.items),
        distances=tuple(distance for item in lease.items for distance in item.distances),
        metrics=(*metrics, *report.metrics, *watch.metrics()),
    )


def put_all(buffer: Buffer, items: Sequence[GuidedItem]) -> None:
    """A synchronous step takes only whole batches, so a buffer that cannot hold one would wait for ever."""
    if buffer.put(items) < len(items):
        raise TopdError("buffer.max_bytes is too small for the trajectories of one update: raise it")


def take_all(buffer: Buffer, num_items: int) -> Lease:
    lease = buffer.take(num_items)
    if lease is None:
        raise TopdError(f"the workers returned fewer than the {num_items} trajectories they were asked for")
    return lease


def refuse_other_versions(items: Sequence[GuidedItem], policy_version: int) -> None:
    """Synchronous runs are exactly on-policy. Raises StalePolicyError otherwise."""
    strangers = [item for item in items if item.policy_version != policy_version]
    if strangers:
        raise StalePolicyError(
            f"trajectory {strangers[0].trajectory_id} was written by policy version {strangers[0].policy_version}, "
            f"the learner is at {policy_version} ({len(strangers)} of {len(items)} trajectories)"
        )
