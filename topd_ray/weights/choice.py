"""The channel that the config names."""

import torch

from topd_ray.config.schema import WeightsConfig
from topd_ray.errors import ConfigError
from topd_ray.weights.broadcast import BroadcastChannel
from topd_ray.weights.channel import Channel
from topd_ray.weights.ipc import IpcChannel
from topd_ray.weights.object_store import ObjectStore, ObjectStoreChannel


def open_channel(weights: WeightsConfig, store: ObjectStore, *, num_workers: int = 1) -> Channel:
    """One end of it, for `num_workers` rollout workers in all; nothing is connected yet.

    Raises ConfigError inside one process for a channel between processes.
    """
    if weights.channel != "object_store" and not store.spans_processes:
        raise ConfigError(
            f"weights.channel: found {weights.channel} with --inline; right would be object_store in one process"
        )
    if weights.channel == "ipc":
        return IpcChannel()
    if weights.channel == "broadcast":
        return BroadcastChannel(
            backend="nccl" if torch.cuda.is_available() else "gloo",
            address=store.node_address(),
            num_workers=num_workers,
            chunk_bytes=weights.chunk_bytes,
            timeout_seconds=weights.timeout_seconds,
        )
    return ObjectStoreChannel(store, chunk_bytes=weights.chunk_bytes)
