"""The channel that the config names."""

from topd_ray.config.schema import WeightsConfig
from topd_ray.errors import ConfigError
from topd_ray.weights.channel import Channel
from topd_ray.weights.ipc import IpcChannel
from topd_ray.weights.object_store import ObjectStore, ObjectStoreChannel


def open_channel(weights: WeightsConfig, store: ObjectStore) -> Channel:
    """One end of it; nothing is connected yet. Raises ConfigError for ipc inside one process."""
    if weights.channel == "ipc":
        if not store.spans_processes:
            raise ConfigError("weights.channel: found ipc with --inline; right would be object_store in one process")
        return IpcChannel()
    return ObjectStoreChannel(store, chunk_bytes=weights.chunk_bytes)
