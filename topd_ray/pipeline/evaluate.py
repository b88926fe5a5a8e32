"""`topd eval`: grade one model on the held-out prompts, in this process."""

import json
from collections.abc import Callable

from topd_ray.actors.parts import threads
from topd_ray.config.schema import TopdConfig
from topd_ray.data.tokenizer import load_tokenizer
from topd_ray.engines.rollout import RolloutEngine
from topd_ray.errors import ConfigError
from topd_ray.evaluation.answers import graded_answers
from topd_ray.evaluation.pass_at_1 import PassAt1, pass_at_1
from topd_ray.pipeline.plan import load_heldout


def evaluate_model(config: TopdConfig, model: str | None, say: Callable[[str], None]) -> PassAt1:
    """Print pass@1 of `model` (default: the config's student) with its 95 % interval, last as one JSON object."""
    if config.data.heldout is None:
        raise ConfigError("data.heldout is unset: there is nothing to evaluate on")
    graded = config.student if model is None else config.student.model_copy(update={"model": model, "revision": None})
    tokenizer = load_tokenizer(graded)
    prompts = load_heldout(config, tokenizer, say)
    max_new_tokens = config.evaluation.max_new_tokens or config.rollout.max_new_tokens
    say(f"loading {graded.model}")
    with RolloutEngine(
        graded,
        config.rollout,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        threads=threads(config, "rollout"),
        seed=config.run.seed,
    ) as engine:
        say(f"answering {len(prompts)} prompts x {config.evaluation.num_runs}")
        completions = graded_answers(
            engine,
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            prompts,
            config.evaluation,
            max_new_tokens=max_new_tokens,
            seed=config.run.seed,
        )
    accuracy = pass_at_1(completions.correct, seed=config.run.seed)
    say(f"pass@1 {accuracy.mean:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}], {completions.num_cut} answers cut")
    print(
        json.dumps(
            {
                "model": graded.model,
                "pass_at_1": accuracy.mean,
                "low": accuracy.low,
                "high": accuracy.high,
                "num_prompts": accuracy.num_prompts,
                "num_runs": accuracy.num_runs,
            }
        )
    )
    return accuracy
