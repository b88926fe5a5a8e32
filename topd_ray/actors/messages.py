"""What passes through the driver: counts, ids and handles, never tokens or log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

from topd_ray.actors.store import Handle
from topd_ray.types import Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutChunk:
    """Trajectories that finished together, as one record batch behind `handle`."""

    handle: Handle
    trajectory_ids: tuple[str, ...]
    """in the order of the rows, as what follows"""
    policy_versions: tuple[int, ...]
    num_tokens: tuple[int, ...]
    """response tokens"""
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidedItem:
    """One guided trajectory: a row of the record batch behind `handle`, which others may share."""

    handle: Handle
    row: int
    trajectory_id: str
    policy_version: int
    num_tokens: int
    """response tokens"""
    num_sequence_tokens: int
    """tokens of prompt and response, and those of the branches with their prefixes"""
    num_guided: float
    """(window, position) pairs the teacher guides"""
    num_bytes: int
    distances: tuple[float, ...]
    """optimal-transport distance of each window, in the order of the positions"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidedChunk:
    """What one look-ahead call made."""

    items: tuple[GuidedItem, ...]
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisers:
    """Global sums of one update, by which every rank and micro-batch divides its share of the loss."""

    num_tokens: float
    num_guided: float
    num_trajectories: int

    @classmethod
    def of(cls, items: Sequence[GuidedItem]) -> "Normalisers":
        return cls(
            num_tokens=float(sum(item.num_tokens for item in items)),
            num_guided=float(sum(item.num_guided for item in items)),
            num_trajectories=len(items),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerCheck:
    """How the learner sees trajectories that the student's own rollout engine scored (nats per token)."""

    loss: float
    largest_difference: float
    """of a sampled token's log-prob"""
    mean_difference: float
