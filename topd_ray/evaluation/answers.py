"""Answers of a model to prompts, graded where they are generated, so that only right or wrong travels."""

from collections.abc import Callable, Sequence
from typing import Protocol

from topd_ray.config.schema import EvaluationConfig
from topd_ray.evaluation.grading import grader
from topd_ray.types import Completions, FinishReason, Prompt


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
    ) -> list[list[tuple[list[int], FinishReason]]]: ...


def graded_answers(
    engine: CompletionEngine,
    decode: Callable[[Sequence[int]], str],
    prompts: Sequence[Prompt],
    evaluation: EvaluationConfig,
    *,
    max_new_tokens: int,
    seed: int,
) -> Completions:
    """Generate `evaluation.num_runs` answers per prompt and grade each against `prompt.answer`."""
    grade = grader(evaluation.grader)
    answers = engine.complete(
        prompts,
        num_samples=evaluation.num_runs,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    flat = [(token_ids, reason) for samples in answers for token_ids, reason in samples]
    return Completions(
        correct={
            prompt.prompt_id: tuple(grade(decode(token_ids), prompt.answer or "") for token_ids, _ in samples)
            for prompt, samples in zip(prompts, answers, strict=True)
        },
        num_tokens=sum(len(token_ids) for token_ids, _ in flat),
        num_cut=sum(reason == "length" for _, reason in flat),
    )
