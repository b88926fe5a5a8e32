"""The teacher beside a study, and how far its near futures are from the student's.

Axes: M windows, V vocabulary, D embedding width.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from topd_ray.actors.parts import threads
from topd_ray.config.schema import TopdConfig
from topd_ray.data.tokenizer import read_vocabulary
from topd_ray.engines.checkpoint import read_embedding
from topd_ray.engines.look_ahead import LARGEST_GROUP, Compared, compare_windows
from topd_ray.engines.teacher import TeacherEngine
from topd_ray.grouping import runs_within
from topd_ray.objective import unit_embeddings
from topd_ray.studies.statistics import Floats
from topd_ray.types import Int32


def open_teacher(config: TopdConfig) -> TeacherEngine:
    """The teacher's engine as a run builds it; as a context manager it closes itself."""
    return TeacherEngine(
        config.teacher,
        temperature=config.rollout.temperature,
        max_model_len=config.data.max_prompt_tokens + config.rollout.max_new_tokens + config.near_future.window,
        window=config.near_future.window,
        threads=threads(config, "teacher"),
        seed=config.run.seed,
    )


class Distances:
    """Exact optimal-transport distances between windows, whatever solver the config trains with.

    The ground cost is 1 - cosine of the embeddings that the config names.
    """

    def __init__(self, config: TopdConfig) -> None:
        owner = config.teacher if config.near_future.embedding == "teacher" else config.student
        self.embedding_VD = read_embedding(owner, read_vocabulary(owner).size)
        self._embedding_VD_unit = unit_embeddings(torch.from_numpy(self.embedding_VD))
        self._config = config.near_future.model_copy(update={"transport": "exact"})

    def __call__(self, student_windows: Sequence[Int32], teacher_windows: Sequence[Int32]) -> Floats:
        """[M], in units of the ground cost, of M pairs of windows, each of 1 to near_future.window tokens."""
        groups = self.compare(student_windows, teacher_windows)
        return np.concatenate([np.zeros(0), *(group.solved.distance_M.numpy() for group in groups)])

    def compare(self, student_windows: Sequence[Int32], teacher_windows: Sequence[Int32]) -> Iterator[Compared]:
        """The same pairs with their plans and costs, in groups that are solved together."""
        pairs = list(zip(student_windows, teacher_windows, strict=True))
        for group in runs_within(pairs, lambda _: self._config.window**2, LARGEST_GROUP):
            students, teachers = zip(*group, strict=True)
            yield compare_windows(students, teachers, self._embedding_VD_unit, self._config)
