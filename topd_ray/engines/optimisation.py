"""How the student's weights move: AdamW, the learning rate, and DeepSpeed's configuration. Imports no DeepSpeed."""

import math
from typing import Any

import torch
from torch import nn

from topd_ray.config.schema import LearnerConfig

LARGEST_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces or gathers at once. It allocates as many: small models get smaller buckets."""


def learning_rate(learner: LearnerConfig, update: int, total_updates: int) -> float:
    """Rate of update 0, 1, ...: a linear warm-up to the peak, then constant, or falling towards 0 at `total_updates`.

    The first update already moves; a pure function of the update, so nothing of it needs saving.
    """
    num_warmup = round(learner.warmup_fraction * total_updates)
    if update < num_warmup:
        return learner.learning_rate * (update + 1) / num_warmup
    progress = min((update - num_warmup) / max(total_updates - num_warmup, 1), 1.0)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[learner.schedule]
    return learner.learning_rate * factor


def parameter_groups(module: nn.Module, learner: LearnerConfig) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms and biases) do not."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in parameters if one.ndim >= 2], "weight_decay": learner.weight_decay},
        {"params": [one for one in parameters if one.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, Any]], learner: LearnerConfig) -> torch.optim.AdamW:
    """PyTorch's fused AdamW, since DeepSpeed's own are compiled at first use; its rate is set before each update."""
    return torch.optim.AdamW(groups, lr=0.0, betas=learner.betas, eps=learner.adam_epsilon, fused=True)


def deepspeed_config(learner: LearnerConfig, num_parameters: int) -> dict[str, Any]:
    """The dictionary `deepspeed.initialize` takes.

    Batch size and accumulation steps stay out of it: a micro-batch is a row of trajectories, and `LearnerEngine.learn`
    says itself which backward pass is the last one. The 2 only makes the offloading optimiser keep its accumulation
    buffers.
    """
    bucket = min(LARGEST_BUCKET, max(num_parameters, 1024))
    zero: dict[str, Any] = {"stage": learner.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2 if learner.offload_optimizer else 1,
        "gradient_clipping": learner.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if learner.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        config["optimizer"] = {
            "type": "AdamW",
            "params": {"lr": 0.0, "betas": learner.betas, "eps": learner.adam_epsilon},
        }
    if learner.dtype == "bfloat16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if learner.zero_stage > 0:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
