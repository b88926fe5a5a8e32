"""The rollout worker: a student engine that writes trajectories and takes new weights."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayActorError

from topd_ray.actors.messages import GuidedItem, RolloutChunk
from topd_ray.actors.outbox import Outbox
from topd_ray.actors.serving import RolloutServer
from topd_ray.actors.store import Store
from topd_ray.actors.teacher import put_guided
from topd_ray.config.schema import EvaluationConfig, RolloutConfig, StudentConfig, WeightsConfig
from topd_ray.data.arrow import trajectories_to_batch
from topd_ray.data.tokenizer import load_tokenizer
from topd_ray.errors import PayloadLostError
from topd_ray.evaluation.answers import graded_answers
from topd_ray.types import (
    Completions,
    GuidedTrajectory,
    Int32,
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


class RemoteStudent:
    """A rollout worker in an actor of its own, as a teacher worker needs it to have prefixes continued."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def continue_prefixes(
        self, prefixes: Sequence[Sequence[int]], num_tokens: int, *, seeds: Sequence[int]
    ) -> list[Int32]:
        """See `RolloutWorker`. Raises PayloadLostError if the actor is gone: its trajectories are then drawn anew."""
        try:
            continued: list[Int32] = ray.get(self._actor.continue_prefixes.remote(prefixes, num_tokens, seeds=seeds))
        except RayActorError as error:
            raise PayloadLostError(f"the rollout worker that should continue prefixes is gone: {error}") from error
        return continued


class RolloutWorker:
    """One student engine and the store its trajectories go to.

    Several threads may call it. From the first `read` on, a thread of its own writes what is submitted; what others ask
    of the engine waits until it has nothing to write.
    """

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
        window: int = 0,
    ) -> None:
        """`window`: how many tokens `continue_prefixes` adds to a prefix of the longest trajectory."""
        self._store = store
        self._student = student
        self._rollout = rollout
        self._channel = open_channel(weights, store)
        self._max_prompt_tokens = max_prompt_tokens
        self._written_tokens = rollout.max_new_tokens + window
        self._answer_tokens = evaluation.max_new_tokens or rollout.max_new_tokens
        self._threads = threads
        self._seed = seed
        self._outbox = Outbox.spent()

    def setup(self) -> None:
        """Load the student. Not in the constructor, whose errors Ray would not hand on as their own class."""
        from topd_ray.engines.rollout import RolloutEngine  # vLLM is loaded where it runs, not in the driver

        self._tokenizer = load_tokenizer(self._student)
        self._engine = RolloutEngine(
            self._student,
            self._rollout,
            max_prompt_tokens=self._max_prompt_tokens,
            max_new_tokens=max(self._written_tokens, self._answer_tokens),
            threads=self._threads,
            seed=self._seed,
        )
        self._server = RolloutServer(self._engine)

    def read(self) -> list[RolloutChunk]:
        """What has been written of the requests submitted since the last call, as soon as there is some.

        Nothing more comes after an empty list, which `stop` leads to, nor after the error that writing has ended with:
        requests not read by then are forgotten, and another call starts anew. One call at a time.

        The chunks' handles reach the driver within the answer of an ordinary call. Within what a streaming generator
        yields Ray loses objects whenever the reader is slower than the writer (ray-project/ray#58082).
        """
        if self._outbox.is_spent:
            self._outbox = Outbox()
            threading.Thread(target=self._write_to, args=(self._outbox,), name="writing", daemon=True).start()
        return self._outbox.take()

    def _write_to(self, outbox: Outbox) -> None:
        try:
            for trajectories in self._server.serve():
                outbox.put(self._chunk(trajectories))
        except BaseException as error:  # raised where it is read
            outbox.close(error)
        else:
            outbox.close()

    def submit(self, requests: Sequence[RolloutRequest], *, whole: bool) -> None:
        """Have these written; returns at once.

        With `whole` they run alone, after those submitted before, and leave as one chunk in the order of their ids:
        what is written depends on nothing else.
        """
        self._server.submit(requests, whole=whole)

    def stop(self) -> None:
        """End the writing at the engine's next step; what has not left it is dropped."""
        self._server.stop()

    def generate(self, requests: Sequence[RolloutRequest], *, whole: bool) -> Iterator[RolloutChunk]:
        """Yield trajectories as they finish, or with `whole` all of them at the end, in the order of their ids."""
        for trajectories in self._server.generate(requests, whole=whole):
            yield self._chunk(trajectories)

    def generate_whole(self, requests: Sequence[RolloutRequest]) -> list[RolloutChunk]:
        """What `generate` yields with `whole`."""
        return list(self.generate(requests, whole=True))

    def update_weights(self, bundle: WeightsBundle, *, interrupt: bool = False) -> WeightReceipt | None:
        """Serve `bundle.version` from now on; returns when the engine does.

        What is being written finishes first, or with `interrupt` goes on under the new weights from the tokens it has.
        A bundle that a newer one overtakes is not loaded, and the newer one's receipt returned, or None if it could not
        even be fetched any more. Raises WeightSyncError for a version older than the one served, and for weights that
        are not what was sent or do not fit; the engine then goes on as before, unless it read them itself (`ipc`).
        """
        return self._server.update_weights(bundle.version, lambda: self._channel.fetch(bundle), interrupt=interrupt)

    def evaluate(self, prompts: Sequence[Prompt], *, evaluation: EvaluationConfig, seed: int) -> Iterator[Completions]:
        """Graded answers of the student as it is now, in parts."""
        with self._server.turn():
            yield from graded_answers(
                self._engine,
                lambda ids: str(self._tokenizer.decode(ids, skip_special_tokens=True)),
                prompts,
                evaluation,
                max_new_tokens=self._answer_tokens,
                seed=seed,
            )

    def continue_prefixes(
        self, prefixes: Sequence[Sequence[int]], num_tokens: int, *, seeds: Sequence[int]
    ) -> list[Int32]:
        """What the policy that is served writes after each prefix (`RolloutEngine.continue_prefixes`)."""
        with self._server.turn():
            return self._engine.continue_prefixes(prefixes, num_tokens, seeds=seeds)

    def own_teacher(self, requests: Sequence[RolloutRequest], top_k: int | str) -> list[GuidedItem]:
        """Trajectories scored by the student itself, for the pre-flight: distilling them must change nothing."""
        with self._server.turn():
            trajectories = list(self._engine.generate(requests))
            scores = self._engine.score([(t.prompt_ids, t.response_ids) for t in trajectories], top_k)
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
            trajectory_ids=tuple(t.trajectory_id for t in trajectories),
            policy_versions=tuple(t.policy_version for t in trajectories),
            num_tokens=tuple(t.num_response_tokens for t in trajectories),
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
