"""A rollout worker that serves: the real engine behind real threads, and as a Ray actor."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from tests.tiny import at, load_tiny_model, make_requests, make_tiny_model, plain_logprobs
from topd_ray.actors.cluster import worker_environment
from topd_ray.actors.messages import RolloutChunk
from topd_ray.actors.rollout import RolloutWorker
from topd_ray.actors.store import LocalStore, RayStore
from topd_ray.config.schema import EvaluationConfig, RolloutConfig, StudentConfig, WeightsConfig
from topd_ray.data.arrow import batch_to_trajectories
from topd_ray.errors import RolloutError, WeightSyncError
from topd_ray.types import RolloutRequest, Trajectory
from topd_ray.weights.bundle import WeightsBundle
from topd_ray.weights.choice import open_channel

TEMPERATURE = 0.7
NATS = 1e-3
SECONDS = 240.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("students")
    return [make_tiny_model(root / str(seed), seed=seed, tied=True) for seed in (1, 0)]


@pytest.fixture(scope="module")
def models(folders: list[Path]) -> list[Qwen3ForCausalLM]:
    """Versions of even and of odd numbers."""
    return [load_tiny_model(folder) for folder in folders]


def parts(folder: Path) -> dict[str, Any]:
    return {
        "student": StudentConfig(model=str(folder), dtype="float32"),
        "rollout": RolloutConfig(
            temperature=TEMPERATURE,
            max_new_tokens=24,
            max_num_seqs=16,
            max_batched_tokens=128,
            kv_cache_bytes=8 * 1024**2,
            enforce_eager=True,
        ),
        "evaluation": EvaluationConfig(num_runs=1, max_new_tokens=4),
        "weights": WeightsConfig(),
        "max_prompt_tokens": 16,
        "threads": 1,
        "seed": 0,
    }


def bundle(folders: list[Path], version: int, store: LocalStore | RayStore) -> WeightsBundle:
    named = load_file(folders[version % 2] / "model.safetensors").items()
    return open_channel(WeightsConfig(), store).send(version, named)


def draws(count: int, first: int = 0) -> list[RolloutRequest]:
    """More requests than the tiny vocabulary has prompts for: samples of twenty prompts."""
    prompts = make_requests(20)
    return [replace(prompts[index % 20], sample_index=index // 20, seed=index) for index in range(first, first + count)]


def names(requests: Sequence[RolloutRequest]) -> list[str]:
    return sorted(one.trajectory_id for one in requests)


class Reader:
    """Reads a worker's stream in a thread of its own."""

    def __init__(self, worker: RolloutWorker) -> None:
        self.worker = worker
        self.pool = ThreadPoolExecutor(8)
        self._read: list[RolloutChunk] = []
        self._changed = threading.Condition()
        self.start()

    def start(self) -> None:
        def read() -> None:
            while chunks := self.worker.read():
                with self._changed:
                    self._read += chunks
                    self._changed.notify_all()

        self.stream: Future[None] = self.pool.submit(read)

    def take(self, count: int) -> list[RolloutChunk]:
        """The next chunks, which hold at least `count` trajectories."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.num_read >= count, SECONDS), f"only {self.num_read} came"
            taken, self._read = self._read, []
        return taken

    @property
    def num_read(self) -> int:
        return sum(len(chunk.trajectory_ids) for chunk in self._read)

    def stop(self) -> None:
        self.worker.stop()
        self.pool.shutdown()


@pytest.fixture(scope="module")
def worker(folders: list[Path]) -> Iterator[RolloutWorker]:
    found = RolloutWorker(**parts(folders[0]), store=LocalStore())
    found.setup()
    yield found
    found.shutdown()


@pytest.fixture
def reader(worker: RolloutWorker) -> Iterator[Reader]:
    """A stream of the worker, whose version goes on rising from test to test."""
    found = Reader(worker)
    yield found
    found.stop()


def trajectories(chunks: Sequence[RolloutChunk]) -> list[Trajectory]:
    """What chunks hold, after a look at how they say it."""
    found = []
    for chunk in chunks:
        rows = batch_to_trajectories(chunk.handle)
        assert chunk.trajectory_ids == tuple(one.trajectory_id for one in rows)
        assert chunk.policy_versions == tuple(one.policy_version for one in rows)
        assert chunk.num_tokens == tuple(one.num_response_tokens for one in rows)
        found += rows
    return found


def errors(one: Trajectory, models: list[Qwen3ForCausalLM], version: int) -> np.ndarray:
    """How far the behaviour log-probs are from those of a version (nats), [T]."""
    plain_TV = plain_logprobs(models[version % 2], one.prompt_ids, one.response_ids, TEMPERATURE)
    return np.abs(at(plain_TV, one.response_ids) - one.behaviour_logprobs)


def test_threads_submit_while_draining_updates_never_mix_versions(reader, folders, models):
    worker, store = reader.worker, LocalStore()
    before = worker._engine.policy_version
    shares = [draws(40, first=40 * thread) for thread in range(4)]

    def submit(share: list[RolloutRequest]) -> None:
        for request in share:
            worker.submit([request], whole=False)

    for call in [reader.pool.submit(submit, share) for share in shares[:2]]:
        call.result(SECONDS)
    chunks = reader.take(1)
    updating = reader.pool.submit(worker.update_weights, bundle(folders, before + 1, store), interrupt=False)
    for call in [reader.pool.submit(submit, share) for share in shares[2:]]:
        call.result(SECONDS)
    assert updating.result(SECONDS).version == before + 1
    worker.submit(draws(10, first=160), whole=False)
    while sum(len(chunk.trajectory_ids) for chunk in chunks) < 170:
        chunks += reader.take(1)
    written = trajectories(chunks)
    assert sorted(one.trajectory_id for one in written) == names(draws(170))
    assert {one.policy_version for one in written} == {before, before + 1}
    assert max(errors(one, models, one.policy_version).max() for one in written) < NATS


def test_an_interrupting_update_does_not_wait_for_what_runs(reader, folders, models):
    worker = reader.worker
    before = worker._engine.policy_version
    worker.submit(draws(200), whole=False)
    chunks = reader.take(1)
    receipt = worker.update_weights(bundle(folders, before + 1, LocalStore()), interrupt=True)
    assert receipt.version == before + 1
    while sum(len(chunk.trajectory_ids) for chunk in chunks) < 200:
        chunks += reader.take(1)
    num_mixed = 0
    for one in trajectories(chunks):
        is_old = errors(one, models, before) < NATS
        is_new = errors(one, models, before + 1) < NATS
        num_old = next((n for n in range(len(is_old) + 1) if is_old[:n].all() and is_new[n:].all()), None)
        assert num_old is not None, "the old policy wrote the first tokens, the new one the others"
        num_mixed += 0 < num_old < len(is_old)
        assert one.policy_version == before or is_new.all()
    assert num_mixed >= 4


def test_whole_submissions_are_what_they_are_alone(reader):
    worker = reader.worker
    alone = {one.trajectory_id: one for one in worker._engine.generate(draws(30))}
    worker.submit(draws(30)[::-1], whole=True)
    worker.submit(draws(30, first=30), whole=True)
    chunks = reader.take(60)
    assert [list(chunk.trajectory_ids) for chunk in chunks] == [names(draws(30)), names(draws(30, first=30))]
    for one in trajectories(chunks[:1]):
        assert one.response_ids.tolist() == alone[one.trajectory_id].response_ids.tolist()
        assert (one.behaviour_logprobs == alone[one.trajectory_id].behaviour_logprobs).all()


def test_late_and_foreign_updates_are_refused_and_what_is_written_goes_on(reader, folders):
    worker, store = reader.worker, LocalStore()
    version = worker._engine.policy_version + 2
    assert worker.update_weights(bundle(folders, version, store), interrupt=False).version == version
    with pytest.raises(WeightSyncError, match=f"version {version - 1} of the weights came late"):
        worker.update_weights(bundle(folders, version - 1, store), interrupt=False)
    norm = load_file(folders[0] / "model.safetensors")["model.norm.weight"]
    torn = open_channel(WeightsConfig(), store).send(version + 1, [("model.norm.weight", norm)])
    worker.submit(draws(200), whole=False)
    first = reader.take(1)
    with pytest.raises(WeightSyncError, match="do not make up the student"):
        worker.update_weights(torn, interrupt=True)
    chunks = [*first, *reader.take(200 - sum(len(chunk.trajectory_ids) for chunk in first))]
    assert sorted(one for chunk in chunks for one in chunk.trajectory_ids) == names(draws(200))
    assert {one.policy_version for one in trajectories(chunks)} == {version}


def test_evaluation_runs_while_nothing_is_written_and_an_error_is_read(reader):
    worker = reader.worker
    worker.submit(draws(2), whole=True)
    reader.take(2)
    prompts = [request.prompt for request in make_requests(3)]
    parts = worker.evaluate(prompts, evaluation=EvaluationConfig(max_new_tokens=4), seed=0)
    graded = [done for part in parts for done in part.correct]
    assert sorted(graded) == sorted(prompt.prompt_id for prompt in prompts)
    assert [item.num_tokens > 0 for item in worker.own_teacher(draws(2), 4)] == [True, True]
    worker.submit(make_requests(1, prompt_length=17), whole=False)
    with pytest.raises(RolloutError, match="a request of 17 tokens"):
        reader.stream.result(SECONDS)
    reader.start()
    worker.submit(draws(2), whole=True)
    assert len(reader.take(2)) == 1


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def read(actor):
    chunks = ray.get(actor.read.remote(), timeout=SECONDS)
    return [one for chunk in chunks for one in batch_to_trajectories(ray.get(chunk.handle))]


def test_a_ray_actor_serves_while_other_calls_reach_it(cluster, folders, models):
    store = RayStore()
    actor = (
        ray.remote(RolloutWorker)
        .options(num_cpus=1, max_concurrency=4, runtime_env={"env_vars": worker_environment(1, on_cpu=True)})
        .remote(**parts(folders[0]), store=store)
    )
    ray.get(actor.setup.remote(), timeout=SECONDS)
    ray.get(actor.submit.remote(draws(40), whole=False), timeout=SECONDS)
    written = read(actor)
    sent = bundle(folders, 1, store)
    receipt = ray.get(actor.update_weights.remote(sent, interrupt=False), timeout=SECONDS)
    assert (receipt.version, receipt.checksum) == (1, sent.checksum)
    ray.get(actor.submit.remote(draws(5, first=40), whole=True), timeout=SECONDS)
    while len(written) < 45:
        written += read(actor)
    ray.get(actor.submit.remote(make_requests(1, prompt_length=17), whole=False), timeout=SECONDS)
    with pytest.raises(RolloutError, match="a request of 17 tokens"):
        read(actor)
    reading = actor.read.remote()
    ray.get(actor.stop.remote(), timeout=SECONDS)
    assert ray.get(reading, timeout=SECONDS) == []
    assert [one.policy_version for one in written] == [0] * 40 + [1] * 5
    assert max(errors(one, models, one.policy_version).max() for one in written) < NATS
