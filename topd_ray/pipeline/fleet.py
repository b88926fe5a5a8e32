"""What a training step asks of the workers, whether they are Ray actors or objects in this process."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from topd_ray.actors.messages import GuidedChunk, GuidedItem, LearnerCheck, Lease, RolloutChunk
from topd_ray.actors.traffic import Traffic
from topd_ray.types import Completions, Prompt, RolloutRequest, UpdateReport


class Buffer(Protocol):
    """The trajectory buffer as the step sees it."""

    def put(self, items: Sequence[GuidedItem]) -> int: ...

    def take(self, num_items: int) -> Lease | None: ...

    def acknowledge(self, lease_id: int) -> None: ...


class Fleet(Protocol):
    """All workers of a run."""

    traffic: Traffic
    """Bytes the driver has received from workers so far."""
    learner_attention: str
    """Name of the attention implementation that the learner has chosen."""

    @property
    def buffer(self) -> Buffer: ...

    def rollout(self, requests: Sequence[RolloutRequest]) -> Iterable[RolloutChunk]:
        """Start writing one trajectory per request."""
        ...

    def look_ahead(self, rollouts: Iterable[RolloutChunk], threshold: float) -> Iterator[GuidedChunk]:
        """Guide trajectories as they finish."""
        ...

    def learn(self, items: Sequence[GuidedItem]) -> UpdateReport:
        """Apply one update."""
        ...

    def publish_weights(self) -> int:
        """Make every rollout worker serve the learner's policy; return the version all of them acknowledged."""
        ...

    def evaluate(self, prompts: Sequence[Prompt], *, model: str, seed: int) -> Iterator[Completions]:
        """Graded answers of the `student` or the `teacher`, in parts."""
        ...

    def own_teacher(self, requests: Sequence[RolloutRequest]) -> list[GuidedItem]:
        """Trajectories scored by the student itself."""
        ...

    def preflight(self, items: list[GuidedItem]) -> LearnerCheck:
        """How the learner sees `items`, which the student's own engine scored."""
        ...

    def verify_teacher(self, requests: Sequence[RolloutRequest]) -> float | None:
        """Largest difference of the teacher engine's scores from a plain forward pass (nats)."""
        ...

    def save_learner(self, folder: Path) -> None: ...

    def load_learner(self, folder: Path) -> int: ...

    def export(self, folder: Path) -> None: ...

    def shutdown(self) -> None: ...
