"""The teacher's engine: scores trajectories, continues prefixes of them, and answers evaluation prompts.

Axes: T response tokens of one trajectory, K top teacher tokens, V vocabulary, D embedding width.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Literal, Self

from topd_ray.config.schema import TeacherConfig
from topd_ray.engines.checkpoint import checkpoint_bytes, checkpoint_folder, read_embedding
from topd_ray.engines.plain_forward import largest_difference
from topd_ray.engines.vllm_engine import Completion, Draw, TokenIds, VllmEngine
from topd_ray.errors import TeacherError
from topd_ray.types import Float32, Int32, Prompt, TeacherScores

MAX_VERIFIED_BYTES = 4 * 1000**3
"""Larger checkpoints are not loaded a second time just to be compared."""
VERIFIED_TOP_K = 8
MAX_VERIFIED_TOKENS = 512
"""Response tokens of each sequence that are compared."""

_log = logging.getLogger(__name__)


class TeacherEngine:
    """One vLLM engine that serves the teacher at the rollout's temperature.

    Not thread-safe. Raises ConfigError if vLLM cannot run the model. `max_model_len` bounds prompt, response and
    `window` more tokens.
    """

    def __init__(
        self,
        teacher: TeacherConfig,
        *,
        temperature: float,
        max_model_len: int,
        window: int,
        threads: int,
        seed: int,
    ) -> None:
        self._teacher = teacher
        self._temperature = temperature
        self._engine = VllmEngine(
            teacher,
            teacher,
            temperature=temperature,
            max_model_len=max_model_len,
            threads=threads,
            seed=seed,
            error=TeacherError,
        )

    def score(
        self, sequences: Sequence[tuple[TokenIds, TokenIds]], top_k: int | str | None = None
    ) -> list[TeacherScores]:
        """Score the response tokens of (prompt ids, response ids), in order (see VllmEngine.score).

        Log-probs are log_softmax(logits / temperature) over the tokenizer's tokens. `top_k` is the config's by default.
        """
        return self._engine.score(sequences, self._teacher.top_k if top_k is None else top_k)

    def continue_prefixes(
        self,
        prefixes: Sequence[TokenIds],
        num_tokens: int,
        *,
        decoding: Literal["greedy", "sample"] = "greedy",
        seeds: Sequence[int] | None = None,
    ) -> list[Int32]:
        """At most `num_tokens` tokens after each prefix, in order; an end-of-sequence token ends one and is included.

        `sample` draws at the temperature with one seed per prefix. Prefixes that share a beginning with each other, or
        with what was scored before, share its cached keys and values.
        """
        if decoding == "sample" and (seeds is None or len(seeds) != len(prefixes)):
            raise TeacherError(f"sampling {len(prefixes)} continuations needs a seed for each, got {seeds}")
        temperature = 0.0 if decoding == "greedy" else self._temperature
        draws = [
            Draw(max_tokens=num_tokens, temperature=temperature, seed=seed)
            for seed in (seeds if seeds is not None else [None] * len(prefixes))
        ]
        return self._engine.continue_prefixes(prefixes, draws)

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
        return self._engine.complete(
            prompts,
            num_samples=num_samples,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )

    def forget_prefixes(self) -> None:
        """Compute every prefix anew from here on, as an engine that has just been built does."""
        self._engine.reset_prefix_cache()

    def embedding(self) -> Float32:
        """The input embedding of the tokenizer's tokens, float32 [V, D], read from the checkpoint's files."""
        return read_embedding(self._teacher, self._engine.vocabulary.size)

    def verify(self, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> float | None:
        """Largest difference (nats) between the engine's scores and a plain transformers forward pass.

        Compares the sampled and the most likely tokens of the first MAX_VERIFIED_TOKENS response tokens. None, and a
        warning, for checkpoints above MAX_VERIFIED_BYTES.
        """
        num_bytes = checkpoint_bytes(checkpoint_folder(self._teacher))
        if num_bytes > MAX_VERIFIED_BYTES:
            _log.warning(
                "the teacher's scores are not verified: loading its %.1f GB a second time would take too long",
                num_bytes / 1e9,
            )
            return None
        shortened = [(prompt_ids, response_ids[:MAX_VERIFIED_TOKENS]) for prompt_ids, response_ids in sequences]
        scores = self.score(shortened, VERIFIED_TOP_K)
        return largest_difference(self._teacher, shortened, scores, self._temperature, self._engine.vocabulary.size)

    def shutdown(self) -> None:
        """Free the engine; a second call does nothing."""
        self._engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
