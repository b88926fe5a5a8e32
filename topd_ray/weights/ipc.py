"""Weights within one GPU: the engine reads them where the learner has put them, through vLLM's CUDA IPC engine.

Written against vLLM 0.32's `distributed/weight_transfer/ipc_engine.py`; seen on one H200 (tests/system/test_gpu.py).
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from topd_ray.weights.bundle import IpcDelivery, Named, WeightsBundle, timed
from topd_ray.weights.checksum import fingerprint


class IpcChannel:
    """One learner rank and rollout engines that share its GPU, all in processes of their own.

    The learner keeps a copy of the policy in the rollout's dtype on the GPU, which `send` overwrites: no engine may be
    reading by then. Its handles are made once. Torch expects each to be opened by one process once, and would never
    free what others open as well, or none does. Unlike the chunks of an object store, the weights are checked while
    they load: after altered ones the engine refuses to generate.
    """

    staging_device = "cuda"

    def __init__(self) -> None:
        self._staged: dict[str, torch.Tensor] = {}
        self._handles: list[Mapping[str, Any]] = []

    def send(self, version: int, tensors: Iterable[Named]) -> WeightsBundle:
        """Copy `tensors`, the same ones for every version, to where the engines can read them."""
        started = time.perf_counter()
        if self._staged:
            for name, tensor in tensors:
                self._staged[name].copy_(tensor)
        else:
            self._staged = {name: tensor.contiguous() for name, tensor in tensors}
            self._handles = [gpu_handle(tensor) for tensor in self._staged.values()]
        packed = fingerprint(self._staged.items())
        torch.cuda.synchronize()
        return WeightsBundle(
            version=version,
            num_bytes=packed.num_bytes,
            checksum=packed.checksum,
            content=update_fields(list(self._staged.items()), self._handles),
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


def gpu_handle(tensor: torch.Tensor) -> dict[str, Any]:
    """What another process opens the memory of `tensor` with, by the GPU it is on.

    The other process waits for no event of torch's: whoever passes the handle on has waited for the tensor.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    _, (*arguments, _waits_for_event) = reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    gpu = str(torch.cuda.get_device_properties(tensor.device).uuid)
    return {gpu: (*arguments, False)}


def update_fields(tensors: Sequence[Named], handles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of vLLM's IPCWeightTransferUpdateInfo, a handle by GPU for each tensor."""
    return {
        "names": [name for name, _ in tensors],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        "shapes": [list(tensor.shape) for _, tensor in tensors],
        "ipc_handles": [dict(handle) for handle in handles],
    }
