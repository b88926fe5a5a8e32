"""What each worker needs, whether this machine has it, and where the actors go."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group

from topd_ray.actors.parts import threads
from topd_ray.actors.room import Need, Node, shortage
from topd_ray.config.contradictions import contradictions_of_shares
from topd_ray.config.model_folder import inspect_folder, is_local
from topd_ray.config.schema import ModelConfig, TopdConfig
from topd_ray.errors import ConfigError

PLACEMENT_TIMEOUT_SECONDS = 60.0
POLL_SECONDS = 0.5
PROCESS_BYTES = 800 * 2**20
"""Resident memory of a worker before its model is loaded: Python, torch, vLLM or DeepSpeed."""
DEFAULT_KV_BYTES = 2**30
"""What the engines take on CPUs where kv_cache_bytes is unset."""


def cluster_nodes() -> list[Node]:
    """The nodes that are alive."""
    return [
        Node(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            resources=node["Resources"],
            labels=node.get("Labels") or {},
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def needs(config: TopdConfig, *, num_gpus: int) -> list[Need]:
    """One entry per rollout worker, teacher worker and learner rank, in this order, but those bound to labels first.

    Ray fills nodes in the order of the entries, and others would take the only nodes that these may use.
    `num_gpus` is what there is. Where it is less than one for each worker, each GPU is shared by as few as can be,
    unless resources.* or tensor_parallel_size say otherwise; kv_cache_bytes must then leave room for each other. Raises
    ConfigError for what cannot share a GPU.
    """
    counts = {
        "rollout": (config.rollout.num_workers, config.rollout.tensor_parallel_size),
        "teacher": (config.teacher.num_workers, config.teacher.tensor_parallel_size),
        "learner": (config.learner.num_ranks, 1),
    }
    num_workers = sum(count for count, _ in counts.values())
    spreads = any(tensor_parallel > 1 for _, tensor_parallel in counts.values())
    share = 1 / math.ceil(num_workers / num_gpus) if num_gpus and not spreads else 1.0
    num_gpus_of = {}
    for role, (_, tensor_parallel) in counts.items():
        asked: float | None = getattr(config.resources, f"gpus_per_{role}")
        unasked = tensor_parallel * share if num_gpus else 0.0
        num_gpus_of[role] = unasked if asked is None else asked
    _check_sharing(config, num_gpus, num_gpus_of)
    found = [
        Need(
            role=role,
            index=index,
            num_cpus=threads(config, role),
            num_gpus=num_gpus_of[role],
            labels=getattr(config.resources, f"{role}_nodes"),
        )
        for role, (count, _) in counts.items()
        for index in range(count)
    ]
    return sorted(found, key=lambda need: not need.labels)


def with_gpus_of(config: TopdConfig, wanted: Sequence[Need]) -> TopdConfig:
    """The config with the GPUs that `needs` has found, so that these stay what they are whatever the cluster loses."""
    num_gpus = {f"gpus_per_{need.role}": need.num_gpus for need in wanted}
    return config.model_copy(update={"resources": config.resources.model_copy(update=num_gpus)})


def _check_sharing(config: TopdConfig, num_gpus: int, num_gpus_of: Mapping[str, float]) -> None:
    """Raise ConfigError for workers of which each gets `num_gpus_of` its role and that cannot share GPUs."""
    if config.weights.channel == "ipc" and num_gpus != 1:  # shares do not say of which GPU
        raise ConfigError(
            f"weights.channel: found ipc where Ray has {num_gpus} GPUs; right would be exactly one GPU, so that the "
            "learner and all rollout workers are sure to be on it (CUDA_VISIBLE_DEVICES), or object_store"
        )
    decided = {f"gpus_per_{role}": amount for role, amount in num_gpus_of.items()}
    resources = config.resources.model_copy(update=decided)
    for one in contradictions_of_shares(config.model_copy(update={"resources": resources})):
        raise ConfigError(f"with {num_gpus} GPUs: {', '.join(one.keys)}: {one.text}")


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
    if config.learner.loss_kernel == "triton" and any(need.role == "learner" and not need.num_gpus for need in wanted):
        raise ConfigError("learner.loss_kernel: found triton, and no GPU for the learner; right would be torch")
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


def reserve(
    wanted: Sequence[Need],
    nodes: Sequence[Node],
    *,
    wait_seconds: float,
    check_interrupt: Callable[[], None],
    say: Callable[[str], None] = lambda line: None,
) -> PlacementGroup:
    """Reserve room for all workers at once. `say` hears what is waited for.

    Raises ConfigError, saying what is missing, if the nodes there are cannot hold them (unless more may come within
    `wait_seconds`), or do not become free in time.
    """
    missing = shortage(wanted, nodes)
    if missing and not wait_seconds:
        raise ConfigError(
            f"the Ray cluster is too small: {'; '.join(missing)}. Its nodes: {'; '.join(map(str, nodes))}. Lower "
            "num_workers, num_ranks or resources.*, or let resources.wait_seconds wait for nodes that are coming"
        )
    group = placement_group(
        [need.bundle for need in wanted],
        strategy="PACK",
        bundle_label_selector=[dict(need.labels) for need in wanted],
    )
    timeout = max(wait_seconds, PLACEMENT_TIMEOUT_SECONDS)
    if missing:
        say(f"waiting up to {timeout:g} s for nodes: {'; '.join(missing)}")
    deadline = time.monotonic() + timeout
    while not group.wait(POLL_SECONDS):
        check_interrupt()
        if time.monotonic() > deadline:
            free = {kind: ray.available_resources().get(kind, 0.0) for kind in ("CPU", "GPU")}
            lacks = "".join(f"{line}; " for line in shortage(wanted, cluster_nodes()))
            raise ConfigError(
                f"the Ray cluster did not have room for the workers within {timeout:g} s: {lacks}free are "
                f"{free['CPU']:g} CPU and {free['GPU']:g} GPU, needed are {'; '.join(map(str, wanted))}, each on one "
                "node"
            )
    return group
