"""The ways a policy can go from learner rank 0 to the rollout engines. Each is one file of this package."""

from collections.abc import Iterable
from typing import Protocol

from topd_ray.weights.bundle import Delivery, IpcDelivery, Named, WeightsBundle


class Channel(Protocol):
    """One end of a channel: learner rank 0 sends, each rollout worker fetches for its engine."""

    staging_device: str
    """where `send` wants its tensors: `cpu` or `cuda`"""

    def send(self, version: int, tensors: Iterable[Named]) -> WeightsBundle:
        """Make a version ready to be fetched. `tensors` is exhausted, and belongs to the channel."""
        ...

    def fetch(self, bundle: WeightsBundle) -> Delivery | IpcDelivery | None:
        """What an engine needs to serve the version of `bundle`; None if it can only have a newer one now.

        Raises WeightSyncError for weights that are not exactly what was sent, as far as they can be read beforehand.
        """
        ...
