"""Weights through CUDA IPC and by broadcast: where they are refused, and what vLLM is told."""

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore
from torch.multiprocessing import reductions
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

from topd_ray.actors.store import LocalStore, RayStore
from topd_ray.config.contradictions import contradictions
from topd_ray.config.schema import ResourcesConfig, TopdConfig, WeightsConfig
from topd_ray.errors import ConfigError, WeightSyncError
from topd_ray.weights import ipc
from topd_ray.weights.bundle import Named
from topd_ray.weights.checksum import fingerprint
from topd_ray.weights.choice import open_channel
from topd_ray.weights.group import Group
from topd_ray.weights.ipc import IpcChannel, update_fields
from topd_ray.weights.object_store import ObjectStoreChannel
from topd_ray.weights.rounds import Sender

SHARED = {"gpus_per_learner": 0.5, "gpus_per_rollout": 0.25}


def refusals(resources: dict[str, Any], channel: str = "ipc", **sections: dict[str, Any]) -> list[str]:
    config = TopdConfig.model_validate({"student": {"model": "s"}, "teacher": {"model": "t"}, **sections})
    changed = {"weights": WeightsConfig(channel=channel), "resources": ResourcesConfig(**resources)}
    return [one.text for one in contradictions(config.model_copy(update=changed)) if "weights.channel" in one.keys]


def test_roles_that_share_a_gpu_are_let_through() -> None:
    assert refusals(SHARED) == []
    assert refusals(SHARED, rollout={"num_workers": 2}) == []


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({}, "ipc with unset GPUs for a learner rank and unset for each of 1"),
        ({"gpus_per_learner": 0.0, "gpus_per_rollout": 0.0}, "ipc with 0 GPUs for a learner rank and 0"),
        ({"gpus_per_learner": 1.0, "gpus_per_rollout": 1.0}, "ipc with 1 GPUs for a learner rank and 1"),
    ],
)
def test_roles_without_a_gpu_or_on_different_ones_are_refused(resources: dict[str, Any], message: str) -> None:
    (text,) = refusals(resources)
    assert message in text and "right would be shares of one GPU" in text


def test_more_than_one_gpu_holds_is_refused() -> None:
    (text,) = refusals(SHARED, rollout={"num_workers": 3})
    assert "0.25 for each of 3 rollout workers" in text
    (text,) = refusals(SHARED, learner={"num_ranks": 2})
    assert "2 learner ranks" in text


def test_a_learner_that_may_be_ahead_is_refused() -> None:
    (text,) = refusals(SHARED, pipeline={"max_staleness": 1})
    assert text.startswith("found ipc with max_staleness 1") and "right would be max_staleness 0" in text


@pytest.mark.parametrize("num_gpus", [0.0, 1.0, 2.0])
def test_a_broadcast_between_cpus_or_whole_gpus_is_let_through(num_gpus: float) -> None:
    assert refusals({"gpus_per_learner": num_gpus, "gpus_per_rollout": num_gpus}, "broadcast") == []


@pytest.mark.parametrize(
    ("learner", "rollout", "shown"),
    [
        (None, None, "unset GPUs for a learner rank and unset for a rollout worker"),
        (0.0, 1.0, "0 GPUs for a learner rank and 1 for"),
        (1.0, 0.0, "1 GPUs for a learner rank and 0 for"),
        (1.0, 0.5, "1 GPUs for a learner rank and 0.5 for"),
        (0.0, None, "0 GPUs for a learner rank and unset for"),
    ],
)
def test_a_broadcast_between_other_places_is_refused(learner: float | None, rollout: float | None, shown: str) -> None:
    (text,) = refusals({"gpus_per_learner": learner, "gpus_per_rollout": rollout}, "broadcast")
    assert text.startswith(f"found broadcast with {shown}")
    assert "right would be 0 and 0, or at least 1 and 1, or object_store" in text


@pytest.mark.parametrize("channel", ["ipc", "broadcast"])
def test_one_process_is_refused_before_anything_loads(channel: str) -> None:
    with pytest.raises(ConfigError, match=f"found {channel} with --inline; right would be object_store"):
        open_channel(WeightsConfig.model_validate({"channel": channel}), LocalStore())
    assert isinstance(open_channel(WeightsConfig(channel="ipc"), RayStore()), IpcChannel)
    assert isinstance(open_channel(WeightsConfig(), LocalStore()), ObjectStoreChannel)


def test_a_version_is_written_over_the_last_one_and_its_handles_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(ipc, "gpu_handle", lambda tensor: {"GPU-1": tensor})
    learner = IpcChannel()

    def tensors(version: int) -> list[Named]:
        return [("a", torch.full((2, 3), float(version))), ("b", torch.arange(4) + version)]

    bundles = [learner.send(version, iter(tensors(version))) for version in (1, 2, 3)]
    assert [one.checksum for one in bundles] == [fingerprint(tensors(version)).checksum for version in (1, 2, 3)]
    read = [[handle["GPU-1"] for handle in one.content["ipc_handles"]] for one in bundles]
    assert [tensor.tolist() for tensor in read[0]] == [[[3.0] * 3] * 2, [3, 4, 5, 6]]
    assert all(one is other for later in read[1:] for one, other in zip(read[0], later, strict=True))


def test_a_handle_makes_nobody_wait_for_its_first_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(reductions, "reduce_tensor", lambda tensor: (None, ("where", b"event", True)))
    assert ipc.gpu_handle(torch.zeros(1)) == {"GPU-1": ("where", b"event", False)}


def test_a_group_over_nccl_without_a_gpu_says_so() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="through NCCL, and this process sees no GPU"):
            Group("nccl", HashStore(), rank=0, size=1, address="", seconds=1.0)


def test_a_member_that_does_not_come_is_noticed_before_the_group_is_made() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)wait timeout"):
        Group("gloo", HashStore(), rank=0, size=2, address="127.0.0.1", seconds=0.5)
    assert 0.5 <= time.monotonic() - started < 5.0


def test_vllm_takes_what_it_is_told() -> None:
    tensors = [("a", torch.zeros(2, 3, dtype=torch.bfloat16)), ("b", torch.zeros(5))]
    handles = [{"GPU-1": ("a handle",)}, {"GPU-1": ("another",)}]
    info = IPCWeightTransferUpdateInfo(**update_fields(tensors, handles))
    assert (info.names, info.dtype_names, info.shapes) == (["a", "b"], ["bfloat16", "float32"], [[2, 3], [5]])
    assert info.ipc_handles == handles
    with pytest.raises(ValueError, match="`ipc_handles` should be of the same size"):
        IPCWeightTransferUpdateInfo(**update_fields(tensors, handles[:1]))


def test_the_senders_thread_ends_with_it_and_before_the_interpreter() -> None:
    """In the store while the interpreter goes, it would abort the process."""
    sender = Sender(address="127.0.0.1", backend="gloo", num_workers=1, timeout_seconds=10.0)
    sender.close()
    with pytest.raises(WeightSyncError, match="the thread that sends the weights"):
        sender.offer(1, [])
    script = """
import atexit, threading
atexit.register(lambda: print([one.name for one in threading.enumerate() if one.name == "broadcast-weights"]))
from topd_ray.weights.rounds import Sender
Sender(address="127.0.0.1", backend="gloo", num_workers=1, timeout_seconds=10.0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
