"""Answers of a model to prompts, graded where they are generated, so that only right or wrong travels."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from topd_ray.config.schema import EvaluationConfig
from topd_ray.evaluation.grading import grader
from topd_ray.types import Completions, FinishReason, Prompt

FLUSH_SECONDS = 0.5
"""How often graded answers are reported."""


class CompletionEngine(Protocol):
    """What the rollout and the teacher engine share."""

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        num_samples: int,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        seed: int,
    ) -> Iterator[tuple[Prompt, list[tuple[list[int], FinishReason]]]]: ...


def graded_answers(
    engine: CompletionEngine,
    decode: Callable[[Sequence[int]], str],
    prompts: Sequence[Prompt],
    evaluation: EvaluationConfig,
    *,
    max_new_tokens: int,
    seed: int,
) -> Iterator[Completions]:
    """Generate `evaluation.num_runs` answers per prompt, graded against `prompt.answer`; yield them in parts."""
    grade = grader(evaluation.grader)
    parts: list[Completions] = []
    flushed_at = time.monotonic()
    answered = engine.complete(
        prompts,
        num_samples=evaluation.num_runs,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    for prompt, samples in answered:
        parts.append(
            Completions(
                correct={
                    prompt.prompt_id: tuple(grade(decode(token_ids), prompt.answer or "") for token_ids, _ in samples)
                },
                num_tokens=sum(len(token_ids) for token_ids, _ in samples),
                num_cut=sum(reason == "length" for _, reason in samples),
            )
        )
        if time.monotonic() - flushed_at >= FLUSH_SECONDS:
            yield merge_completions(parts)
            parts, flushed_at = [], time.monotonic()
    if parts:
        yield merge_completions(parts)


def merge_completions(parts: Iterable[Completions]) -> Completions:
    """All parts of an evaluation as one."""
    parts = list(parts)
    return Completions(
        correct={prompt_id: marks for part in parts for prompt_id, marks in part.correct.items()},
        num_tokens=sum(part.num_tokens for part in parts),
        num_cut=sum(part.num_cut for part in parts),
    )
