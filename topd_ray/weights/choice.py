"""The channel that the config names."""

from topd_ray.config.schema import WeightsConfig
from topd_ray.weights.channel import Channel
from topd_ray.weights.object_store import ObjectStore, ObjectStoreChannel


def open_channel(weights: WeightsConfig, store: ObjectStore) -> Channel:
    """One end of it; nothing is connected yet."""
    return ObjectStoreChannel(store, chunk_bytes=weights.chunk_bytes)
