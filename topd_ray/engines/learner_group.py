"""How a learner rank finds its device and the other ranks. Imports no DeepSpeed."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from topd_ray.errors import LearnerError


def own_device() -> torch.device:
    if os.environ["DS_ACCELERATOR"] != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def meet(device: torch.device, rank: int, world_size: int, init_method: str | None, timeout_seconds: float) -> None:
    """Make the process group, or take the one that is there (an inference engine in this process has made it)."""
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
            raise LearnerError(
                f"this process is rank {dist.get_rank()} of {dist.get_world_size()} already, "
                f"and cannot be rank {rank} of {world_size} of the learner as well: give the learner its own process"
            )
        return
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_seconds)
    if world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    elif init_method is None:
        raise LearnerError(f"{world_size} ranks cannot meet without an init_method, say tcp://host:port")
    else:
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
