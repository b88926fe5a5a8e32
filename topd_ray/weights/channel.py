"""The ways a policy can go from learner rank 0 to the rollout engines. Each is one file of this package."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from topd_ray.weights.bundle import Delivery, Named, WeightsBundle
from topd_ray.weights.checksum import WeightReceipt


class ServingEngine(Protocol):
    """What a channel needs of a rollout engine."""

    @property
    def policy_version(self) -> int: ...

    def update_weights(self, version: int, tensors: Iterable[Named] | Delivery) -> WeightReceipt: ...

    def receive_weights(
        self, version: int, shapes: Mapping[str, tuple[int, ...]], ipc: Mapping[str, Any], expected: tuple[int, int]
    ) -> WeightReceipt: ...


class Channel(Protocol):
    """One end of a channel: learner rank 0 sends, each rollout worker delivers to its engine."""

    staging_device: str
    """where `send` wants its tensors: `cpu` or `cuda`"""

    def send(self, version: int, tensors: Iterable[Named]) -> WeightsBundle:
        """Make a version ready to be fetched. `tensors` is exhausted, and belongs to the channel."""
        ...

    def deliver(self, bundle: WeightsBundle, engine: ServingEngine) -> WeightReceipt:
        """Let `engine` serve the version of `bundle`.

        Raises WeightSyncError for a version that is older than the engine's, and for weights that are not exactly what
        was sent.
        """
        ...
