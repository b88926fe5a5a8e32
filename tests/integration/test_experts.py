"""A mixture of experts as student and as teacher. vLLM wants one to be the first engine of its process."""

from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from tests.tiny import largest_error, load_tiny_model, make_requests, make_tiny_model, plain_logprobs
from topd_ray.config.schema import RolloutConfig, StudentConfig, TeacherConfig
from topd_ray.engines.rollout import RolloutEngine
from topd_ray.engines.teacher import TeacherEngine

KV_CACHE_BYTES = 8 * 1024**2
NATS = 1e-3


def test_experts_follow_their_weights(tmp_path: Path) -> None:
    old, new = (make_tiny_model(tmp_path / str(seed), seed=seed, num_experts=4) for seed in (0, 1))
    config = RolloutConfig(max_new_tokens=8, max_num_seqs=8, kv_cache_bytes=KV_CACHE_BYTES, enforce_eager=True)
    student = StudentConfig(model=str(old), dtype="float32")
    with RolloutEngine(student, config, max_prompt_tokens=8, max_new_tokens=8, threads=1, seed=0) as engine:
        assert largest_error(engine.generate(make_requests(4)), load_tiny_model(old), 1.0) < NATS
        for version, folder in enumerate((new, old), start=1):
            engine.update_weights(version, load_file(folder / "model.safetensors").items())
            assert largest_error(engine.generate(make_requests(4)), load_tiny_model(folder), 1.0) < NATS


def test_scores_are_those_of_a_plain_forward_pass(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, seed=0, num_experts=4)
    config = TeacherConfig(model=str(folder), dtype="float32", kv_cache_bytes=KV_CACHE_BYTES, enforce_eager=True)
    prompt, response = [10, 11, 12], [20, 21, 22, 23]
    with TeacherEngine(config, temperature=0.7, max_model_len=32, window=4, threads=1, seed=0) as engine:
        (scores,) = engine.score([(prompt, response)], 5)
    right = plain_logprobs(load_tiny_model(folder), prompt, response, 0.7)
    np.testing.assert_allclose(scores.sampled_logprobs, right[np.arange(4), response], atol=NATS)
