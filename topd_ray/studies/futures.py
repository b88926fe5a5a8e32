"""Student rollouts, the teacher beside them, and how far apart near futures are: what single-point studies start from.

The two engines never live at the same time: rollouts are drawn, their engine closes, then the teacher's opens.

Axes: M windows, V vocabulary, D embedding width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

from topd_ray.actors.parts import threads
from topd_ray.config.schema import TopdConfig
from topd_ray.data.prompts import load_prompts
from topd_ray.data.schedule import PromptSchedule, rollout_requests
from topd_ray.data.tokenizer import load_tokenizer, read_vocabulary
from topd_ray.engines.checkpoint import read_embedding
from topd_ray.engines.look_ahead import LARGEST_GROUP
from topd_ray.engines.rollout import RolloutEngine
from topd_ray.engines.teacher import TeacherEngine
from topd_ray.grouping import runs_within
from topd_ray.objective import exact_transport, ground_cost, pad_windows, unit_embeddings
from topd_ray.pipeline.plan import Say
from topd_ray.studies.statistics import Floats
from topd_ray.types import Int32, Trajectory


def draw_rollouts(config: TopdConfig, num_trajectories: int, say: Say) -> list[Trajectory]:
    """One rollout each of the first training prompts that a run of this config would draw, in that order.

    Prompts are drawn again, in later epochs, where there are fewer than that. Raises ConfigError and DataError as a run
    does for prompts that do not load.
    """
    loaded = load_prompts(config.data.train, config.data, load_tokenizer(config.student), "train")
    schedule = PromptSchedule(
        prompt_ids=[prompt.prompt_id for prompt in loaded.prompts],
        prompts_per_step=num_trajectories,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
    )
    draws = [(epoch, loaded.prompts[index]) for epoch, index in schedule.take()]
    requests = rollout_requests(draws, samples=[0], run_seed=config.run.seed)
    say(f"drawing {num_trajectories} rollouts of {config.student.model}")
    with (
        RolloutEngine(
            config.student,
            config.rollout,
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_new_tokens=config.rollout.max_new_tokens,
            threads=threads(config, "rollout"),
            seed=config.run.seed,
        ) as engine,
        tqdm(total=num_trajectories, desc="writing", unit="rollout", disable=None, leave=False) as progress,
    ):
        written = {}
        for trajectory in engine.generate(requests):
            written[trajectory.trajectory_id] = trajectory
            progress.update()
    return [written[request.trajectory_id] for request in requests]


@contextmanager
def open_teacher(config: TopdConfig) -> Iterator[TeacherEngine]:
    """The teacher's engine as a run builds it; closed when the block ends."""
    with TeacherEngine(
        config.teacher,
        temperature=config.rollout.temperature,
        max_model_len=config.data.max_prompt_tokens + config.rollout.max_new_tokens + config.near_future.window,
        window=config.near_future.window,
        threads=threads(config, "teacher"),
        seed=config.run.seed,
    ) as engine:
        yield engine


class Distances:
    """Exact optimal-transport distances between windows, whatever solver the config trains with.

    The ground cost is 1 - cosine of the embeddings that the config names.
    """

    def __init__(self, config: TopdConfig) -> None:
        owner = config.teacher if config.near_future.embedding == "teacher" else config.student
        self.embedding_VD = read_embedding(owner, read_vocabulary(owner).size)
        self._embedding_VD_unit = unit_embeddings(torch.from_numpy(self.embedding_VD))
        self._width = config.near_future.window

    def __call__(self, student_windows: Sequence[Int32], teacher_windows: Sequence[Int32]) -> Floats:
        """[M], in units of the ground cost, of M pairs of windows, each of 1 to near_future.window tokens."""
        pairs = list(zip(student_windows, teacher_windows, strict=True))
        groups = runs_within(pairs, lambda _: self._width**2, LARGEST_GROUP)
        found = [self._of_group(*zip(*group, strict=True)) for group in groups]
        return np.concatenate([np.zeros(0), *found])

    def _of_group(self, student_windows: Sequence[Int32], teacher_windows: Sequence[Int32]) -> Floats:
        student_ids, student_lengths = pad_windows(student_windows, self._width)
        teacher_ids, teacher_lengths = pad_windows(teacher_windows, self._width)
        cost_MST = ground_cost(student_ids, teacher_ids, self._embedding_VD_unit, student_lengths, teacher_lengths)
        distances: Floats = exact_transport(cost_MST, student_lengths, teacher_lengths).distance_M.numpy()
        return distances
