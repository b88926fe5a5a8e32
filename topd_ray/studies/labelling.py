"""What a mismatch of two futures means, on tasks where that is known by construction."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from topd_ray.config.schema import TopdConfig
from topd_ray.demo.worded import PIECES
from topd_ray.demo.worded_labels import label
from topd_ray.errors import DataError
from topd_ray.types import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPT = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n$", re.DOTALL)


class Labeller(Protocol):
    """The label of two windows that go on from `position` of a rollout."""

    def __call__(
        self, trajectory: Trajectory, position: int, student_ids: Sequence[int], teacher_ids: Sequence[int]
    ) -> str: ...


def find_labeller(config: TopdConfig, tokenizer: "PreTrainedTokenizerBase") -> Labeller | None:
    """The labeller of the task that the prompts are of: worded arithmetic, told by its vocabulary; None for others."""
    is_worded = config.data.train == "arithmetic" and set(PIECES) <= tokenizer.get_vocab().keys()
    return WordedLabeller(tokenizer) if is_worded else None


class WordedLabeller:
    """`harmless`, `choice`, `error` or `undecided`, see topd_ray/demo/worded_labels.py."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer

    def __call__(
        self, trajectory: Trajectory, position: int, student_ids: Sequence[int], teacher_ids: Sequence[int]
    ) -> str:
        prompt = self._text(trajectory.prompt_ids.tolist())
        found = _PROMPT.search(prompt)
        if found is None:
            raise DataError(f"prompt {trajectory.prompt_id}: found {prompt!r}, right would be one expression to solve")
        prefix = self._text(trajectory.response_ids[:position].tolist())
        return label(found[1], prefix, self._text(student_ids), self._text(teacher_ids))

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))
