"""The learning rate, update by update, and who decays."""

import pytest
import torch
from torch import nn

from topd_ray.config.schema import LearnerConfig
from topd_ray.engines.optimisation import deepspeed_config, learning_rate, parameter_groups


def rates(total_updates: int, **changes: object) -> list[float]:
    learner = LearnerConfig.model_validate({"learning_rate": 8.0, **changes})
    return [learning_rate(learner, update, total_updates) for update in range(total_updates + 2)]


def test_warm_up_reaches_the_peak_and_the_first_update_moves() -> None:
    assert rates(8, warmup_fraction=0.5) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0]


def test_linear_falls_towards_zero_at_the_end_and_stays() -> None:
    found = rates(6, warmup_fraction=0.34, schedule="linear")
    assert found == pytest.approx([4.0, 8.0, 8.0, 6.0, 4.0, 2.0, 0.0, 0.0])


def test_cosine_is_half_way_down_in_the_middle() -> None:
    found = rates(4, warmup_fraction=0.0, schedule="cosine")
    assert found == pytest.approx([8.0, 6.8284271, 4.0, 1.1715729, 0.0, 0.0])


def test_no_warm_up_and_all_warm_up() -> None:
    assert rates(2, warmup_fraction=0.0) == [8.0] * 4
    assert rates(2, warmup_fraction=1.0, schedule="linear") == [4.0, 8.0, 8.0, 0.0]


def test_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    matrices, vectors = parameter_groups(module, LearnerConfig(weight_decay=0.1))
    assert [tuple(one.shape) for one in matrices["params"]] == [(2, 3)]
    assert [tuple(one.shape) for one in vectors["params"]] == [(2,), (2,), (2,)]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)


def test_buckets_are_not_larger_than_the_model() -> None:
    config = deepspeed_config(LearnerConfig(), num_parameters=5000)
    assert config["zero_optimization"]["reduce_bucket_size"] == 5000
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    large = deepspeed_config(LearnerConfig(), num_parameters=4 * 10**9)
    assert large["zero_optimization"]["reduce_bucket_size"] == 5 * 10**8


def test_fp32_needs_no_accumulation_type() -> None:
    assert "bf16" not in deepspeed_config(LearnerConfig(dtype="float32"), num_parameters=torch.iinfo(torch.int32).max)
