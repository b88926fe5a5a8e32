"""Requests that enter between steps, and weights that change under them, on the student's real engine."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.tiny import EOS_ID, make_requests, make_tiny_model
from topd_ray.config.schema import RolloutConfig, StudentConfig
from topd_ray.engines.rollout import RolloutEngine
from topd_ray.engines.seeds import stable_seed
from topd_ray.errors import RolloutError, WeightSyncError
from topd_ray.types import RolloutRequest, Trajectory

MAX_NEW_TOKENS = 24
MAX_PROMPT_TOKENS = 48
NATS = 1e-3
Policy = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("students")
    return [make_tiny_model(root / str(seed), seed=seed, tied=True) for seed in (1, 0)]


@pytest.fixture(scope="module")
def policies(folders: list[Path]) -> list[Policy]:
    """Versions of even and of odd numbers."""
    return [load_file(folder / "model.safetensors") for folder in folders]


@pytest.fixture(scope="module")
def shared_engine(folders: list[Path]) -> Iterator[RolloutEngine]:
    rollout = RolloutConfig(
        temperature=0.7,
        max_new_tokens=MAX_NEW_TOKENS,
        max_num_seqs=6,
        max_batched_tokens=64,
        kv_cache_bytes=8 * 1024**2,
        enforce_eager=True,
    )
    with RolloutEngine(
        StudentConfig(model=str(folders[0]), dtype="float32"),
        rollout,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_new_tokens=MAX_NEW_TOKENS,
        threads=1,
        seed=0,
    ) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: RolloutEngine, policies: list[Policy]) -> Iterator[RolloutEngine]:
    """The engine at version 0, idle."""
    yield shared_engine
    shared_engine.abandon()
    if shared_engine.policy_version:
        serve(shared_engine, 0, policies)


def serve(engine: RolloutEngine, version: int, policies: list[Policy], *, interrupt: bool = False) -> None:
    receipt = engine.update_weights(version, policies[version % 2].items(), interrupt=interrupt)
    assert receipt.version == version == engine.policy_version


def write(engine: RolloutEngine, requests: list[RolloutRequest]) -> dict[str, Trajectory]:
    return {one.trajectory_id: one for one in engine.generate(requests)}


def finish(engine: RolloutEngine) -> dict[str, Trajectory]:
    found = {}
    while engine.num_running:
        found.update({one.trajectory_id: one for one in engine.step()})
    return found


def tokens(trajectories: dict[str, Trajectory]) -> dict[str, list[int]]:
    return {name: one.response_ids.tolist() for name, one in trajectories.items()}


def num_written(engine: RolloutEngine) -> dict[str, int]:
    """Tokens that each running request has, those of earlier policies included."""
    running = engine._engine._running.values()
    return {one.key.request.trajectory_id: len(one.key.token_ids) + len(one.token_ids) for one in running}


def interrupted(
    engine: RolloutEngine, requests: list[RolloutRequest], policies: list[Policy], every: int
) -> tuple[dict[str, Trajectory], dict[str, list[int]]]:
    """The trajectories of requests under a new version every so many steps, and each one's lengths at the changes."""
    engine.add(requests)
    found: dict[str, Trajectory] = {}
    lengths: dict[str, list[int]] = {one.trajectory_id: [] for one in requests}
    for version in range(1, 1000):
        for _ in range(every):
            found.update({one.trajectory_id: one for one in engine.step()})
        if not engine.num_running:
            return found, lengths
        for name, length in num_written(engine).items():
            lengths[name].append(length)
        serve(engine, version, policies, interrupt=True)
    raise AssertionError("the requests do not come to an end")


def scored_under_both(
    engine: RolloutEngine, trajectories: list[Trajectory], policies: list[Policy]
) -> list[list[NDArray[np.float32]]]:
    """Log-probs of the response tokens under the policy of even and of odd versions."""
    found = []
    for version in (1000, 1001):
        serve(engine, version, policies)
        scores = engine.score([(one.prompt_ids, one.response_ids) for one in trajectories], 1)
        found.append([score.sampled_logprobs for score in scores])
    return found


@pytest.mark.parametrize(("every", "prompt_length"), [(1, 3), (4, MAX_PROMPT_TOKENS)])
def test_every_logprob_is_of_the_policy_that_drew_its_token(engine, policies, every, prompt_length):
    requests = make_requests(14, prompt_length=prompt_length)
    alone = tokens(write(engine, requests))
    written, lengths = interrupted(engine, requests, policies, every)
    assert written.keys() == alone.keys()
    even, odd = scored_under_both(engine, list(written.values()), policies)
    num_mixed = 0
    for (name, one), even_T, odd_T in zip(written.items(), even, odd, strict=True):
        positions = np.arange(one.num_response_tokens)
        version_T = np.searchsorted(lengths[name], positions, side="right")
        expected_T = np.where(version_T % 2 == 0, even_T, odd_T)
        assert np.abs(one.behaviour_logprobs - expected_T).max() < NATS
        assert one.policy_version == version_T[0]
        unchanged = lengths[name][0] if lengths[name] else one.num_response_tokens
        assert one.response_ids[:unchanged].tolist() == alone[name][:unchanged]
        if len(set(version_T)) > 1:
            num_mixed += 1
            assert np.abs(one.behaviour_logprobs - np.where(version_T % 2 == 0, odd_T, even_T)).max() > 0.1
    assert num_mixed >= 8
    assert {one.policy_version for one in written.values()} > {0}, "some had to wait, and started under new weights"


def test_an_interrupted_answer_ends_where_it_should(engine, policies):
    written, _ = interrupted(engine, make_requests(14), policies, 1)
    stopped = [one for one in written.values() if one.finish_reason == "stop"]
    cut = [one for one in written.values() if one.finish_reason == "length"]
    assert stopped and cut
    assert all(one.response_ids[-1] == EOS_ID and EOS_ID not in one.response_ids[:-1] for one in stopped)
    assert all(one.num_response_tokens == MAX_NEW_TOKENS and EOS_ID not in one.response_ids for one in cut)
    assert all(len(one.behaviour_logprobs) == one.num_response_tokens for one in written.values())


def test_an_interruption_is_repeatable(engine, policies):
    requests = make_requests(6)
    first, lengths = interrupted(engine, requests, policies, 5)
    serve(engine, 0, policies)
    again, same_lengths = interrupted(engine, requests, policies, 5)
    assert (tokens(first), lengths) == (tokens(again), same_lengths)


def test_the_rest_is_drawn_with_a_seed_of_its_own(engine, policies):
    requests = make_requests(6)
    engine.add(requests)
    for _ in range(5):
        engine.step()
    lengths = num_written(engine)
    serve(engine, 1, policies, interrupt=True)
    found = finish(engine)
    assert found
    for request in requests:
        if (name := request.trajectory_id) in found:
            written, length = found[name].response_ids.tolist(), lengths[name]
            prompt = replace(request.prompt, token_ids=(*request.prompt.token_ids, *written[:length]))
            rest = replace(request, prompt=prompt, seed=stable_seed(request.seed, length))
            assert tokens(write(engine, [rest]))[name][: MAX_NEW_TOKENS - length] == written[length:]


def test_a_request_without_a_token_starts_under_the_new_weights(engine, policies):
    requests = make_requests(6)
    engine.add(requests)
    serve(engine, 1, policies, interrupt=True)
    found = finish(engine)
    assert {one.policy_version for one in found.values()} == {1}
    assert tokens(found) == tokens(write(engine, requests))


def test_what_joins_is_written_as_it_is_alone(engine):
    requests = make_requests(8)
    alone = tokens(write(engine, requests))
    found = {}
    for request in requests:
        engine.add([request])
        found.update({one.trajectory_id: one for step in range(3) for one in engine.step()})
    assert tokens(found | finish(engine)) == alone
    assert engine.step() == []


def test_refused_weights_leave_what_runs_as_it_was(engine, policies):
    requests = make_requests(4)
    alone = tokens(write(engine, requests))
    engine.add(requests)
    found = {one.trajectory_id: one for step in range(3) for one in engine.step()}
    before = num_written(engine)
    with pytest.raises(WeightSyncError, match=f"still generating {len(before)} requests"):
        engine.update_weights(1, policies[1].items())
    spoilt = {name: tensor for name, tensor in policies[1].items() if name != "model.norm.weight"}
    with pytest.raises(WeightSyncError, match=r"missing: model\.norm\.weight"):
        engine.update_weights(1, spoilt.items(), interrupt=True)
    assert num_written(engine) == before and engine.is_whole
    assert tokens(found | finish(engine)) == alone
    assert engine.policy_version == 0


def test_an_iterator_is_not_interrupted(engine, policies):
    stream = engine.generate(make_requests(4))
    next(stream)
    with pytest.raises(WeightSyncError, match="exhaust or close the iterator"):
        engine.update_weights(1, policies[1].items(), interrupt=True)
    for use in (lambda: engine.add(make_requests(1)), engine.step):
        with pytest.raises(RolloutError, match="still generating"):
            use()
    stream.close()
    assert engine.num_running == 0


def test_added_requests_can_be_abandoned_and_are_refused_together(engine):
    requests = make_requests(8)
    alone = tokens(write(engine, requests))
    engine.add(requests)
    engine.step()
    for use in (lambda: write(engine, requests), lambda: engine.score([((1,), (2,))], 1)):
        with pytest.raises(RolloutError, match="still generating: 8 added requests"):
            use()
    assert engine.num_running == 8
    engine.abandon()
    assert engine.num_running == 0 and engine.step() == []
    with pytest.raises(RolloutError, match="a request of 49 tokens"):
        engine.add([*requests[:3], *make_requests(1, prompt_length=MAX_PROMPT_TOKENS + 1)])
    assert engine.num_running == 0
    assert tokens(write(engine, requests)) == alone
