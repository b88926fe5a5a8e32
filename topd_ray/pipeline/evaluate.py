"""pass@1 of a model on the held-out prompts."""

import json
from collections.abc import Iterable

from tqdm import tqdm

from topd_ray.actors.parts import threads
from topd_ray.config.schema import TopdConfig
from topd_ray.data.tokenizer import load_tokenizer
from topd_ray.engines.rollout import RolloutEngine
from topd_ray.errors import ConfigError
from topd_ray.evaluation.answers import graded_answers, merge_completions
from topd_ray.evaluation.pass_at_1 import PassAt1, pass_at_1
from topd_ray.pipeline.plan import Say, load_heldout
from topd_ray.types import Completions


def collect(parts: Iterable[Completions], num_prompts: int) -> Completions:
    """All parts of an evaluation, with progress on a terminal."""
    collected = []
    with tqdm(total=num_prompts, desc="answering", unit="prompt", disable=None, leave=False) as progress:
        for part in parts:
            collected.append(part)
            progress.update(len(part.correct))
    return merge_completions(collected)


def evaluate_model(config: TopdConfig, say: Say) -> PassAt1:
    """`topd eval`: print pass@1 of the config's student, with its 95 % interval; the last line is one JSON object.

    Runs in this process. Raises ConfigError where there are no held-out prompts.
    """
    if config.data.heldout is None:
        raise ConfigError("data.heldout: found none, right would be prompts to evaluate on")
    tokenizer = load_tokenizer(config.student)
    prompts = load_heldout(config, tokenizer, say)
    max_new_tokens = config.evaluation.max_new_tokens or config.rollout.max_new_tokens
    say(f"loading {config.student.model}")
    with RolloutEngine(
        config.student,
        config.rollout,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        threads=threads(config, "rollout"),
        seed=config.run.seed,
    ) as engine:
        say(f"answering {len(prompts)} prompts x {config.evaluation.num_runs}")
        parts = graded_answers(
            engine,
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            prompts,
            config.evaluation,
            max_new_tokens=max_new_tokens,
            seed=config.run.seed,
        )
        completions = collect(parts, len(prompts))
    accuracy = pass_at_1(completions.correct, seed=config.run.seed)
    say(f"pass@1 {accuracy.mean:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}], {completions.num_cut} answers cut")
    result = {
        "model": config.student.model,
        "pass_at_1": accuracy.mean,
        "low": accuracy.low,
        "high": accuracy.high,
        "num_prompts": accuracy.num_prompts,
        "num_runs": accuracy.num_runs,
    }
    print(json.dumps(result))
    return accuracy
