"""Weights through the channels into a real vLLM engine: torn and late ones never serve."""

import multiprocessing as mp
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_requests, make_tiny_model
from topd_ray.actors.sharing import check_receipt
from topd_ray.actors.store import LocalStore
from topd_ray.config.schema import RolloutConfig, StudentConfig
from topd_ray.engines.rollout import RolloutEngine
from topd_ray.errors import WeightSyncError
from topd_ray.metrics.records import reduce
from topd_ray.weights.broadcast import BroadcastChannel
from topd_ray.weights.bundle import Delivery, WeightsBundle, weight_metrics
from topd_ray.weights.channel import Channel
from topd_ray.weights.checksum import WeightReceipt, fingerprint
from topd_ray.weights.chunks import Chunk
from topd_ray.weights.ipc import IpcChannel
from topd_ray.weights.object_store import ObjectStoreChannel
from topd_ray.weights.parcels import Parcel

CHUNK_BYTES = 32 * 1024
Tokens = dict[str, list[int]]
Parcels = list[Parcel]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """Of two students; the engine starts as the first."""
    root = tmp_path_factory.mktemp("students")
    return [load_file(make_tiny_model(root / str(seed), seed=seed) / "model.safetensors") for seed in (0, 1)]


def build(folder: Path) -> RolloutEngine:
    """Serves the first student."""
    rollout = RolloutConfig(
        max_new_tokens=8, max_num_seqs=8, max_batched_tokens=64, kv_cache_bytes=4 * 1024**2, enforce_eager=True
    )
    student = StudentConfig(model=str(make_tiny_model(folder, seed=0)), dtype="float32")
    return RolloutEngine(student, rollout, max_prompt_tokens=8, max_new_tokens=8, threads=1, seed=0)


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutEngine]:
    with build(tmp_path_factory.mktemp("student")) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: RolloutEngine, weights: list[dict[str, torch.Tensor]]) -> RolloutEngine:
    """It serves the first student as version 5."""
    shared_engine.update_weights(5, weights[0].items())
    return shared_engine


@pytest.fixture
def channel() -> ObjectStoreChannel:
    return ObjectStoreChannel(LocalStore(), chunk_bytes=CHUNK_BYTES)


def broadcast() -> BroadcastChannel:
    """Both ends of it: NCCL would not have them in one process."""
    return BroadcastChannel(
        backend="gloo", address="127.0.0.1", num_workers=1, chunk_bytes=CHUNK_BYTES, timeout_seconds=60.0
    )


def tokens(engine: RolloutEngine) -> Tokens:
    return {one.trajectory_id: one.response_ids.tolist() for one in engine.generate(make_requests(6))}


def deliver(channel: Channel, bundle: WeightsBundle, engine: RolloutEngine) -> WeightReceipt:
    weights = channel.fetch(bundle)
    assert weights is not None
    return engine.update_weights(bundle.version, weights)


@pytest.fixture(params=["object_store", "broadcast"])
def any_channel(request: pytest.FixtureRequest, channel: ObjectStoreChannel) -> Channel:
    """Both ends of it."""
    if request.param == "object_store":
        return channel
    return broadcast()


def parcels_of(bundle: WeightsBundle) -> Parcels:
    return list(bundle.content if isinstance(bundle.content, tuple) else bundle.content.parcels)


def test_a_version_is_served_and_said_so(engine, weights, any_channel):
    channel = any_channel
    first = tokens(engine)
    bundle = channel.send(6, weights[1].items())
    assert len(parcels_of(bundle)) > 3
    assert bundle.checksum == fingerprint(weights[1].items()).checksum
    receipt = deliver(channel, bundle, engine)
    assert check_receipt(0, [bundle], receipt) == 6 == engine.policy_version
    second = tokens(engine)
    assert second != first
    deliver(channel, bundle, engine)  # the same version twice, as after an acknowledgement that was lost
    assert tokens(engine) == second
    deliver(channel, channel.send(7, weights[0].items()), engine)
    assert tokens(engine) == first


def test_the_figures_of_a_publication(engine, weights, any_channel):
    channel = any_channel
    bundle = channel.send(6, weights[1].items())
    figures = reduce(weight_metrics(bundle, [deliver(channel, bundle, engine), deliver(channel, bundle, engine)]))
    model_bytes = sum(tensor.nbytes for tensor in weights[1].values())
    assert figures["weights/bytes"] == model_bytes
    assert figures["weights/chunks"] == len(parcels_of(bundle))
    assert 1.0 <= figures["weights/overhead"] < 1.01
    assert all(0.0 < figures[f"weights/seconds_{stage}"] < 5.0 for stage in ("pack", "fetch", "load"))
    # A mean of seconds and a rate of sums: equal products for one engine, and for two that took the same.
    assert figures["weights/fetch_bytes_per_second"] * figures["weights/seconds_fetch"] == pytest.approx(model_bytes)


def changed(parcel: Parcel, change: Callable[[Chunk], Chunk]) -> Parcel:
    return replace(parcel, handle=change(parcel.handle))


def flip(chunk: Chunk) -> Chunk:
    octets = chunk.octets.copy()
    octets[len(octets) // 2] ^= 16
    return replace(chunk, octets=octets)


def cut(chunk: Chunk) -> Chunk:
    return replace(chunk, octets=chunk.octets[:-64])


TORN: dict[str, tuple[Callable[[Parcels, Parcels], Parcels], str]] = {
    "missing": (lambda new, old: new[:-1], "chunks of version 6 hold"),
    "missing within": (lambda new, old: [new[0], *new[2:]], "found chunk 2 of version 6 .* in the place of chunk 1"),
    "double": (lambda new, old: [new[0], new[0], *new[2:]], "found chunk 0 of version 6 .* in the place of chunk 1"),
    "one too many": (lambda new, old: [*new, new[-1]], "found chunk .* in the place of chunk"),
    "of another version": (
        lambda new, old: [new[0], replace(new[1], handle=old[1].handle), *new[2:]],
        "found chunk 1 of version 5 .* of version 6",
    ),
    "another version's content": (
        lambda new, old: [
            new[0],
            changed(new[1], lambda chunk: replace(chunk, octets=old[1].handle.octets)),
            *new[2:],
        ],
        "chunk 1 of version 6 .* was altered on its way",
    ),
    "flipped": (lambda new, old: [*new[:-1], changed(new[-1], flip)], "was altered on its way"),
    "cut off": (lambda new, old: [changed(new[0], cut), *new[1:]], "chunk 0 of version 6 is cut off"),
    "one tensor less": (
        lambda new, old: [changed(new[0], lambda chunk: replace(chunk, entries=chunk.entries[1:])), *new[1:]],
        "chunk 0 of version 6 .* was altered",
    ),
    "nothing": (lambda new, old: [], "the 0 chunks of version 6 hold 0 bytes"),
}


@pytest.mark.parametrize("case", TORN)
def test_a_torn_version_leaves_the_engine_as_it_was(engine, weights, channel, case):
    spoil, message = TORN[case]
    first = tokens(engine)
    whole, old = channel.send(6, weights[1].items()), channel.send(5, weights[0].items())
    torn = replace(whole, content=tuple(spoil(list(whole.content), list(old.content))))
    with pytest.raises(WeightSyncError, match=message):
        deliver(channel, torn, engine)
    assert engine.policy_version == 5
    assert tokens(engine) == first
    assert check_receipt(0, [whole], deliver(channel, whole, engine)) == 6


def test_an_altered_broadcast_leaves_the_engine_as_it_was(engine, weights):
    channel = broadcast()
    first = tokens(engine)
    whole = channel.send(6, weights[1].items())
    *others, last = whole.content.parcels
    torn = replace(last, fingerprint=replace(last.fingerprint, checksum=last.fingerprint.checksum ^ 1))
    with pytest.raises(WeightSyncError, match="of version 6 of the weights was altered on its way"):
        deliver(channel, replace(whole, content=replace(whole.content, parcels=(*others, torn))), engine)
    assert engine.policy_version == 5
    assert tokens(engine) == first
    assert check_receipt(0, [whole], deliver(channel, whole, engine)) == 6


def test_an_engine_serves_nothing_after_an_update_that_broke_off_while_loading(weights, channel, tmp_path):
    bundle: WeightsBundle = channel.send(6, weights[1].items())
    last = list(weights[1])[-1]
    without_data = {**weights[1], last: weights[1][last].to("meta")}
    with build(tmp_path) as engine:
        with pytest.raises(Exception, match="meta"):
            engine.update_weights(6, Delivery(tensors=list(without_data.items()), fingerprint=fingerprint([])))
        for use in (
            lambda: tokens(engine),
            lambda: engine.score([((1,), (2,))], 1),
            lambda: deliver(channel, bundle, engine),
        ):
            with pytest.raises(WeightSyncError, match=r"broke off halfway.* make it anew"):
                use()
        assert not engine.is_whole


def send_from_a_gpu(path: Path, bundles: Any, is_read: Any) -> None:
    """The learner's side of an IPC channel, in a process of its own; keeps the weights until they are read."""
    channel = IpcChannel()
    bundles.put(channel.send(6, [(name, tensor.cuda()) for name, tensor in load_file(path).items()]))
    assert is_read.wait(300)


@pytest.mark.gpu
def test_an_engine_reads_weights_from_the_memory_of_its_gpu(tmp_path):
    old, new = (make_tiny_model(tmp_path / str(seed), seed=seed, dtype="bfloat16") for seed in (0, 1))
    context = mp.get_context("spawn")
    bundles, is_read = context.Queue(), context.Event()
    sender = context.Process(target=send_from_a_gpu, args=(new / "model.safetensors", bundles, is_read))
    sender.start()
    rollout = RolloutConfig(max_new_tokens=8, max_num_seqs=8, kv_cache_bytes=64 * 1024**2, enforce_eager=True)
    parts = {"max_prompt_tokens": 8, "max_new_tokens": 8, "threads": 1, "seed": 0}
    with RolloutEngine(StudentConfig(model=str(new)), rollout, **parts) as engine:
        expected = tokens(engine)
    with RolloutEngine(StudentConfig(model=str(old)), rollout, **parts) as engine:
        assert tokens(engine) != expected
        bundle = bundles.get(timeout=300)
        with pytest.raises(WeightSyncError, match="altered on its way"):
            deliver(IpcChannel(), replace(bundle, checksum=bundle.checksum ^ 1), engine)
        with pytest.raises(WeightSyncError, match="broke off halfway"):
            deliver(IpcChannel(), bundle, engine)
    with RolloutEngine(StudentConfig(model=str(old)), rollout, **parts) as engine:
        assert check_receipt(0, [bundle], deliver(IpcChannel(), bundle, engine)) == 6
        assert tokens(engine) == expected
    is_read.set()
    sender.join(timeout=60)
    assert sender.exitcode == 0
