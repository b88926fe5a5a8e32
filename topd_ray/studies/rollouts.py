"""Student rollouts for a study: those that training with the same config would draw first, kept as Parquet."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from tqdm import tqdm

from topd_ray.actors.parts import threads
from topd_ray.config.schema import TopdConfig
from topd_ray.data.arrow import TRAJECTORY_SCHEMA, batch_to_trajectories, trajectories_to_batch
from topd_ray.data.prompts import load_prompts
from topd_ray.data.schedule import PromptSchedule, rollout_requests
from topd_ray.engines.rollout import RolloutEngine
from topd_ray.errors import ConfigError
from topd_ray.pipeline.plan import Say
from topd_ray.studies.parts import Parts
from topd_ray.types import Prompt, RolloutRequest, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rollouts:
    """The rollouts of `requests` in parts of `per_part`, in the order of the requests.

    A part is drawn by itself, from an engine that remembers none before it: it is the same in whatever session.
    """

    def __init__(self, folder: Path, requests: Sequence[RolloutRequest], per_part: int) -> None:
        self._requests = [requests[start : start + per_part] for start in range(0, len(requests), per_part)]
        self._parts = Parts(folder, "rollouts", len(self._requests), TRAJECTORY_SCHEMA.names)

    @property
    def num_parts(self) -> int:
        return len(self._requests)

    def draw(self, config: TopdConfig, say: Say) -> None:
        """Draw what is not there yet, with an engine that is gone afterwards."""
        missing = self._parts.missing()
        if not missing:
            return
        self._parts.begin()
        say(f"loading {config.student.model}, which draws {sum(len(self._requests[one]) for one in missing)} rollouts")
        total = sum(map(len, self._requests))
        done = total - sum(len(self._requests[index]) for index in missing)
        with (
            RolloutEngine(
                config.student,
                config.rollout,
                max_prompt_tokens=config.data.max_prompt_tokens,
                max_new_tokens=config.rollout.max_new_tokens,
                threads=threads(config, "rollout"),
                seed=config.run.seed,
            ) as engine,
            tqdm(total=total, initial=done, desc="drawing", unit="rollout", disable=None, leave=False) as progress,
        ):
            for index in missing:
                engine.forget_prefixes()
                drawn: dict[str, Trajectory] = {}
                for trajectory in engine.generate(self._requests[index]):
                    drawn[trajectory.trajectory_id] = trajectory
                    progress.update()
                batch = trajectories_to_batch([drawn[one.trajectory_id] for one in self._requests[index]])
                self._parts.write(index, pa.Table.from_batches([batch]))

    def read(self, index: int) -> list[Trajectory]:
        """Part `index`. Raises ConfigError where its rollouts are of other prompts."""
        (batch,) = self._parts.read(index).combine_chunks().to_batches()
        trajectories = batch_to_trajectories(batch)
        wanted = [one.trajectory_id for one in self._requests[index]]
        found = [one.trajectory_id for one in trajectories]
        if found != wanted:
            there, here = next(pair for pair in zip_longest(found, wanted, fillvalue="none") if pair[0] != pair[1])
            raise ConfigError(
                f"rollouts of part {index}: found {there} where {here} is asked for now: the prompts are others than "
                "when these were drawn; right would be an empty folder (--out)"
            )
        return trajectories

    def seconds(self) -> float:
        """What drawing them took, the loading of the model included."""
        return self._parts.seconds()

    def commits(self) -> set[str]:
        """Of the source that drew them."""
        return self._parts.commits()


def first_requests(
    config: TopdConfig, tokenizer: "PreTrainedTokenizerBase", num: int, say: Say
) -> list[RolloutRequest]:
    """The first `num` requests of a run of `config`. Raises DataError as `load_prompts` does."""
    loaded = load_prompts(config.data.train, config.data, tokenizer, "train")
    if loaded.num_skipped_overlong:
        say(f"{config.data.train}: skipped {loaded.num_skipped_overlong} prompts that are too long")
    samples = config.rollout.samples_per_prompt
    return rollout_requests(
        _first_prompts(config, loaded.prompts, -(-num // samples)), samples=range(samples), run_seed=config.run.seed
    )[:num]


def _first_prompts(config: TopdConfig, prompts: Sequence[Prompt], num: int) -> list[tuple[int, Prompt]]:
    """Each with its epoch."""
    schedule = PromptSchedule(
        prompt_ids=[prompt.prompt_id for prompt in prompts],
        prompts_per_step=num,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
    )
    return [(epoch, prompts[index]) for epoch, index in schedule.take()]
