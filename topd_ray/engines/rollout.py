"""The student's engine: writes trajectories, answers evaluation prompts, and takes new weights.

Axes: T response tokens of one trajectory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch

from topd_ray.config.schema import RolloutConfig, StudentConfig
from topd_ray.engines.checkpoint import checkpoint_folder, head_is_tied, tensor_shapes
from topd_ray.engines.vllm_engine import Completion, Draw, Finished, TokenIds, VllmEngine
from topd_ray.errors import RolloutError, WeightSyncError
from topd_ray.grouping import runs_within
from topd_ray.types import Prompt, RolloutRequest, TeacherScores, Trajectory
from topd_ray.weights.bundle import Delivery, Named
from topd_ray.weights.checksum import WeightReceipt
from topd_ray.weights.naming import ExpectedTensors

MAX_RPC_BYTES = 512 * 1024**2
"""Weights handed to vLLM's workers in one call; they may be other processes."""


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
        self._serves_whole_policy = True

    @property
    def policy_version(self) -> int:
        """Version of the weights in the engine; 0 is the checkpoint it was built from."""
        return self._policy_version

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
        draws = (
            (
                request,
                request.prompt.token_ids,
                Draw(
                    max_tokens=self._rollout.max_new_tokens,
                    temperature=self._rollout.temperature,
                    top_p=self._rollout.top_p,
                    seed=request.seed,
                    with_logprobs=True,
                ),
            )
            for request in requests
        )
        for finished in self._engine.generate_by_step(draws):
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

    def score(self, sequences: Sequence[tuple[TokenIds, TokenIds]], top_k: int | str) -> list[TeacherScores]:
        """Score (prompt ids, response ids) with the student's own weights (see VllmEngine.score)."""
        self._check_whole()
        return self._engine.score(sequences, top_k)

    def update_weights(self, version: int, tensors: Iterable[Named] | Delivery) -> WeightReceipt:
        """Serve `version` from now on: all tensors of the checkpoint under their Hugging Face names.

        The tensors are held together while they load. Raises WeightSyncError, with the engine as it was, if a name is
        missing, unknown or double, a shape is wrong, or requests are running.
        """
        self._check_idle()
        delivery = Delivery.of(tensors)
        named = self._expected.check(delivery.tensors)
        with self._updating(version):
            for part in runs_within(named, lambda one: one[1].nbytes, MAX_RPC_BYTES):
                self._engine.rpc("update_weights", {"weights": part})
        return WeightReceipt.of(version, delivery.fingerprint)

    def receive_weights(
        self, version: int, shapes: Mapping[str, tuple[int, ...]], ipc: Mapping[str, Any], expected: tuple[int, int]
    ) -> WeightReceipt:
        """`update_weights` for tensors that vLLM's IPC engine takes out of this GPU's memory itself.

        `shapes` are those of the tensors, by name; `expected` is (number of bytes, checksum). Both are known only once
        the tensors have been read: after other ones the engine refuses to generate (WeightSyncError).
        """
        self._check_idle()
        self._expected.check([(name, torch.empty(shape, device="meta")) for name, shape in shapes.items()])
        with self._updating(version):
            self._engine.rpc("update_weights", {"ipc": dict(ipc)})
            (received,) = self._engine.rpc("received_weights")
            if (received.num_bytes, received.checksum) != expected:
                raise WeightSyncError(f"version {version} of the weights was altered on its way: found {received}")
        return WeightReceipt.of(version, received)

    @contextmanager
    def _updating(self, version: int) -> Iterator[None]:
        """vLLM's update session. Left by an error, the engine refuses to generate until a whole update succeeds."""
        self._serves_whole_policy = False
        self._engine.rpc("start_weight_update")
        yield
        self._engine.rpc("finish_weight_update")
        if not self._engine.reset_prefix_cache():
            raise WeightSyncError("vLLM did not reset its prefix cache: the engine would mix two policies")
        self._policy_version = version
        self._serves_whole_policy = True

    def shutdown(self) -> None:
        """Free the engine; a second call does nothing."""
        self._engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _check_idle(self) -> None:
        if self._engine.is_busy:
            raise WeightSyncError("the engine is still generating: exhaust or close the iterator before new weights")

    def _check_whole(self) -> None:
        if not self._serves_whole_policy:
            raise WeightSyncError("a weight update broke off halfway: update the weights again, or restart the engine")

    def _trajectory(self, done: Finished[RolloutRequest]) -> Trajectory:
        request = done.key
        return Trajectory(
            trajectory_id=request.trajectory_id,
            prompt_id=request.prompt.prompt_id,
            sample_index=request.sample_index,
            epoch=request.epoch,
            policy_version=self._policy_version,
            finish_reason=done.reason,
            prompt_ids=np.asarray(request.prompt.token_ids, np.int32),
            response_ids=np.asarray(done.token_ids, np.int32),
            behaviour_logprobs=np.asarray(done.logprobs, np.float32),
        )
