"""The teacher worker: scores trajectories, looks ahead along them, and folds what it sees into targets."""

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from topd_ray.actors.messages import GuidedChunk, GuidedItem, RolloutChunk
from topd_ray.actors.store import Store
from topd_ray.config.schema import EvaluationConfig, NearFutureConfig, ObjectiveConfig, StudentConfig, TeacherConfig
from topd_ray.data.arrow import batch_to_trajectories, guided_to_batch
from topd_ray.data.tokenizer import load_tokenizer
from topd_ray.errors import PayloadLostError
from topd_ray.evaluation.answers import graded_answers
from topd_ray.grouping import runs_within
from topd_ray.types import Completions, GuidedTrajectory, Metric, Prompt

if TYPE_CHECKING:
    from topd_ray.engines.look_ahead import Student

MAX_SHARED_BYTES = 1024**2
"""Guided trajectories that share an object of the store; the learner ranks fetch whole objects."""


class TeacherWorker:
    """One teacher engine. Several threads may call it: the engine serves one at a time, transport runs beside it."""

    def __init__(
        self,
        teacher: TeacherConfig,
        student: StudentConfig,
        near_future: NearFutureConfig,
        objective: ObjectiveConfig,
        evaluation: EvaluationConfig,
        *,
        temperature: float,
        max_prompt_tokens: int,
        max_new_tokens: int,
        threads: int,
        seed: int,
        store: Store,
    ) -> None:
        self._store = store
        self._teacher = teacher
        self._near_future = near_future
        self._objective = objective
        self._embedding_owner = teacher if near_future.embedding == "teacher" else student
        self._temperature = temperature
        self._answer_tokens = evaluation.max_new_tokens or max_new_tokens
        self._max_model_len = max_prompt_tokens + max(max_new_tokens, self._answer_tokens) + near_future.window
        self._threads = threads
        self._seed = seed
        self._engine_lock = threading.Lock()

    def setup(self) -> None:
        """Load the teacher. Not in the constructor, whose errors Ray would not hand on as their own class."""
        from topd_ray.engines.checkpoint import read_embedding
        from topd_ray.engines.look_ahead import LookAhead  # vLLM is loaded where it runs, not in the driver
        from topd_ray.engines.teacher import TeacherEngine

        self._tokenizer = load_tokenizer(self._teacher)
        self._engine = TeacherEngine(
            self._teacher,
            temperature=self._temperature,
            max_model_len=self._max_model_len,
            window=self._near_future.window,
            threads=self._threads,
            seed=self._seed,
        )
        embedding_VD = read_embedding(self._embedding_owner, len(self._tokenizer))
        self._look_ahead = LookAhead(self._near_future, self._objective, embedding_VD, self._engine, self._seed)

    def look_ahead(
        self, chunks: Sequence[RolloutChunk], threshold: float, student: "Student | None" = None
    ) -> GuidedChunk:
        """Guide the trajectories of `chunks`; windows whose distance is above `threshold` count as divergent.

        The chunks' own metrics come along with the teacher's. `student` draws the student's windows where they are
        resampled. Raises PayloadLostError if it is gone then, or was not there.
        """
        batches = self._store.get([chunk.handle for chunk in chunks])
        trajectories = [trajectory for batch in batches for trajectory in batch_to_trajectories(batch)]
        with self._engine_lock:
            pending = self._look_ahead.ask(trajectories)
        if self._objective.looks_ahead and self._near_future.student_window == "resample":
            if student is None:
                raise PayloadLostError("no rollout worker is there to continue the prefixes of trajectories")
            pending = self._look_ahead.resample(pending, student)
        guided = self._look_ahead.fold(pending, threshold)
        return GuidedChunk(
            items=tuple(put_guided(guided, self._store)),
            metrics=(*(metric for chunk in chunks for metric in chunk.metrics), *window_metrics(guided)),
        )

    def evaluate(self, prompts: Sequence[Prompt], *, evaluation: EvaluationConfig, seed: int) -> Iterator[Completions]:
        """Graded answers of the teacher, in parts."""
        with self._engine_lock:
            yield from graded_answers(
                self._engine,
                lambda ids: str(self._tokenizer.decode(ids, skip_special_tokens=True)),
                prompts,
                evaluation,
                max_new_tokens=self._answer_tokens,
                seed=seed,
            )

    def verify(self, chunks: Sequence[RolloutChunk]) -> float | None:
        """Largest difference (nats) of the engine's scores from a plain forward pass; None where it was skipped."""
        batches = self._store.get([chunk.handle for chunk in chunks])
        trajectories = [trajectory for batch in batches for trajectory in batch_to_trajectories(batch)]
        with self._engine_lock:
            return self._engine.verify([(t.prompt_ids, t.response_ids) for t in trajectories])

    def shutdown(self) -> None:
        self._engine.shutdown()


def put_guided(guided: Sequence[GuidedTrajectory], store: Store) -> Iterator[GuidedItem]:
    """Put guided trajectories into the store, in order, and describe each.

    An object of the store costs about a millisecond, whatever it holds: small trajectories share one.
    """
    for share in runs_within(guided, lambda one: one.num_bytes, MAX_SHARED_BYTES):
        batch = guided_to_batch(share)
        handle = store.put(batch)
        for row, one in enumerate(share):
            yield GuidedItem(
                handle=handle,
                row=row,
                trajectory_id=one.trajectory.trajectory_id,
                policy_version=one.trajectory.policy_version,
                num_tokens=one.trajectory.num_response_tokens,
                num_sequence_tokens=len(one.trajectory.prompt_ids)
                + one.trajectory.num_response_tokens
                + one.num_branch_tokens,
                num_guided=one.num_guided,
                num_bytes=one.num_bytes,
                distances=tuple(one.windows.distances.tolist()),
            )


def window_metrics(guided: Sequence[GuidedTrajectory]) -> tuple[Metric, ...]:
    """Figures of the near future over some trajectories."""
    num_tokens = sum(one.trajectory.num_response_tokens for one in guided)
    num_windows = sum(len(one.windows.positions) for one in guided)
    return (
        Metric(
            key="teacher/sampled_nll",
            sum=-float(sum(one.scores.sampled_logprobs.sum(dtype=np.float64) for one in guided)),
            count=num_tokens,
        ),
        Metric(key="near_future/windows", sum=num_windows, count=len(guided)),
        Metric(
            key="near_future/distance",
            sum=float(sum(one.windows.distances.sum(dtype=np.float64) for one in guided)),
            count=num_windows,
        ),
        Metric(
            key="near_future/divergent",
            sum=float(sum(one.windows.divergent.sum() for one in guided)),
            count=num_windows,
        ),
        Metric(key="near_future/capped_tokens", sum=float(sum(one.capped.sum() for one in guided)), count=num_tokens),
    )
