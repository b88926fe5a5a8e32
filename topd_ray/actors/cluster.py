"""Joining a Ray cluster, or starting one on this machine for one run."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import ray
import torch
from ray.exceptions import AuthenticationError

from topd_ray.actors.placement import needs
from topd_ray.actors.prometheus import scrape_address
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import ConfigError

KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_TRIM_THRESHOLD_": str(1024**3),
    "MALLOC_TOP_PAD_": str(64 * 1024**2),
}
"""For glibc's malloc, which takes no larger first threshold. What the driver's environment says comes first."""
NUM_TRIES = 3
"""To start Ray on this machine."""
TOKEN_ADVICE = (
    "right would be RAY_AUTH_MODE=token and the cluster's own token in RAY_AUTH_TOKEN, in the file that "
    "RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
)


def cluster_address(config: TopdConfig) -> str | None:
    """Address of the Ray cluster to join; None to start one on this machine."""
    return config.resources.ray_address or os.environ.get("RAY_ADDRESS")


def check_run_folder(folder: Path) -> None:
    """Raise ConfigError for a run folder inside the copy of the working directory that Ray makes for a job."""
    if "runtime_resources" in folder.absolute().parts:
        raise ConfigError(
            f"run.root: found {folder.parent}, which is {folder.parent.absolute()}, Ray's own temporary copy of the "
            "job's working directory; right would be an absolute path on a disk that all nodes share"
        )


def start_ray(config: TopdConfig, say: Callable[[str], None] = lambda line: None) -> None:
    """Join the cluster that is named, or start one on this machine. `say` hears of tries that fail.

    A local cluster counts the workers' threads as its CPUs: writing and learning take turns on the same cores.
    Raises ConfigError if this machine is too busy, or if the cluster does not answer, does not take the token, has
    another version of Ray, or exports no metrics though the config asks for them.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    address = cluster_address(config)
    if address is not None:
        _join(address)
    else:
        _start_here(config, say)
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)
    if config.metrics.prometheus:
        scrape_address()


def _start_here(config: TopdConfig, say: Callable[[str], None]) -> None:
    num_gpus = torch.cuda.device_count()
    num_cpus = sum(need.num_cpus for need in needs(config, num_gpus=num_gpus))
    for number in range(1, NUM_TRIES + 1):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                object_store_memory=config.resources.object_store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:
            if type(error) is not Exception:  # Ray has no other class for processes that are not up in time
                raise
            say(f"Ray did not start on this machine, try {number} of {NUM_TRIES}: {error}")
            ray.shutdown()
    raise ConfigError(
        f"Ray did not start on this machine in {NUM_TRIES} tries, as if it were too busy: its processes have half a "
        "minute each time; right would be to try when less is running, or the address of a cluster that runs already "
        "in resources.ray_address (docs/clusters.md). What hindered it is in /tmp/ray/session_latest/logs"
    )


def _join(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except AuthenticationError as error:
        raise ConfigError(f"the Ray cluster at {address} does not take the token: {error}; {TOKEN_ADVICE}") from error
    except ConnectionError as error:  # all that Ray raises where the token is another one; it logs the reason
        raise ConfigError(
            f"the Ray cluster at {address} does not answer, or does not take the token: {error}; {TOKEN_ADVICE}"
        ) from error
    except RuntimeError as error:  # another version of Ray or Python
        raise ConfigError(f"the Ray cluster at {address} cannot be joined: {error}") from error


def worker_environment(num_threads: int, *, on_cpu: bool) -> dict[str, str]:
    """Environment of an actor: its threads, a hub as offline as the driver's, and on a CPU no GPU in sight.

    Ray leaves all GPUs visible to an actor that asks for none. glibc gives freed tensors back to the system and faults
    their pages in again for the next ones: keeping them made steps on the embedded pair about 7 % shorter.
    """
    inherited = ("HF_HUB_OFFLINE", "HF_HOME", "TRANSFORMERS_OFFLINE")
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        **(_cpu_environment() if on_cpu else {}),
        **{name: os.environ[name] for name in inherited if name in os.environ},
    }


def _cpu_environment() -> dict[str, str]:
    allocation = {name: os.environ.get(name, value) for name, value in KEEP_FREED_MEMORY.items()}
    return {"CUDA_VISIBLE_DEVICES": "", **allocation}
