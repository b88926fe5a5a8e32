"""What a fleet tells the driver that has happened."""

from dataclasses import dataclass

from topd_ray.actors.messages import GuidedChunk, RolloutChunk
from topd_ray.types import Metric, UpdateReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A rollout worker has finished trajectories."""

    worker: int
    chunk: RolloutChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Guided:
    """A teacher worker has guided the trajectories of `sources`."""

    teacher: int
    sources: tuple[RolloutChunk, ...]
    chunk: GuidedChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class GuideUnreadable:
    """A teacher worker could not fetch one of `sources`: a worker or node that held it is gone."""

    teacher: int
    sources: tuple[RolloutChunk, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """All learner ranks have applied an update."""

    report: UpdateReport


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnUnreadable:
    """A learner rank could not fetch its share of the batch, and no rank has applied anything."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """The learner offers new weights."""

    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A rollout worker serves policy `version` from now on; also the first sign of one that was made anew."""

    worker: int
    version: int
    metrics: tuple[Metric, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A rollout or teacher worker is gone with all it was asked for; another is being made in its place."""

    role: str
    worker: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A teacher worker that was made anew takes calls."""

    teacher: int


Event = Written | Guided | GuideUnreadable | Learned | LearnUnreadable | Packed | Published | Lost | Ready
