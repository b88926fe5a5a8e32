"""Plain Hugging Face generation in large batches, to grade a demo checkpoint without vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from topd_ray.demo.arithmetic import Problem, grade
from topd_ray.demo.tokenizer import render_prompt

MAX_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """Answers of one model to a list of problems, one sample each."""

    accuracy: float
    """share of right answers, in [0, 1]"""
    mean_length: float
    """tokens a response, the end-of-sequence token included"""
    responses: tuple[str, ...]


@torch.no_grad()
def respond(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float = 0.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[list[int]]:
    """One response's token ids for each prompt's, the end-of-sequence token included if it was written.

    Temperature 0 is greedy; sampling draws from torch's global generator.
    """
    width = max(len(prompt) for prompt in prompts)
    padded = [[tokenizer.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    model.eval()
    sequences = model.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(sampling or {"do_sample": False}),
    )
    return [_up_to_end(row, tokenizer.eos_token_id) for row in sequences[:, width:].tolist()]


def grade_model(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    temperature: float = 0.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Graded:
    """pass@1 of one sample a problem; a response cut at `max_new_tokens` is graded as it stands."""
    prompts = [render_prompt(tokenizer, problem.expression) for problem in problems]
    token_ids = respond(model, tokenizer, prompts, temperature=temperature, max_new_tokens=max_new_tokens)
    responses = tuple(str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in token_ids)
    right = [grade(response, problem.answer) for response, problem in zip(responses, problems, strict=True)]
    return Graded(
        accuracy=sum(right) / len(right),
        mean_length=sum(map(len, token_ids)) / len(token_ids),
        responses=responses,
    )


def _up_to_end(token_ids: list[int], end: int) -> list[int]:
    return token_ids[: token_ids.index(end) + 1] if end in token_ids else token_ids
