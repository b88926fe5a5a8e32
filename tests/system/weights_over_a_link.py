"""Publishes versions from one node to engines on another, and prints what crossed the link (a program for tests)."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
import torch

from topd_ray.actors.store import RayStore
from topd_ray.weights.bundle import Delivery, Named, WeightsBundle
from topd_ray.weights.checksum import WeightReceipt
from topd_ray.weights.object_store import ObjectStoreChannel

CHUNK_BYTES = 4 * 2**20
TENSOR_BYTES = 2**20


class Taker:
    """An engine that takes everything it is given."""

    policy_version = 0

    def update_weights(self, version: int, tensors: Iterable[Named] | Delivery) -> WeightReceipt:
        self.policy_version = version
        return WeightReceipt.of(version, Delivery.of(tensors).fingerprint)


class Worker:
    """A learner or a rollout worker, as far as its channel goes."""

    def __init__(self) -> None:
        self._channel = ObjectStoreChannel(RayStore(), chunk_bytes=CHUNK_BYTES)
        self._engine = Taker()

    def pack(self, version: int, num_tensors: int) -> WeightsBundle:
        return self._channel.send(version, self._tensors(version, num_tensors))

    def update(self, bundle: WeightsBundle) -> WeightReceipt:
        return self._engine.update_weights(bundle.version, self._channel.fetch(bundle))

    def received(self) -> int:
        """Bytes that this node's cable has brought so far."""
        (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if "eth0:" in line]
        return int(line.split(":")[1].split()[0])

    @staticmethod
    def _tensors(version: int, num_tensors: int) -> Iterator[Named]:
        generator = torch.Generator().manual_seed(version)
        for index in range(num_tensors):
            octets = torch.randint(0, 256, (TENSOR_BYTES,), dtype=torch.uint8, generator=generator)
            yield f"layer.{index}", octets.view(torch.bfloat16)


def main(num_tensors: int, num_versions: int) -> None:
    ray.init(address="auto", log_to_driver=False)

    def on(role: str) -> Any:
        return ray.remote(Worker).options(num_cpus=0, label_selector={"topd/role": role}).remote()

    learner, workers = on("learner"), [on("rollout"), on("rollout")]
    ray.get([worker.received.remote() for worker in [learner, *workers]])  # all are there
    versions = []
    for version in range(1, num_versions + 1):
        bundle = ray.get(learner.pack.remote(version, num_tensors))
        before, started = ray.get(workers[0].received.remote()), time.perf_counter()
        receipts = ray.get([worker.update.remote(bundle) for worker in workers])
        seconds = time.perf_counter() - started
        versions.append(
            {
                "model_bytes": bundle.num_bytes,
                "chunks": len(bundle.content),
                "link_bytes": ray.get(workers[0].received.remote()) - before,
                "seconds": seconds,
                "agree": all((one.version, one.checksum) == (version, bundle.checksum) for one in receipts),
            }
        )
    again = ray.get(on("rollout").update.remote(bundle))  # a worker that is made anew
    print(json.dumps({"versions": versions, "anew": [again.version, again.checksum == bundle.checksum]}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
