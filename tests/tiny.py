"""Tiny random models with a tokenizer, in the Hugging Face layout, and what a plain forward pass says about them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config, Qwen3MoeConfig

from topd_ray.demo.tokenizer import build_tokenizer
from topd_ray.types import Prompt, RolloutRequest, Trajectory

NUM_TOKENS = 64
EOS_ID = 2
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1, "norm_topk_prob": True}


def make_tiny_model(
    folder: Path,
    *,
    seed: int,
    num_rows: int = 96,
    tied: bool = False,
    spread: float = 0.4,
    dtype: str = "float32",
    num_experts: int = 0,
) -> Path:
    """Write a random two-layer Qwen3 whose embedding has `num_rows` rows for the demo tokenizer's 64 tokens.

    `spread` is the standard deviation of the weights: large enough that the distributions are far from uniform. With
    experts it is a Qwen3-MoE, of which two see a token.
    """
    tokenizer = build_tokenizer()
    assert (len(tokenizer), tokenizer.eos_token_id) == (NUM_TOKENS, EOS_ID)
    kind, sizes = (Qwen3Config, {}) if num_experts == 0 else (Qwen3MoeConfig, EXPERTS | {"num_experts": num_experts})
    config = kind(
        **sizes,
        vocab_size=num_rows,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(eos_token_id=[EOS_ID], pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_tiny_model(folder: Path, dtype: str = "float32") -> Any:
    """The checkpoint as a plain transformers model."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def make_requests(count: int, *, prompt_length: int = 3) -> list[RolloutRequest]:
    """Requests with prompts that share all but their last token, and a seed each."""
    return [
        RolloutRequest(
            prompt=Prompt(prompt_id=f"p{index}", token_ids=(*range(10, 9 + prompt_length), 20 + index)),
            sample_index=0,
            epoch=0,
            seed=100 + index,
        )
        for index in range(count)
    ]


@torch.no_grad()
def plain_logprobs(
    model: Any, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float
) -> NDArray[np.float32]:
    """log_softmax(logits / temperature) over the tokenizer's tokens at every response position, [T, 64]."""
    ids = torch.tensor([[*map(int, prompt_ids), *map(int, response_ids)]])
    logits = model(ids).logits[0, len(prompt_ids) - 1 : -1, :NUM_TOKENS].float()
    return torch.log_softmax(logits / temperature, -1).numpy()


@torch.no_grad()
def plain_greedy(model: Any, prefix: Sequence[int], num_tokens: int) -> list[int]:
    """The most likely continuation, up to and including an end-of-sequence token."""
    ids = [*map(int, prefix)]
    while len(ids) < len(prefix) + num_tokens:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1, :NUM_TOKENS].argmax()))
        if ids[-1] == EOS_ID:
            break
    return ids[len(prefix) :]


def at(logprobs_TV: NDArray[np.float32], ids_TK: NDArray[np.int32]) -> NDArray[np.float32]:
    """Columns `ids_TK` ([T] or [T, K]) of every row."""
    ids = np.asarray(ids_TK, np.int64).reshape(len(ids_TK), -1)
    return np.take_along_axis(logprobs_TV, ids, 1).reshape(np.shape(ids_TK))


def largest_error(trajectories: Iterable[Trajectory], model: Any, temperature: float) -> float:
    """Largest difference of a behaviour log-prob from a plain forward pass (nats)."""
    return max(
        float(
            np.abs(
                at(plain_logprobs(model, t.prompt_ids, t.response_ids, temperature), t.response_ids)
                - t.behaviour_logprobs
            ).max()
        )
        for t in trajectories
    )
