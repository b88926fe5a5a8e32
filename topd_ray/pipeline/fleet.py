"""What the driver asks of the workers, whether they are Ray actors or objects in this process."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from topd_ray.actors.events import Event
from topd_ray.actors.messages import GuidedItem, LearnerCheck, RolloutChunk
from topd_ray.actors.traffic import Traffic
from topd_ray.config.schema import EvaluationConfig, TopdConfig
from topd_ray.types import Completions, Prompt, RolloutRequest


class FlowFleet(Protocol):
    """Commands that return at once, and the events that answer them. Workers count from 0."""

    def write(self, worker: int, requests: Sequence[RolloutRequest]) -> None:
        """Have a rollout worker write one trajectory per request (Written)."""
        ...

    def guide(self, teacher: int, chunks: Sequence[RolloutChunk], threshold: float) -> None:
        """Have a teacher worker guide trajectories (Guided, GuideUnreadable)."""
        ...

    def learn(self, items: Sequence[GuidedItem]) -> None:
        """Apply one update (Learned, LearnUnreadable). One at a time."""
        ...

    def publish(self) -> None:
        """Make every rollout worker serve the learner's policy (Published, one a worker)."""
        ...

    def excuse(self, role: str) -> None:
        """An input is given up with which workers of `role` failed: their restarts may have been for it."""
        ...

    def wait(self) -> Sequence[Event]:
        """What has happened, after something has, or after a moment.

        Raises WorkerLostError where the run has to go on from its last checkpoint, and what a worker raises for
        reasons of its own.
        """
        ...


class Fleet(FlowFleet, Protocol):
    """All workers of a run. What follows is done when it returns, and asked between two updates."""

    planned: TopdConfig
    """The config with the GPUs that each worker gets, once these are known: that of the sessions after this one."""
    traffic: Traffic
    """Bytes the driver has received from workers so far."""
    learner_attention: str
    """Name of the attention implementation that the learner has chosen."""

    def start(self) -> None:
        """Have all workers ready; `shutdown` cleans up whatever this leaves when it raises."""
        ...

    def publish_weights(self) -> int:
        """Publish; return the version that all rollout workers acknowledged."""
        ...

    def evaluate(
        self, prompts: Sequence[Prompt], *, model: str, evaluation: EvaluationConfig, seed: int
    ) -> Iterator[Completions]:
        """Graded answers of the `student` or the `teacher`, in parts; `evaluation` says how they are drawn."""
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
