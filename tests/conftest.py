"""What every test shares: no model hub, one thread per process, GPU tests only where there is a GPU."""

import os
import sys

import pytest
from hypothesis import settings

from topd_ray.doctor import machine

# Read when torch, Ray and the hub client are imported, also by Ray's workers, which inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(1)

settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    if not machine.list_gpus():
        reason = "needs an NVIDIA GPU, nvidia-smi lists none"
    elif machine.installed_device() != "gpu":
        reason = "needs the GPU packages: make setup DEVICE=gpu"
    else:
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))
