"""The student's engine: writes trajectories, answers evaluation prompts, and takes new weights.

Requests are written either by an iterator of their own (`generate`), or by continuous batching (`add`, `step`), where
new requests join those that run, and new weights may come in between.

Axes: T response tokens of one trajectory.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from topd_ray.config.schema import RolloutConfig, StudentConfig
from topd_ray.engines.checkpoint import checkpoint_folder, head_is_tied, tensor_shapes
from topd_ray.engines.seeds import stable_seed
from topd_ray.engines.vllm_engine import Completion, Draw, Finished, TokenIds, VllmEngine
from topd_ray.errors import RolloutError, WeightSyncError
from topd_ray.grouping import runs_within
from topd_ray.types import Int32, Prompt, RolloutRequest, TeacherScores, Trajectory
from topd_ray.weights.bundle import Delivery, IpcDelivery, Named, timed
from topd_ray.weights.checksum import Fingerprint, WeightReceipt
from topd_ray.weights.naming import ExpectedTensors

MAX_RPC_BYTES = 512 * 1024**2
"""Weights handed to vLLM's workers in one call; they may be other processes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Writing:
    """A request on its way."""

    request: RolloutRequest
    policy_version: int
    """of its first token"""
    token_ids: tuple[int, ...] = ()
    """written by policies that have been replaced since"""
    logprobs: tuple[float, ...] = ()
    """of `token_ids`, each under the policy that drew it (nats)"""

    def interrupted(self, done: Finished["Writing"], version: int) -> "Writing":
        """The rest of the request for policy `version`, after `done` of it was written by the policy before."""
        token_ids = (*self.token_ids, *done.token_ids)
        return Writing(
            request=self.request,
            policy_version=self.policy_version if token_ids else version,
            token_ids=token_ids,
            logprobs=(*self.logprobs, *done.logprobs),
        )


class RolloutEngine:
    """One vLLM engine that serves the student at `policy_version`.

    Not thread-safe, and weights change only between two calls. Raises ConfigError if vLLM cannot run the model.
    """

    def __init__(
        self,
        student: StudentConfig,
        rollout: RolloutConfig,
        *,
        max_prompt_tokens: int,
        max_new_tokens: int,
        threads: int,
        seed: int,
    ) -> None:
        self._rollout = rollout
        self._expected = ExpectedTensors(
            shapes=tensor_shapes(checkpoint_folder(student)), tied_head=head_is_tied(student)
        )
        self._engine = VllmEngine(
            student,
            rollout,
            temperature=rollout.temperature,
            max_model_len=max_prompt_tokens + max_new_tokens,
            threads=threads,
            seed=seed,
            error=RolloutError,
        )
        self._policy_version = 0
        self._is_whole = True

    @property
    def policy_version(self) -> int:
        """Version of the weights in the engine; 0 is the checkpoint it was built from."""
        return self._policy_version

    @property
    def is_whole(self) -> bool:
        """Whether the engine serves one policy, and not what a weight update that broke off left behind."""
        return self._is_whole

    @property
    def num_running(self) -> int:
        """Requests being written."""
        return self._engine.num_running

    def add(self, requests: Sequence[RolloutRequest]) -> None:
        """Write requests from the next `step` on, beside those being written; see `generate` for what is written.

        Raises RolloutError, with none of them added, for one that does not fit the engine.
        """
        self._check_whole()
        self._engine.add(self._start(request) for request in requests)

    def step(self) -> list[Trajectory]:
        """Write a token of every request that has its turn; the trajectories finished by that, mostly none.

        After a RolloutError, abandon what is left.
        """
        self._check_whole()
        return [self._trajectory(one) for one in self._engine.step()]

    def abandon(self) -> None:
        """Drop all requests being written."""
        self._engine.abort()

    def generate(self, requests: Sequence[RolloutRequest]) -> Iterator[Trajectory]:
        """Write one trajectory per request, yielding each as it finishes.

        Behaviour log-probs are of the distribution the tokens were drawn from: log_softmax(logits / temperature) over
        the tokenizer's tokens, renormalised over the nucleus where top_p < 1. A response has at least one token, maybe
        just the end-of-sequence token. Leaving the loop early drops the other requests.
        """
        for finished in self.generate_by_step(requests):
            yield from finished

    def generate_by_step(self, requests: Sequence[RolloutRequest]) -> Iterator[list[Trajectory]]:
        """`generate` with control after every step of the engine: the trajectories that finished in it, mostly none."""
        self._check_whole()
        for finished in self._engine.generate_by_step(self._start(one) for one in requests):
            yield [self._trajectory(one) for one in finished]

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        num_samples: int,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        seed: int,
    ) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Each prompt with `num_samples` answers, as (token ids, finish reason), as it gets them; 0 is greedy."""
        self._check_whole()
        return self._engine.complete(
            prompts,
            num_samples=num_samples,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )

    def continue_prefixes(self, prefixes: Sequence[TokenIds], num_tokens: int, *, seeds: Sequence[int]) -> list[Int32]:
        """At most `num_tokens` tokens after each prefix, drawn as those of a trajectory, with one seed per prefix."""
        self._check_whole()
        draws = [
            Draw(max_tokens=num_tokens, temperature=self._rollout.temperature, top_p=self._rollout.top_p, seed=seed)
            for seed in seeds
        ]
        return self._engine.continue_prefixes(prefixes, draws)

    def score(self, sequences: Sequence[tuple[TokenIds, TokenIds]], top_k: int | str) -> list[TeacherScores]:
        """Score (prompt ids, response ids) with the student's own weights (see VllmEngine.score)."""
        self._check_whole()
        return self._engine.score(sequences, top_k)

    def forget_prefixes(self) -> None:
        """Compute every prefix anew from here on, as an engine that has just been built does."""
        self._engine.reset_prefix_cache()

    def update_weights(
        self, version: int, weights: Iterable[Named] | Delivery | IpcDelivery, *, interrupt: bool = False
    ) -> WeightReceipt:
        """Serve `version` from now on: all tensors of the checkpoint under their Hugging Face names.

        With `interrupt`, requests being written by `add` and `step` go on under `version` from the tokens they have:
        their prefix is computed anew, the rest drawn with a seed that depends on the request's seed and the prefix's
        length, so that every behaviour log-prob is of the policy that drew its token. What has no token yet starts
        under `version`.

        The tensors are held together while they load. Raises WeightSyncError, with the engine and what it writes as
        they were, if a name is missing, unknown or double, a shape is wrong, an iterator is open, or requests are
        running and `interrupt` is not set. Any later error drops what runs, and the engine is never `is_whole` again:
        vLLM does not begin a new update in the middle of another. What an IpcDelivery holds is checked only while it is
        read.
        """
        self._check_whole()
        if self._engine.is_iterating:
            raise WeightSyncError("the engine is still generating: exhaust or close the iterator before new weights")
        if self.num_running and not interrupt:
            raise WeightSyncError(
                f"the engine is still generating {self.num_running} requests: finish, abandon or interrupt them"
            )
        delivery = weights if isinstance(weights, IpcDelivery) else Delivery.of(weights)
        named = self._expected.check(delivery.named())
        started = time.perf_counter()
        stopped = self._engine.abort()
        self._is_whole = False
        self._engine.rpc("start_weight_update")
        if isinstance(delivery, IpcDelivery):
            received = self._receive(version, delivery)
        else:
            received = delivery.fingerprint
            for part in runs_within(named, lambda one: one[1].nbytes, MAX_RPC_BYTES):
                self._engine.rpc("update_weights", {"weights": part})
        self._engine.rpc("finish_weight_update")
        if not self._engine.reset_prefix_cache():
            raise WeightSyncError("vLLM did not reset its prefix cache: the engine would mix two policies")
        self._policy_version = version
        self._is_whole = True
        self._engine.add(self._draw(done.key.interrupted(done, version)) for done in stopped)
        receipt = WeightReceipt.of(version, received)
        seconds = time.perf_counter() - started
        return replace(receipt, metrics=(*delivery.metrics, *timed("load", seconds)))

    def _receive(self, version: int, delivery: IpcDelivery) -> Fingerprint:
        """Let vLLM's IPC engine read the tensors out of this GPU's memory; what it read."""
        self._engine.rpc("update_weights", {"ipc": dict(delivery.fields)})
        (received,) = self._engine.rpc("received_weights")
        if (received.num_bytes, received.checksum) != delivery.expected:
            raise WeightSyncError(f"version {version} of the weights was altered on its way: found {received}")
        found: Fingerprint = received
        return found

    def shutdown(self) -> None:
        """Free the engine; a second call does nothing."""
        self._engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _check_whole(self) -> None:
        if not self._is_whole:
            raise WeightSyncError(
                "a weight update broke off halfway: this engine serves nothing any more, make it anew"
            )

    def _start(self, request: RolloutRequest) -> tuple[Writing, TokenIds, Draw]:
        return self._draw(Writing(request=request, policy_version=self._policy_version))

    def _draw(self, writing: Writing) -> tuple[Writing, TokenIds, Draw]:
        request, num_written = writing.request, len(writing.token_ids)
        draw = Draw(
            max_tokens=self._rollout.max_new_tokens - num_written,
            temperature=self._rollout.temperature,
            top_p=self._rollout.top_p,
            seed=stable_seed(request.seed, num_written) if num_written else request.seed,
            with_logprobs=True,
        )
        return writing, (*request.prompt.token_ids, *writing.token_ids), draw

    @staticmethod
    def _trajectory(done: Finished[Writing]) -> Trajectory:
        writing, request = done.key, done.key.request
        return Trajectory(
            trajectory_id=request.trajectory_id,
            prompt_id=request.prompt.prompt_id,
            sample_index=request.sample_index,
            epoch=request.epoch,
            policy_version=writing.policy_version,
            finish_reason=done.reason,
            prompt_ids=np.asarray(request.prompt.token_ids, np.int32),
            response_ids=np.asarray([*writing.token_ids, *done.token_ids], np.int32),
            behaviour_logprobs=np.asarray([*writing.logprobs, *done.logprobs], np.float32),
        )
