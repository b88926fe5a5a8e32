"""Students whose attention is not plain: packed right, or refused, never silently wrong."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.integration.test_learner import TEMPERATURE, make_batch, make_engine, save_with_tokenizer
from tests.tiny import NUM_TOKENS, make_tiny_model, plain_logprobs
from topd_ray.engines.attention import EAGER
from topd_ray.errors import ConfigError
from topd_ray.types import Trajectory

SIZES: dict[str, Any] = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.5,
}


@pytest.fixture(scope="module", autouse=True)
def no_process_group_left() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("qwen"), seed=0)


@pytest.fixture
def trajectories() -> list[Trajectory]:
    return [one.trajectory for one in make_batch(5, top_k=1)]


def assert_plain(model: Any, trajectories: list[Trajectory], found: list[Any]) -> None:
    """The log-probs are those of the model's own code on each trajectory alone."""
    model.set_attn_implementation("eager")
    for one, logprobs in zip(trajectories, found, strict=True):
        right = plain_logprobs(model, one.prompt_ids, one.response_ids, TEMPERATURE)
        np.testing.assert_allclose(logprobs, right[np.arange(len(right)), one.response_ids], rtol=1e-4, atol=1e-5)


def test_the_rest_of_a_row_does_not_matter(qwen: Path, trajectories: list[Trajectory]) -> None:
    engine = make_engine(qwen, max_tokens_per_micro_batch=1000)
    before = engine.logprobs(trajectories)
    trajectories[1].response_ids[:] = (trajectories[1].response_ids + 1) % NUM_TOKENS
    after = engine.logprobs(trajectories)
    backwards = engine.logprobs(trajectories[::-1])[::-1]
    engine.shutdown()
    for index, (was, now) in enumerate(zip(before, after, strict=True)):
        assert np.array_equal(was, now) == (index != 1)
    for now, mirrored in zip(after, backwards, strict=True):
        np.testing.assert_allclose(mirrored, now, rtol=1e-5, atol=1e-5)


def test_a_sliding_window_slides_inside_of_each_trajectory(
    qwen: Path, tmp_path: Path, trajectories: list[Trajectory]
) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()
    save_with_tokenizer(model, qwen, tmp_path)
    engine = make_engine(tmp_path, max_tokens_per_micro_batch=1000)
    assert_plain(model, trajectories, engine.logprobs(trajectories))
    engine.shutdown()


@pytest.mark.parametrize("budget", [1000, "one_trajectory"])
def test_bounded_attention_runs_the_model_s_own_code_and_says_so(
    qwen: Path, tmp_path: Path, trajectories: list[Trajectory], caplog: pytest.LogCaptureFixture, budget: int | str
) -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_logit_softcapping=0.5, final_logit_softcapping=None)).eval()
    save_with_tokenizer(model, qwen, tmp_path)
    with caplog.at_level(logging.WARNING, "topd_ray"):
        engine = make_engine(tmp_path, max_tokens_per_micro_batch=budget)
    assert "Gemma2ForCausalLM needs a mask over the whole row" in caplog.text
    assert engine.attention == EAGER
    assert_plain(model, trajectories, engine.logprobs(trajectories))
    engine.shutdown()


def other_models() -> Iterator[Any]:
    """One that counts distances from the start of the row, and one with a state that runs through it."""
    yield BloomForCausalLM(
        BloomConfig(vocab_size=NUM_TOKENS, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.5)
    )
    yield Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    )


def test_students_that_cannot_keep_trajectories_apart_run_them_alone(
    qwen: Path, tmp_path: Path, trajectories: list[Trajectory]
) -> None:
    torch.manual_seed(0)
    for number, (model, why) in enumerate(
        zip(other_models(), ("does not compute the same", "layers of Qwen3Next.* linear_attention"), strict=True)
    ):
        folder = tmp_path / str(number)
        save_with_tokenizer(model.eval(), qwen, folder)
        with pytest.raises(ConfigError, match=f"{why}.*learner.max_tokens_per_micro_batch=one_trajectory"):
            make_engine(folder, max_tokens_per_micro_batch=1000)
        engine = make_engine(folder, max_tokens_per_micro_batch="one_trajectory")
        assert_plain(model, trajectories, engine.logprobs(trajectories))
        engine.shutdown()
