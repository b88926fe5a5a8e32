"""Weights within one GPU: the engine reads them where the learner has put them, through vLLM's CUDA IPC engine.

Written against vLLM 0.32's `distributed/weight_transfer/ipc_engine.py`. It has not run on a GPU yet.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from topd_ray.weights.bundle import IpcDelivery, Named, WeightsBundle, timed
from topd_ray.weights.checksum import fingerprint


class IpcChannel:
    """One learner rank and rollout engines that share its GPU, all in processes of their own.

    The learner keeps a copy of the policy in the rollout's dtype on the GPU, from one `send` to the next: engines may
    read it until then, and all of them must have acknowledged a version before the next is sent. Unlike the chunks of
    an object store, the weights are checked while they load: after altered ones the engine refuses to generate.
    """

    staging_device = "cuda"

    def __init__(self) -> None:
        self._staged: list[Named] = []

    def send(self, version: int, tensors: Iterable[Named]) -> WeightsBundle:
        """Copy `tensors` to where the engines can read them."""
        from torch.multiprocessing.reductions import reduce_tensor

        started = time.perf_counter()
        self._staged = []
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]  # what no engine reads any longer
        self._staged = [(name, tensor.contiguous()) for name, tensor in tensors]
        packed = fingerprint(self._staged)
        torch.cuda.synchronize()
        gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handles = [{gpu: reduce_tensor(tensor)[1]} for _, tensor in self._staged]  # type: ignore[no-untyped-call]
        return WeightsBundle(
            version=version,
            num_bytes=packed.num_bytes,
            checksum=packed.checksum,
            content=update_fields(self._staged, handles),
            metrics=timed("pack", time.perf_counter() - started),
        )

    def fetch(self, bundle: WeightsBundle) -> IpcDelivery:
        """Where they are: there is nothing to fetch."""
        fields: Mapping[str, Any] = bundle.content
        return IpcDelivery(
            shapes={name: tuple(shape) for name, shape in zip(fields["names"], fields["shapes"], strict=True)},
            fields=fields,
            expected=(bundle.num_bytes, bundle.checksum),
        )


def update_fields(tensors: Sequence[Named], handles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of vLLM's IPCWeightTransferUpdateInfo, a handle by GPU for each tensor."""
    return {
        "names": [name for name, _ in tensors],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        "shapes": [list(tensor.shape) for _, tensor in tensors],
        "ipc_handles": [dict(handle) for handle in handles],
    }
