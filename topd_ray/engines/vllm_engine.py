"""A vLLM engine fed with token ids: requests enter between two steps, and leave with the step they finish in.

Its logits are those at the rollout's temperature over real tokens only (see `vllm_worker`), so that sampling, behaviour
log-probs and scores all speak of one distribution. vLLM is imported when an engine is built, not before: it takes
seconds, and its environment must be set first.

Axes: L tokens of prompt and response, T response tokens, K top tokens.
"""

import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from topd_ray.config.schema import ModelConfig, RolloutConfig, TeacherConfig
from topd_ray.data.tokenizer import read_vocabulary
from topd_ray.engines.process import SLOTS, finish_on_gpu, llvmlite_out_of_sight, prepare_process
from topd_ray.engines.seeds import stable_seed
from topd_ray.errors import ConfigError, TopdError
from topd_ray.types import FinishReason, Int32, Prompt, TeacherScores

CPU_BLOCK_SIZE = 32
"""Smallest block the CPU attention kernels run well with (tokens); prefixes are cached in whole blocks."""
CPU_KV_CACHE_BYTES = 1024**3
SMALL_MEMORY_SHARE = 0.001
"""vLLM refuses to start where less than the share is free, also where the cache has a size of its own."""
WORKER_EXTENSION = "topd_ray.engines.vllm_worker.WorkerExtension"

Key = TypeVar("Key", bound=Hashable)
TokenIds = Sequence[int] | Int32
Completion = tuple[list[int], FinishReason]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How one request is continued. `temperature` is the absolute one, 0 is greedy."""

    max_tokens: int
    temperature: float
    top_p: float = 1.0
    seed: int | None = None
    with_logprobs: bool = False


@dataclass(slots=True, kw_only=True)
class Finished(Generic[Key]):
    """A request as it is when it is done, or aborted."""

    key: Key
    token_ids: list[int] = field(default_factory=list)
    """[T], the end-of-sequence token included"""
    logprobs: list[float] = field(default_factory=list)
    """[T] of the sampled tokens (nats), if asked for"""
    reason: FinishReason = "length"
    prompt_logprobs: Any = None
    """vLLM's tensors, [L - 1, 1 + K] with the actual token in column 0, if asked for"""


class VllmEngine:
    """One vLLM engine and its model's vocabulary.

    Raises ConfigError where vLLM cannot run the model as configured. `error` is raised for requests it cannot serve.
    """

    def __init__(
        self,
        model: ModelConfig,
        section: RolloutConfig | TeacherConfig,
        *,
        temperature: float,
        max_model_len: int,
        threads: int,
        seed: int,
        error: type[TopdError],
    ) -> None:
        self.vocabulary = read_vocabulary(model)
        self._temperature = temperature
        self._max_model_len = max_model_len
        self._error = error
        self._num_requests = 0
        self._running: dict[str, Finished[Any]] = {}
        self._is_iterating = False
        prepare_process(threads)
        SLOTS.enter()
        try:
            self._llm = _build(model, section, max_model_len + 1, seed)
            self._shape_logits(model)
            self.rpc("keep_seeds_while_prefilling")
            self.rpc("count_ranks_uncompiled")
        except BaseException:
            SLOTS.leave()
            raise

    @property
    def num_running(self) -> int:
        """Requests that entered and neither finished nor were aborted."""
        return len(self._running)

    @property
    def is_iterating(self) -> bool:
        """Whether an iterator of `generate` or `complete` is neither exhausted nor closed."""
        return self._is_iterating

    def add(self, requests: Iterable[tuple[Key, TokenIds, Draw]]) -> None:
        """Let requests run from the next `step` on, beside those that run already; after an error, none of them do."""
        self._refuse_beside_iterator()
        self._enter((key, token_ids, self._sampling(draw)) for key, token_ids, draw in requests)

    def step(self) -> list[Finished[Any]]:
        """Run the model once; the requests that finished, mostly none. After an error, abort what is left."""
        self._refuse_beside_iterator()
        return self._step() if self._running else []

    def abort(self) -> list[Finished[Any]]:
        """Stop all requests: each with its tokens so far, in the order they entered. An open iterator ends.

        A GPU has then done all that it was given, so that another thread, whose work it would not put in line with this
        one's, may use the engine.
        """
        stopped = list(self._running.values())
        names = list(self._running)
        self._running.clear()
        if names:
            self._llm.engine_core.abort_requests(names)
        finish_on_gpu()
        return stopped

    def generate(self, requests: Iterable[tuple[Key, TokenIds, Draw]]) -> Iterator[Finished[Key]]:
        """Yield every request as it finishes. Leaving the loop early drops the others."""
        for finished in self.generate_by_step(requests):
            yield from finished

    def generate_by_step(self, requests: Iterable[tuple[Key, TokenIds, Draw]]) -> Iterator[list[Finished[Key]]]:
        """Yield, after every step of the engine, the requests that finished in it, mostly none."""
        return self._run((key, token_ids, self._sampling(draw)) for key, token_ids, draw in requests)

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
        """Each prompt with `num_samples` answers, as (token ids, finish reason), as soon as it has all of them."""
        answers: list[dict[int, Completion]] = [{} for _ in prompts]
        requests = (
            (
                (row, sample),
                prompt.token_ids,
                Draw(
                    max_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    seed=stable_seed(seed, prompt.prompt_id, sample),
                ),
            )
            for row, prompt in enumerate(prompts)
            for sample in range(num_samples)
        )
        for done in self.generate(requests):
            row, sample = done.key
            answers[row][sample] = (done.token_ids, done.reason)
            if len(answers[row]) == num_samples:
                yield prompts[row], [answers[row][index] for index in range(num_samples)]

    def continue_prefixes(self, prefixes: Sequence[TokenIds], draws: Sequence[Draw]) -> list[Int32]:
        """The tokens after each prefix, in order; an end-of-sequence token ends one and is included."""
        requests = ((index, *pair) for index, pair in enumerate(zip(prefixes, draws, strict=True)))
        continued = {done.key: np.asarray(done.token_ids, np.int32) for done in self.generate(requests)}
        return [continued[index] for index in range(len(prefixes))]

    def score(self, sequences: Sequence[tuple[TokenIds, TokenIds]], top_k: int | str) -> list[TeacherScores]:
        """Top-k and sampled log-probs of every response token of (prompt ids, response ids), in float32 nats.

        `top_k="full"`, and any number above it, is the whole vocabulary.
        """
        num_kept = self.vocabulary.size if top_k == "full" else min(int(top_k), self.vocabulary.size)
        requests = (
            (index, [*prompt_ids, *response_ids], self._scoring(num_kept))
            for index, (prompt_ids, response_ids) in enumerate(sequences)
        )
        scores: dict[int, TeacherScores] = {}
        for finished in self._run(requests):
            for done in finished:
                scores[done.key] = _scores(done.prompt_logprobs, len(sequences[done.key][1]))
        return [scores[index] for index in range(len(sequences))]

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker."""
        return list(self._llm.collective_rpc(method, args=args))

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; false where running requests still hold some."""
        return bool(self._llm.reset_prefix_cache())

    def shutdown(self) -> None:
        """Free the engine; with the last one of the process go vLLM's process groups. A second call does nothing."""
        if self._llm is None:
            return
        _shutdown(self._llm)
        self._llm = None
        SLOTS.leave()

    def _shape_logits(self, model: ModelConfig) -> None:
        found = self.rpc("shape_logits", self._temperature, self.vocabulary.size)
        if any(number != 1 for number in found):
            raise ConfigError(
                f"vLLM's {model.model} has {found[0]} logits processors instead of one: its distribution at "
                f"rollout.temperature={self._temperature} cannot be computed; this architecture is not supported"
            )

    def _run(self, requests: Iterable[tuple[Key, TokenIds, Any]]) -> Iterator[list[Finished[Key]]]:
        """Step until all requests are done. Nothing else may run meanwhile."""
        self._refuse_beside_iterator()
        if self._running:
            raise self._error(f"the engine is still generating: {len(self._running)} added requests have to end first")
        self._is_iterating = True
        try:
            self._enter(requests)
            while self._running:
                yield self._step()
        finally:
            self._is_iterating = False
            self.abort()

    def _refuse_beside_iterator(self) -> None:
        if self._is_iterating:
            raise self._error("the engine is still generating: exhaust or close that iterator first")

    def _enter(self, requests: Iterable[tuple[Key, TokenIds, Any]]) -> None:
        """Hand requests to the engine core, once all of them are known to fit."""
        ready = [(key, self._core_request(token_ids, params)) for key, token_ids, params in requests]
        for key, request in ready:
            self._llm.engine_core.add_request(request)
            self._running[str(request.request_id)] = Finished(key=key)

    def _step(self) -> list[Finished[Any]]:
        finished = []
        for output in self._llm.engine_core.get_output().outputs:
            one = self._running.get(output.request_id)
            if one is None:
                continue
            one.token_ids.extend(output.new_token_ids)
            if output.new_logprobs is not None:
                one.logprobs.extend(output.new_logprobs.logprobs[:, 0].tolist())
            if output.new_prompt_logprobs_tensors is not None:
                one.prompt_logprobs = output.new_prompt_logprobs_tensors
            if output.finish_reason is not None:
                del self._running[output.request_id]
                one.reason = self._reason(output)
                finished.append(one)
        return finished

    def _core_request(self, token_ids: TokenIds, params: Any) -> Any:
        """A request as the engine core takes it."""
        ids = [int(token_id) for token_id in token_ids]
        length = len(ids) + (0 if params.prompt_logprobs is not None else params.max_tokens)
        if not ids or length > self._max_model_len:
            raise self._error(
                f"a request of {len(ids)} tokens, {length} with its answer, for an engine built for 1 to "
                f"{self._max_model_len} tokens: raise data.max_prompt_tokens or shorten it"
            )
        name = str(self._num_requests)
        self._num_requests += 1
        request = self._llm.input_processor.process_inputs(
            name, {"type": "token", "prompt_token_ids": ids}, params, supported_tasks=("generate",)
        )
        self._llm.input_processor.assign_request_id(request)
        return request

    def _sampling(self, draw: Draw) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=draw.max_tokens,
            temperature=draw.temperature / self._temperature,
            top_p=draw.top_p,
            seed=draw.seed,
            logprobs=0 if draw.with_logprobs else None,
            stop_token_ids=list(self.vocabulary.eos_ids),
            detokenize=False,
            skip_clone=True,
        )

    @staticmethod
    def _scoring(num_kept: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=num_kept, detokenize=False, skip_clone=True
        )

    def _reason(self, output: Any) -> FinishReason:
        reason = str(output.finish_reason)
        if reason == "stop":
            return "stop"
        if reason == "length":
            return "length"
        raise self._error(f"vLLM ended request {output.request_id} with {reason!r} instead of an answer")


def _build(model: ModelConfig, section: RolloutConfig | TeacherConfig, max_model_len: int, seed: int) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    from topd_ray.engines.vllm_worker import WEIGHT_BACKEND

    on_cpu = current_platform.is_cpu()
    if not on_cpu and not torch.accelerator.is_available():
        raise ConfigError(
            f"vLLM cannot run {model.model}: it is built for GPUs, and this worker has none; right would be "
            "resources.gpus_per_rollout and gpus_per_teacher above 0, or vLLM's CPU build (make setup DEVICE=cpu)"
        )
    kv_cache_bytes = section.kv_cache_bytes or (CPU_KV_CACHE_BYTES if on_cpu else None)
    if eager_on_cpu := on_cpu and section.enforce_eager:
        from topd_ray.engines.cpu_norms import OP_PRIORITY
    arguments = EngineArgs(
        model=model.model,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        load_format="safetensors",
        dtype=model.dtype,
        skip_tokenizer_init=True,
        generation_config="vllm",
        seed=seed,
        max_model_len=max_model_len,
        max_num_seqs=section.max_num_seqs,
        max_num_batched_tokens=section.max_batched_tokens,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=CPU_BLOCK_SIZE if on_cpu else None,
        kv_cache_memory_bytes=kv_cache_bytes,
        gpu_memory_utilization=SMALL_MEMORY_SHARE if kv_cache_bytes else section.gpu_memory_utilization,
        tensor_parallel_size=section.tensor_parallel_size,
        distributed_executor_backend="uni" if section.tensor_parallel_size == 1 else "mp",
        enforce_eager=section.enforce_eager,
        ir_op_priority=OP_PRIORITY if eager_on_cpu else {},
        max_logprobs=-1,
        logprobs_mode="processed_logprobs",
        worker_extension_cls=WORKER_EXTENSION,
        weight_transfer_config={"backend": WEIGHT_BACKEND},
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    try:
        with warnings.catch_warnings(), llvmlite_out_of_sight():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM looks through torch modules with deprecated names
            return LLMEngine.from_engine_args(arguments)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"vLLM cannot run {model.model} as configured: {error}") from error


def _shutdown(llm: Any) -> None:
    """Stop one engine. In this process vLLM's own shutdown would take the groups of the other engines with it."""
    client = llm.engine_core
    core = getattr(client, "engine_core", None)
    if core is None:
        client.shutdown()
        return
    client._finalizer.detach()
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()


def _scores(prompt_logprobs: Any, num_response: int) -> TeacherScores:
    """Cut vLLM's tensors, [L - 1, 1 + K] with the actual token in column 0, to the response."""
    ids = prompt_logprobs.logprob_token_ids[-num_response:].numpy()
    logprobs = prompt_logprobs.logprobs[-num_response:].numpy()
    return TeacherScores(
        topk_ids=np.ascontiguousarray(ids[:, 1:], np.int32),
        topk_logprobs=np.ascontiguousarray(logprobs[:, 1:], np.float32),
        sampled_logprobs=np.ascontiguousarray(logprobs[:, 0], np.float32),
    )
