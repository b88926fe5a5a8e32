"""The student's vLLM engine on a tiny model, against plain transformers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from tests import tiny
from tests.tiny import (
    EOS_ID,
    NUM_TOKENS,
    at,
    load_tiny_model,
    make_requests,
    make_tiny_model,
    plain_greedy,
    plain_logprobs,
)
from topd_ray.config.schema import RolloutConfig, StudentConfig
from topd_ray.engines.rollout import RolloutEngine
from topd_ray.errors import ConfigError, RolloutError, WeightSyncError
from topd_ray.types import RolloutRequest, Trajectory
from topd_ray.weights.checksum import fingerprint

TEMPERATURE = 0.7
MAX_NEW_TOKENS = 24
MAX_PROMPT_TOKENS = 48
NATS = 1e-3


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    model: Qwen3ForCausalLM
    tensors: dict[str, torch.Tensor]


def make_checkpoint(folder: Path, seed: int, *, tied: bool) -> Checkpoint:
    make_tiny_model(folder, seed=seed, tied=tied)
    return Checkpoint(folder, load_tiny_model(folder), load_file(folder / "model.safetensors"))


def build(folder: Path, **changes: object) -> RolloutEngine:
    dtype = str(changes.pop("dtype", "float32"))
    rollout = RolloutConfig(
        temperature=TEMPERATURE,
        max_new_tokens=MAX_NEW_TOKENS,
        max_num_seqs=32,
        max_batched_tokens=128,
        kv_cache_bytes=8 * 1024**2,
        enforce_eager=True,
    )
    return RolloutEngine(
        StudentConfig(model=str(folder), dtype=dtype),
        rollout.model_copy(update=changes),
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_new_tokens=MAX_NEW_TOKENS,
        threads=1,
        seed=0,
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("first"), 1, tied=True)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("second"), 0, tied=True)


@pytest.fixture(scope="module")
def shared_engine(first: Checkpoint) -> Iterator[RolloutEngine]:
    with build(first.folder) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: RolloutEngine, first: Checkpoint) -> Iterator[RolloutEngine]:
    """The engine, with its first weights after each test."""
    yield shared_engine
    if shared_engine.policy_version:
        shared_engine.update_weights(0, first.tensors.items())


def write(engine: RolloutEngine, requests: list[RolloutRequest]) -> dict[str, Trajectory]:
    return {one.trajectory_id: one for one in engine.generate(requests)}


def tokens(trajectories: dict[str, Trajectory]) -> dict[str, list[int]]:
    return {name: one.response_ids.tolist() for name, one in trajectories.items()}


def largest_error(trajectories: dict[str, Trajectory], model: Qwen3ForCausalLM) -> float:
    return tiny.largest_error(trajectories.values(), model, TEMPERATURE)


def test_behaviour_logprobs_are_of_the_distribution_at_the_temperature(engine, first):
    written = write(engine, make_requests(16))
    assert len(written) == 16
    assert largest_error(written, first.model) < NATS
    assert all(one.policy_version == 0 and one.behaviour_logprobs.dtype == np.float32 for one in written.values())


def test_a_continued_prefix_is_what_a_trajectory_of_the_same_seed_is(engine):
    requests = make_requests(6)
    written = tokens(write(engine, requests))
    prefixes = [one.prompt.token_ids for one in requests]
    continued = engine.continue_prefixes(prefixes, 5, seeds=[one.seed for one in requests])
    assert [ids.tolist() for ids in continued] == [written[one.trajectory_id][:5] for one in requests]
    assert continued[0].dtype == np.int32


def test_padded_rows_are_never_sampled(engine, first):
    written = write(engine, make_requests(32))
    assert max(one.response_ids.max() for one in written.values()) < NUM_TOKENS
    logits = first.model(torch.tensor([[10, 11, 20]])).logits[0, -1]
    assert torch.softmax(logits, -1)[NUM_TOKENS:].sum() > 0.01, "the model must be tempted"


def test_end_of_sequence_is_kept_and_never_made_up(engine):
    written = list(write(engine, make_requests(32)).values())
    stopped = [one for one in written if one.finish_reason == "stop"]
    cut = [one for one in written if one.finish_reason == "length"]
    assert stopped and cut
    assert all(one.response_ids[-1] == EOS_ID and EOS_ID not in one.response_ids[:-1] for one in stopped)
    assert all(one.num_response_tokens == MAX_NEW_TOKENS and EOS_ID not in one.response_ids for one in cut)


def test_a_seed_gives_the_same_tokens_alone_and_in_company(engine):
    requests = make_requests(12)
    together = tokens(write(engine, requests))
    assert tokens(write(engine, requests[::-1])) == together
    for request in requests[:3]:
        assert tokens(write(engine, [request])) == {request.trajectory_id: together[request.trajectory_id]}
    other = replace(requests[0], seed=7)
    assert tokens(write(engine, [other])) != {other.trajectory_id: together[other.trajectory_id]}


def test_a_seed_gives_the_same_tokens_however_the_prompt_is_chunked(engine, first):
    requests = make_requests(8, prompt_length=MAX_PROMPT_TOKENS)
    with build(first.folder, max_batched_tokens=32) as narrow:
        assert tokens(write(narrow, requests)) == tokens(write(engine, requests))


def test_trajectories_come_one_by_one_and_the_rest_can_be_dropped(engine):
    whole = write(engine, make_requests(32))
    stream = engine.generate(make_requests(32))
    earliest = next(stream)
    assert earliest.num_response_tokens == min(one.num_response_tokens for one in whole.values())
    with pytest.raises(RolloutError, match="still generating"):
        engine.score([((1,), (2,))], 1)
    with pytest.raises(WeightSyncError, match="still generating"):
        engine.update_weights(1, {}.items())
    stream.close()
    assert tokens(write(engine, make_requests(32))) == tokens(whole)


def test_scores_agree_with_a_plain_forward_pass(engine, first):
    written = list(write(engine, make_requests(6)).values())
    sequences = [(one.prompt_ids, one.response_ids) for one in written]
    for top_k, num_kept in ((5, 5), (NUM_TOKENS - 1, NUM_TOKENS - 1), ("full", NUM_TOKENS), (1000, NUM_TOKENS)):
        for (prompt_ids, response_ids), score in zip(sequences, engine.score(sequences, top_k), strict=True):
            plain_TV = plain_logprobs(first.model, prompt_ids, response_ids, TEMPERATURE)
            assert score.topk_ids.shape == score.topk_logprobs.shape == (len(response_ids), num_kept)
            assert score.topk_ids.dtype == np.int32 and score.topk_logprobs.dtype == np.float32
            assert np.abs(score.sampled_logprobs - at(plain_TV, response_ids)).max() < NATS
            assert np.abs(score.topk_logprobs - at(plain_TV, score.topk_ids)).max() < NATS
            assert np.abs(score.topk_logprobs - -np.sort(-plain_TV, 1)[:, :num_kept]).max() < NATS
            assert (np.diff(score.topk_logprobs, axis=1) <= 0).all()
            if num_kept == NUM_TOKENS:
                assert (np.sort(score.topk_ids, 1) == np.arange(NUM_TOKENS)).all()


def test_nucleus_sampling_reports_the_nucleus_distribution(first):
    top_p = 0.6
    with build(first.folder, top_p=top_p) as engine:
        written = write(engine, make_requests(8))
    for one in written.values():
        plain_TV = plain_logprobs(first.model, one.prompt_ids, one.response_ids, TEMPERATURE)
        for row_V, token, found in zip(plain_TV, one.response_ids, one.behaviour_logprobs, strict=True):
            order = np.argsort(-row_V)
            before = np.cumsum(np.exp(row_V[order])) - np.exp(row_V[order])
            nucleus = order[before < top_p]
            assert token in nucleus
            assert found == pytest.approx(row_V[token] - np.log(np.exp(row_V[nucleus]).sum()), abs=NATS)


def test_completions_for_evaluation(engine, first):
    prompts = [request.prompt for request in make_requests(4)]

    def complete(prompts, **options):
        answered = engine.complete(prompts, top_p=1.0, max_new_tokens=12, seed=3, **options)
        return {prompt.prompt_id: answers for prompt, answers in answered}

    greedy = complete(prompts, num_samples=1, temperature=0.0)
    for prompt in prompts:
        ((ids, reason),) = greedy[prompt.prompt_id]
        assert ids == plain_greedy(first.model, prompt.token_ids, 12)
        assert (reason == "stop") == (ids[-1] == EOS_ID)
    sampled = complete(prompts, num_samples=3, temperature=1.3)
    assert sampled == complete(prompts[::-1], num_samples=3, temperature=1.3)
    assert all(len({tuple(ids) for ids, _ in answers}) == 3 for answers in sampled.values())


def test_new_weights_are_served_and_old_ones_come_back(engine, first, second):
    requests = make_requests(12, prompt_length=MAX_PROMPT_TOKENS)  # longer than a block: prefixes are cached
    before = tokens(write(engine, requests))
    receipt = engine.update_weights(7, second.tensors.items())
    expected = fingerprint(second.tensors.items())
    assert (receipt.version, receipt.checksum, receipt.num_bytes) == (7, expected.checksum, expected.num_bytes)
    written = write(engine, requests)
    assert {one.policy_version for one in written.values()} == {7} == {engine.policy_version}
    assert largest_error(written, second.model) < NATS
    engine.update_weights(8, first.tensors.items())
    assert tokens(write(engine, requests)) == before


def test_a_tied_head_may_come_along(engine, second):
    embedding = second.tensors["model.embed_tokens.weight"]
    sent = {**second.tensors, "lm_head.weight": embedding}
    receipt = engine.update_weights(1, sent.items())
    assert receipt.checksum == fingerprint(sent.items()).checksum, "what was sent is what is acknowledged"
    assert largest_error(write(engine, make_requests(2)), second.model) < NATS


@pytest.mark.parametrize("head", ["of its own", "the same, sent", "the same, not sent"])
def test_a_head_that_only_the_files_have_follows(tmp_path, head):
    """The config says it is tied. Where its values differ, neither transformers nor vLLM ties it."""
    old, new = (make_tiny_model(tmp_path / str(seed), seed=seed, tied=head != "of its own") for seed in (0, 1))
    for folder in (old, new):
        path, file = folder / "config.json", folder / "model.safetensors"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
        tensors = load_file(file)
        save_file({"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), **tensors}, file, {"format": "pt"})
    sent = load_file(new / "model.safetensors")
    if head == "the same, not sent":
        del sent["lm_head.weight"]
    with build(old) as engine:
        assert largest_error(write(engine, make_requests(4)), load_tiny_model(old)) < NATS
        engine.update_weights(1, sent.items())
        assert largest_error(write(engine, make_requests(4)), load_tiny_model(new)) < NATS


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), "unknown: model.extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"wrong shape: model.norm.weight \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(engine, first, second, spoil, message):
    before = tokens(write(engine, make_requests(4)))
    spoilt = dict(second.tensors)
    spoil(spoilt)
    with pytest.raises(WeightSyncError, match=message):
        engine.update_weights(9, spoilt.items())
    assert engine.policy_version == 0
    assert tokens(write(engine, make_requests(4))) == before


def test_an_update_that_vllm_throws_away_is_an_error(first, second, monkeypatch):
    """Loaders of some models write by themselves, into what is not the model any more."""
    from vllm.model_executor.models import qwen3

    load = qwen3.Qwen3ForCausalLM.load_weights

    def write_by_itself(model, weights):
        norm = dict(model.named_parameters())["model.norm.weight"]
        return load(model, [one for one in weights if one[0] != "model.norm.weight" or norm.data.copy_(one[1]) is None])

    with build(first.folder) as engine:
        monkeypatch.setattr(qwen3.Qwen3ForCausalLM, "load_weights", write_by_itself)
        message = r"does not reach 1 parameters of Qwen3ForCausalLM in vLLM \(model.norm.weight\)"
        with pytest.raises(WeightSyncError, match=message):
            engine.update_weights(1, second.tensors.items())
        assert not engine.is_whole


def test_an_untied_head_in_bfloat16_follows_its_weights(tmp_path):
    old, new = (make_tiny_model(tmp_path / str(seed), seed=seed, dtype="bfloat16", spread=0.1) for seed in (0, 1))
    model = load_tiny_model(new, "bfloat16")
    with build(old, dtype="bfloat16") as engine:
        engine.update_weights(1, load_file(new / "model.safetensors").items())
        written = write(engine, make_requests(4))
    assert largest_error(written, model) < 0.1  # bfloat16 has 8 bits of mantissa
    assert largest_error(written, load_tiny_model(old, "bfloat16")) > 1.0


def test_a_request_that_does_not_fit_is_refused_and_harms_nobody(engine):
    fits, too_long = make_requests(1), make_requests(2, prompt_length=MAX_PROMPT_TOKENS + 1)
    expected = tokens(write(engine, fits))
    with pytest.raises(RolloutError, match=r"a request of 49 tokens, 73 with its answer"):
        write(engine, [*fits, *too_long])
    assert tokens(write(engine, fits)) == expected


def test_an_engine_that_cannot_run_names_the_model(first):
    with pytest.raises(ConfigError, match=str(first.folder)):
        build(first.folder, kv_cache_bytes=1024)
