"""The rollout worker: a student engine that writes trajectories and takes new weights."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from topd_ray.actors.messages import GuidedItem, RolloutChunk
from topd_ray.actors.store import Store
from topd_ray.actors.teacher import put_guided
from topd_ray.config.schema import EvaluationConfig, RolloutConfig, StudentConfig, WeightsConfig
from topd_ray.data.arrow import trajectories_to_batch
from topd_ray.data.tokenizer import load_tokenizer
from topd_ray.evaluation.answers import graded_answers
from topd_ray.types import (
    Completions,
    GuidedTrajectory,
    Metric,
    Prompt,
    RolloutRequest,
    SparseTargets,
    Trajectory,
    Windows,
)
from topd_ray.weights.bundle import WeightsBundle
from topd_ray.weights.checksum import WeightReceipt
from topd_ray.weights.choice import open_channel

HANDOVER_SHARE = 0.1
"""Largest share of a rollout worker's time that goes into handing trajectories on: a handover waits, and gathers
company, until the time since the last one makes up for what that one cost, Ray's stream included. In one process
(`--inline`) that is also the teacher's look-ahead: nothing is written meanwhile, so more company costs no time."""


class RolloutWorker:
    """One student engine and the store its trajectories go to."""

    def __init__(
        self,
        student: StudentConfig,
        rollout: RolloutConfig,
        evaluation: EvaluationConfig,
        *,
        weights: WeightsConfig,
        max_prompt_tokens: int,
        threads: int,
        seed: int,
        store: Store,
    ) -> None:
        self._store = store
        self._student = student
        self._rollout = rollout
        self._channel = open_channel(weights, store)
        self._evaluation = evaluation
        self._max_prompt_tokens = max_prompt_tokens
        self._answer_tokens = evaluation.max_new_tokens or rollout.max_new_tokens
        self._threads = threads
        self._seed = seed

    def setup(self) -> None:
        """Load the student. Not in the constructor, whose errors Ray would not hand on as their own class."""
        from topd_ray.engines.rollout import RolloutEngine  # vLLM is loaded where it runs, not in the driver

        self._tokenizer = load_tokenizer(self._student)
        self._engine = RolloutEngine(
            self._student,
            self._rollout,
            max_prompt_tokens=self._max_prompt_tokens,
            max_new_tokens=max(self._rollout.max_new_tokens, self._answer_tokens),
            threads=self._threads,
            seed=self._seed,
        )

    def generate(self, requests: Sequence[RolloutRequest], *, whole: bool) -> Iterator[RolloutChunk]:
        """Yield trajectories as they finish, or with `whole` all of them at the end, in the order of their ids."""
        finished: list[Trajectory] = []
        next_handover = 0.0
        for step in self._engine.generate_by_step(requests):
            finished += step
            started = time.monotonic()
            if finished and not whole and started >= next_handover:
                yield self._chunk(finished)
                ended = time.monotonic()
                finished, next_handover = [], ended + (ended - started) / HANDOVER_SHARE
        if finished:
            yield self._chunk(sorted(finished, key=lambda trajectory: trajectory.trajectory_id))

    def update_weights(self, bundle: WeightsBundle) -> WeightReceipt:
        """Serve `bundle.version` from now on."""
        return self._channel.deliver(bundle, self._engine)

    def evaluate(self, prompts: Sequence[Prompt], *, seed: int) -> Iterator[Completions]:
        """Graded answers of the student as it is now, in parts."""
        yield from graded_answers(
            self._engine,
            lambda ids: str(self._tokenizer.decode(ids, skip_special_tokens=True)),
            prompts,
            self._evaluation,
            max_new_tokens=self._answer_tokens,
            seed=seed,
        )

    def own_teacher(self, requests: Sequence[RolloutRequest], top_k: int | str) -> list[GuidedItem]:
        """Trajectories scored by the student itself, for the pre-flight: distilling them must change nothing."""
        trajectories = list(self._engine.generate(requests))
        sequences = [(t.prompt_ids, t.response_ids) for t in trajectories]
        scores = self._engine.score(sequences, top_k)
        guided = [
            GuidedTrajectory(
                trajectory=trajectory,
                scores=score,
                targets=SparseTargets.empty(trajectory.num_response_tokens),
                capped=np.zeros(trajectory.num_response_tokens, np.bool_),
                windows=Windows.empty(),
            )
            for trajectory, score in zip(trajectories, scores, strict=True)
        ]
        return list(put_guided(guided, self._store))

    def shutdown(self) -> None:
        self._engine.shutdown()

    def _chunk(self, trajectories: Sequence[Trajectory]) -> RolloutChunk:
        batch: pa.RecordBatch = trajectories_to_batch(trajectories)
        num_tokens = sum(t.num_response_tokens for t in trajectories)
        return RolloutChunk(
            handle=self._store.put(batch),
            metrics=(
                Metric(key="rollout/response_tokens", sum=num_tokens, count=len(trajectories)),
                Metric(
                    key="rollout/cut_by_length",
                    sum=sum(t.finish_reason == "length" for t in trajectories),
                    count=len(trajectories),
                ),
                Metric(
                    key="rollout/behaviour_nll",
                    sum=-float(sum(t.behaviour_logprobs.sum() for t in trajectories)),
                    count=num_tokens,
                ),
            ),
        )
