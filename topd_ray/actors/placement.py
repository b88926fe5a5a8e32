"""What each worker needs, whether the machine or the cluster has it, and where the actors go."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group

from topd_ray.actors.parts import threads
from topd_ray.config.model_folder import inspect_folder, is_local
from topd_ray.config.schema import ModelConfig, TopdConfig
from topd_ray.errors import ConfigError

PLACEMENT_TIMEOUT_SECONDS = 60.0
PROCESS_BYTES = 800 * 2**20
"""Resident memory of a worker before its model is loaded: Python, torch, vLLM or DeepSpeed."""
DEFAULT_KV_BYTES = 2**30
"""What the engines take on CPUs where kv_cache_bytes is unset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one actor asks Ray for."""

    role: str
    index: int
    num_cpus: int
    num_gpus: float

    @property
    def bundle(self) -> dict[str, float]:
        gpus = {"GPU": self.num_gpus} if self.num_gpus else {}
        return {"CPU": float(self.num_cpus), **gpus}

    def __str__(self) -> str:
        return f"{self.role} {self.index}: {self.num_cpus} CPU, {self.num_gpus:g} GPU"


def needs(config: TopdConfig, *, num_gpus: int) -> list[Need]:
    """One entry per rollout worker, teacher worker and learner rank, in this order.

    `num_gpus` is what there is. Fewer GPUs than workers are shared out evenly, unless resources.* or
    tensor_parallel_size say otherwise; the engines' kv_cache_bytes must then leave room for each other.
    """
    counts = {
        "rollout": (config.rollout.num_workers, config.rollout.tensor_parallel_size),
        "teacher": (config.teacher.num_workers, config.teacher.tensor_parallel_size),
        "learner": (config.learner.num_ranks, 1),
    }
    num_workers = sum(count for count, _ in counts.values())
    spreads = any(tensor_parallel > 1 for _, tensor_parallel in counts.values())
    share = num_gpus / num_workers if num_gpus < num_workers and not spreads else 1.0
    found = []
    for role, (count, tensor_parallel) in counts.items():
        asked: float | None = getattr(config.resources, f"gpus_per_{role}")
        unasked = tensor_parallel * share if num_gpus else 0.0
        found += [
            Need(
                role=role,
                index=index,
                num_cpus=threads(config, role),
                num_gpus=unasked if asked is None else asked,
            )
            for index in range(count)
        ]
    return found


def check_local_fit(config: TopdConfig, *, num_cores: int, num_gpus: int) -> None:
    """Raise ConfigError if a synchronous run does not fit this machine.

    Rollout and teacher workers run at the same time, the learner ranks after them, so they share the cores; GPUs are
    held for the whole run. Memory is counted where the engines live in it, on a machine without GPUs.
    """
    wanted = needs(config, num_gpus=num_gpus)
    writing = sum(need.num_cpus for need in wanted if need.role != "learner")
    learning = sum(need.num_cpus for need in wanted if need.role == "learner")
    gpus = sum(need.num_gpus for need in wanted)
    problems = []
    if max(writing, learning) > num_cores:
        problems.append(f"{max(writing, learning)} threads at once, of {num_cores} cores")
    if gpus > num_gpus + 1e-6:
        problems.append(f"{gpus:g} GPUs, of {num_gpus}")
    needed, available = cpu_memory(config), psutil.virtual_memory().available
    if num_gpus == 0 and needed > available:
        problems.append(f"{needed / 2**30:.1f} GiB of memory, of {available / 2**30:.1f} GiB available")
    if problems:
        listed = "; ".join(str(need) for need in wanted)
        raise ConfigError(
            f"the run needs {' and '.join(problems)} ({listed}): lower num_workers, num_ranks, tensor_parallel_size, "
            "kv_cache_bytes or resources.*, or give the address of a cluster in resources.ray_address"
        )


def cpu_memory(config: TopdConfig) -> int:
    """Bytes the workers need at least on a machine without GPUs: processes, caches, weights, optimiser states.

    A learner keeps parameters, gradients and two moments in float32. Models of unknown size (hub names) count as
    nothing.
    """
    num_bytes = config.learner.num_ranks * (PROCESS_BYTES + 16 * _num_parameters(config.student))
    for model, num_workers, kv_cache_bytes in (
        (config.student, config.rollout.num_workers, config.rollout.kv_cache_bytes),
        (config.teacher, config.teacher.num_workers, config.teacher.kv_cache_bytes),
    ):
        weights = _num_parameters(model) * (4 if model.dtype == "float32" else 2)
        num_bytes += num_workers * (PROCESS_BYTES + (kv_cache_bytes or DEFAULT_KV_BYTES) + weights)
    return num_bytes + (config.resources.object_store_bytes or 0)


def _num_parameters(model: ModelConfig) -> int:
    if not is_local(model.model):
        return 0
    facts, _ = inspect_folder(Path(model.model).expanduser())
    return facts.num_parameters or 0


def local_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def reserve(wanted: list[Need]) -> PlacementGroup:
    """Reserve room for all workers at once. Raises ConfigError, saying what is missing, if the cluster has it not."""
    total = ray.cluster_resources()
    for kind in ("CPU", "GPU"):
        asked = sum(need.bundle.get(kind, 0.0) for need in wanted)
        if asked > total.get(kind, 0.0):
            raise ConfigError(
                f"the run needs {asked:g} {kind}s, the Ray cluster has {total.get(kind, 0.0):g} "
                f"({'; '.join(str(need) for need in wanted)})"
            )
    group = placement_group([need.bundle for need in wanted], strategy="PACK")
    try:
        ray.get(group.ready(), timeout=PLACEMENT_TIMEOUT_SECONDS)
    except GetTimeoutError:
        available = {kind: ray.available_resources().get(kind, 0.0) for kind in ("CPU", "GPU")}
        raise ConfigError(
            f"the Ray cluster did not have room for the workers within {PLACEMENT_TIMEOUT_SECONDS:g} s: free are "
            f"{available}, needed are {'; '.join(str(need) for need in wanted)}, each on one node"
        ) from None
    return group
