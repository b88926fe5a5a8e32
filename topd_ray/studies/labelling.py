"""What a mismatch of two futures means, on tasks where that is known by construction."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from topd_ray.config.schema import TopdConfig
from topd_ray.types import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Labeller(Protocol):
    """The label of two windows that go on from `position` of a rollout."""

    def __call__(
        self, trajectory: Trajectory, position: int, student_ids: Sequence[int], teacher_ids: Sequence[int]
    ) -> str: ...


def find_labeller(config: TopdConfig, tokenizer: "PreTrainedTokenizerBase") -> Labeller | None:
    """The labeller of the task that the config's prompts are of; None where nobody knows."""
    return None
