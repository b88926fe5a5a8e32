"""Which prompts each step draws, and the requests made of them: a function of the seed and of how far the run is."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from topd_ray.errors import DataError
from topd_ray.types import Prompt, RolloutRequest


class PromptSchedule:
    """A cursor that draws every prompt exactly once per epoch, in an order of the epoch's own.

    Steps are always full: one that an epoch ends in is filled up from the next epoch, each prompt with its own epoch's
    number. So no prompt is ever left out, and one prompt can be in a step twice, under two epochs.
    """

    def __init__(self, prompt_ids: Sequence[str], prompts_per_step: int, seed: int, shuffle: bool) -> None:
        if not prompt_ids or prompts_per_step < 1:
            raise DataError(
                f"found {len(prompt_ids)} prompts to draw {prompts_per_step} a step from, right would be 1 or more of "
                "both"
            )
        self._num_prompts = len(prompt_ids)
        self._prompts_digest = _digest(*prompt_ids).hex()
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._shuffle = shuffle
        self._position = 0
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def position(self) -> int:
        """Prompts drawn so far, over all epochs."""
        return self._position

    def take(self) -> list[tuple[int, int]]:
        """The next step's prompts, each as (epoch, index)."""
        positions = range(self._position, self._position + self._prompts_per_step)
        draws = [self._draw(position) for position in positions]
        self._position = positions.stop
        return draws

    def state(self) -> dict[str, Any]:
        """Where the cursor stands, and of what. JSON only."""
        return {
            "position": self._position,
            "num_prompts": self._num_prompts,
            "prompts_digest": self._prompts_digest,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises DataError if it is of other prompts, another seed or another order."""
        own = self.state()
        for key in ("num_prompts", "prompts_digest", "seed", "shuffle"):
            if state.get(key) != own[key]:
                raise DataError(
                    f"the checkpoint's prompt order has {key}={state.get(key)!r}, this run {own[key]!r}; right would "
                    "be the prompts and the seed it was begun with"
                )
        self._position = int(state["position"])

    def _draw(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self._num_prompts)
        if self._order[0] != epoch:
            self._order = (epoch, self._order_of(epoch))
        return epoch, self._order[1][place]

    def _order_of(self, epoch: int) -> list[int]:
        """Sorted by a digest: the same on every platform and with every version of every library."""
        if not self._shuffle:
            return list(range(self._num_prompts))
        return sorted(range(self._num_prompts), key=lambda index: _digest(self._seed, epoch, index))


def rollout_requests(
    draws: Sequence[tuple[int, Prompt]], *, samples: Sequence[int], run_seed: int
) -> list[RolloutRequest]:
    """A request for each of `samples` of each (epoch, prompt), with seeds of 31 bits bound to what is asked for."""
    return [
        RolloutRequest(
            prompt=prompt,
            sample_index=sample,
            epoch=epoch,
            seed=int.from_bytes(_digest(run_seed, prompt.prompt_id, sample, epoch)[:4]) >> 1,
        )
        for epoch, prompt in draws
        for sample in samples
    ]


def _digest(*parts: int | str) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()
