"""Engines that are spread over two processes do what engines in one do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import load_tiny_model, make_requests, make_tiny_model, plain_logprobs
from topd_ray.config.schema import RolloutConfig, StudentConfig, TeacherConfig
from topd_ray.engines.rollout import RolloutEngine
from topd_ray.engines.teacher import TeacherEngine

KV_CACHE_BYTES = 64 * 1024**2
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="vLLM gives each process a GPU of its own"),
]


@contextmanager
def rollout(folder: Path, num_processes: int) -> Iterator[RolloutEngine]:
    config = RolloutConfig(
        max_new_tokens=8,
        max_num_seqs=8,
        kv_cache_bytes=KV_CACHE_BYTES,
        enforce_eager=True,
        tensor_parallel_size=num_processes,
    )
    student = StudentConfig(model=str(folder), dtype="float32")
    with RolloutEngine(student, config, max_prompt_tokens=8, max_new_tokens=8, threads=1, seed=0) as engine:
        yield engine


def test_rollouts_before_and_after_new_weights(tmp_path: Path) -> None:
    old, new = (make_tiny_model(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    weights = load_file(new / "model.safetensors")
    found = []
    for num_processes in (1, 2):
        with rollout(old, num_processes) as engine:
            first = list(engine.generate(make_requests(6)))
            checksum = engine.update_weights(1, weights.items()).checksum
            second = list(engine.generate(make_requests(6)))
        found.append((checksum, {(one.policy_version, one.trajectory_id): one for one in (*first, *second)}))
    (checksum, alone), (other, spread) = found
    assert checksum == other
    assert {version for version, _ in alone} == {0, 1} and alone.keys() == spread.keys()
    for key, one in alone.items():
        assert spread[key].response_ids.tolist() == one.response_ids.tolist()
        np.testing.assert_allclose(spread[key].behaviour_logprobs, one.behaviour_logprobs, atol=1e-4)


def test_scores_are_those_of_a_plain_forward_pass(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, seed=0)
    config = TeacherConfig(
        model=str(folder), dtype="float32", kv_cache_bytes=KV_CACHE_BYTES, enforce_eager=True, tensor_parallel_size=2
    )
    prompt, response = [10, 11, 12], [20, 21, 22, 23]
    with TeacherEngine(config, temperature=0.7, max_model_len=32, window=4, threads=1, seed=0) as engine:
        (scores,) = engine.score([(prompt, response)], 5)
        (window,) = engine.continue_prefixes([prompt], 4)
    right = plain_logprobs(load_tiny_model(folder), prompt, response, 0.7)
    np.testing.assert_allclose(scores.sampled_logprobs, right[np.arange(4), response], atol=1e-4)
    assert len(window) == 4
