"""Scores from a plain transformers forward pass, to hold an engine's scores against.

Axes: L tokens of prompt and response, T response tokens, K top tokens, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from topd_ray.config.schema import ModelConfig
from topd_ray.types import Int32, TeacherScores


@torch.no_grad()
def largest_difference(
    model: ModelConfig,
    sequences: Sequence[tuple[Sequence[int] | Int32, Sequence[int] | Int32]],
    scores: Sequence[TeacherScores],
    temperature: float,
    vocabulary_size: int,
) -> float:
    """Largest |log-prob in `scores` - log_softmax(logits / temperature)| of (prompt ids, response ids), in nats.

    NaN if one of the log-probs is NaN.
    """
    network = AutoModelForCausalLM.from_pretrained(
        model.model,
        revision=model.revision,
        dtype=getattr(torch, model.dtype),
        use_safetensors=True,
        trust_remote_code=model.trust_remote_code,
    ).eval()
    differences = [0.0]
    for (prompt_ids, response_ids), score in zip(sequences, scores, strict=True):
        ids_L = torch.tensor([*map(int, prompt_ids), *map(int, response_ids)])
        num_response = len(response_ids)
        logits_TV = network(ids_L[None], logits_to_keep=num_response + 1).logits[0, :-1, :vocabulary_size]
        logprobs_TV = torch.log_softmax(logits_TV.float() / temperature, -1)
        sampled_T = logprobs_TV.gather(1, ids_L[-num_response:, None])[:, 0].numpy()
        topk_TK = logprobs_TV.gather(1, torch.from_numpy(score.topk_ids).long()).numpy()
        differences.append(float(np.abs(sampled_T - score.sampled_logprobs).max()))
        differences.append(float(np.abs(topk_TK - score.topk_logprobs).max()))
    return float(np.max(differences))
