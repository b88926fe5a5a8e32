"""What every test shares: no model hub, one thread per process, tests of GPUs and of hosts only where there are any."""

import os
import sys
from collections.abc import Callable

import pytest
from hypothesis import settings

from tests import lan
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
    skip(items, "gpu", why_no_gpu)
    if os.environ.get("TOPD_REQUIRE_LAN") != "1":
        skip(items, "lan", lan.missing)


def skip(items: list[pytest.Item], marker: str, why_not: Callable[[], str | None]) -> None:
    """Skip the items that are marked, if there is a reason."""
    marked = [item for item in items if item.get_closest_marker(marker)]
    if marked and (reason := why_not()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def why_no_gpu() -> str | None:
    if not machine.list_gpus():
        return "needs an NVIDIA GPU, nvidia-smi lists none"
    if machine.installed_device() != "gpu":
        return "needs the GPU packages: make setup DEVICE=gpu"
    return None
