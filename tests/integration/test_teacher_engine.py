"""The teacher's vLLM engine on a tiny model, against plain transformers."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen3ForCausalLM

from tests.tiny import EOS_ID, NUM_TOKENS, at, load_tiny_model, make_tiny_model, plain_greedy, plain_logprobs
from topd_ray.config.schema import TeacherConfig
from topd_ray.engines import teacher as teacher_module
from topd_ray.engines.teacher import TeacherEngine
from topd_ray.errors import TeacherError
from topd_ray.types import Prompt

NATS = 1e-3
MAX_MODEL_LEN = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("teacher"), seed=4, num_rows=80)


@pytest.fixture(scope="module")
def model(folder: Path) -> Qwen3ForCausalLM:
    return load_tiny_model(folder)


def build(folder: Path, temperature: float) -> TeacherEngine:
    return TeacherEngine(
        TeacherConfig(
            model=str(folder),
            dtype="float32",
            top_k=4,
            max_num_seqs=32,
            max_batched_tokens=64,
            kv_cache_bytes=8 * 1024**2,
            enforce_eager=True,
        ),
        temperature=temperature,
        max_model_len=MAX_MODEL_LEN,
        window=16,
        threads=1,
        seed=0,
    )


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[TeacherEngine]:
    with build(folder, 1.0) as engine:
        yield engine


def make_sequences(count: int, num_prompt: int, num_response: int) -> list[tuple[list[int], list[int]]]:
    draw = np.random.default_rng(0)
    ids = draw.integers(3, NUM_TOKENS, (count, num_prompt + num_response))
    return [(row[:num_prompt].tolist(), row[num_prompt:].tolist()) for row in ids]


def cached_tokens(engine: TeacherEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A list that fills with (tokens found in the prefix cache, prompt tokens) of every later request."""
    core = engine._engine._llm.engine_core
    get_output, seen = core.get_output, []

    def recording() -> object:
        outputs = get_output()
        stats = [output.prefill_stats for output in outputs.outputs]
        seen.extend((one.num_cached_tokens, one.num_prompt_tokens) for one in stats if one is not None)
        return outputs

    monkeypatch.setattr(core, "get_output", recording)
    return seen


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_scores_are_at_the_rollouts_temperature(engine, folder, model, temperature):
    sequences = [*make_sequences(3, 5, 30), *make_sequences(1, 40, 80), *make_sequences(1, 2, 1)]
    with build(folder, temperature) as other:
        scored = {4: other.score(sequences), NUM_TOKENS: other.score(sequences, "full")}
        if temperature == 1.0:
            assert other.verify(sequences) < NATS
    for num_kept, scores in scored.items():
        for (prompt_ids, response_ids), score in zip(sequences, scores, strict=True):
            plain_TV = plain_logprobs(model, prompt_ids, response_ids, temperature)
            assert score.topk_ids.shape == (len(response_ids), num_kept)
            assert np.abs(score.sampled_logprobs - at(plain_TV, response_ids)).max() < NATS
            assert np.abs(score.topk_logprobs - at(plain_TV, score.topk_ids)).max() < NATS
            assert np.abs(score.topk_logprobs - -np.sort(-plain_TV, 1)[:, :num_kept]).max() < NATS
    full = np.concatenate([np.exp(score.topk_logprobs.astype(np.float64)).sum(1) for score in scored[NUM_TOKENS]])
    assert np.abs(full - 1.0).max() < 1e-5


def test_scores_do_not_depend_on_company(engine):
    sequences = make_sequences(6, 4, 50)
    together = engine.score(sequences)
    for sequence, expected in zip(sequences, together, strict=True):
        (alone,) = engine.score([sequence])
        assert np.array_equal(alone.topk_ids, expected.topk_ids)
        assert np.abs(alone.topk_logprobs - expected.topk_logprobs).max() < 1e-4


def test_greedy_continuations_are_the_models(engine, model):
    ((prompt_ids, response_ids),) = make_sequences(1, 10, 60)
    prefixes = [prompt_ids + response_ids[:cut] for cut in range(0, 60, 3)]
    continued = engine.continue_prefixes(prefixes, 16)
    assert [one.tolist() for one in continued] == [plain_greedy(model, prefix, 16) for prefix in prefixes]
    assert all(one.dtype == np.int32 for one in continued)


def test_continuations_stop_after_the_end_of_sequence(engine):
    prefixes = [prompt_ids for prompt_ids, _ in make_sequences(64, 6, 0)]
    continued = engine.continue_prefixes(prefixes, 16, decoding="sample", seeds=range(64))
    stopped = [one for one in continued if EOS_ID in one]
    assert 0 < len(stopped) < 64
    assert all(one.tolist().index(EOS_ID) == len(one) - 1 for one in stopped)
    assert all(len(one) == 16 for one in continued if EOS_ID not in one)


def test_sampled_continuations_belong_to_their_seed(engine):
    prefixes = [prompt_ids for prompt_ids, _ in make_sequences(8, 6, 0)]
    as_lists = [one.tolist() for one in engine.continue_prefixes(prefixes, 8, decoding="sample", seeds=range(8))]
    backwards = engine.continue_prefixes(prefixes[::-1], 8, decoding="sample", seeds=range(7, -1, -1))
    assert [one.tolist() for one in backwards[::-1]] == as_lists
    others = engine.continue_prefixes(prefixes, 8, decoding="sample", seeds=range(8, 16))
    assert [one.tolist() for one in others] != as_lists
    with pytest.raises(TeacherError, match="a seed for each"):
        engine.continue_prefixes(prefixes, 8, decoding="sample", seeds=[1])


def test_prefixes_of_a_scored_trajectory_come_from_the_cache(engine, monkeypatch):
    ((prompt_ids, response_ids),) = make_sequences(1, 20, 90)
    response_ids = response_ids[::-1]  # not what another test has scored
    engine.score([(prompt_ids, response_ids)])
    seen = cached_tokens(engine, monkeypatch)
    engine.continue_prefixes([prompt_ids + response_ids[:cut] for cut in (50, 60, 80)], 4)
    assert sorted(seen) == [(64, 70), (64, 80), (96, 100)], "whole blocks of 32 tokens"


def test_completions(engine, model):
    prompts = [Prompt(prompt_id=str(i), token_ids=(*ids,)) for i, (ids, _) in enumerate(make_sequences(3, 5, 0))]
    answers = dict(engine.complete(prompts, num_samples=1, temperature=0.0, top_p=1.0, max_new_tokens=10, seed=0))
    assert {prompt: samples[0][0] for prompt, samples in answers.items()} == {
        prompt: plain_greedy(model, prompt.token_ids, 10) for prompt in prompts
    }


def test_embedding_holds_the_tokenizers_rows(engine, model):
    embedding_VD = engine.embedding()
    assert embedding_VD.dtype == np.float32
    assert np.array_equal(embedding_VD, model.get_input_embeddings().weight[:NUM_TOKENS].detach().numpy())


def test_verify_finds_scores_of_another_model(engine, tmp_path, monkeypatch):
    sequences = make_sequences(2, 5, 20)
    assert engine.verify(sequences) < NATS
    other = make_tiny_model(tmp_path, seed=2)
    monkeypatch.setattr(engine, "_teacher", engine._teacher.model_copy(update={"model": str(other)}))
    assert engine.verify(sequences) > 1.0


def test_verify_skips_large_models_and_says_so(engine, monkeypatch, caplog):
    monkeypatch.setattr(teacher_module, "MAX_VERIFIED_BYTES", 1000)
    assert engine.verify(make_sequences(1, 5, 5)) is None
    assert "not verified" in caplog.text


def test_a_sequence_that_does_not_fit_is_refused(engine):
    sequences: Sequence[tuple[list[int], list[int]]] = make_sequences(1, 64, 65)
    with pytest.raises(TeacherError, match="a request of 129 tokens"):
        engine.score(sequences)
    assert len(engine.score(make_sequences(1, 64, 64))[0].sampled_logprobs) == 64
