"""Where a figure comes from: the commit of the source, and the machine."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

UNKNOWN = "unknown"
"""Stands for a commit that was not kept, or outside of a git checkout."""


def commit() -> str | None:
    """The commit of the source that runs, with a plus if it was changed since; None outside of a git checkout."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "topd_ray") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """Processor, usable cores, load of the last minute, and GPU (None without one)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
