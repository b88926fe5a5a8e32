"""What a checkpoint folder must hold: every file with its size and CRC-32, and which run it is of.

The CRC finds a flipped bit, or a file of another checkpoint; it is no signature. A core computes it at over 5 GB/s: the
disk decides what it costs.
"""

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FORMAT = 2
MANIFEST = "manifest.json"
READ_BYTES = 8 * 1024**2
SHOWN = 3

Identity = Mapping[str, Any]
"""What of a run its checkpoints belong to (`identity.run_identity`): flat, JSON only."""


def write_manifest(folder: Path, identity: Identity) -> None:
    """Write the manifest of all that lies in `folder`. Reads every file once, several at a time."""
    manifest = {"format": FORMAT, "identity": dict(identity), "files": _sums(folder, _sizes(folder))}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def fault(folder: Path, identity: Identity | None) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence that begins with its name; None if nothing.

    With an identity, a checkpoint of another one is wrong as well.
    """
    if not folder.is_dir():
        return "is not there"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        found = manifest.get("format", 1)
        if found != FORMAT:
            return (
                f"has the format {found}, this topd_ray reads {FORMAT}: end the run with the version that began it, "
                "or begin it again"
            )
        if torn := _torn(folder, manifest["files"]):
            return f"is torn: {_list(torn)}"
        return _foreign(manifest["identity"], identity) if identity is not None else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"cannot be read: {type(error).__name__}: {error}"


def _torn(folder: Path, written: dict[str, dict[str, Any]]) -> list[str]:
    sizes = _sizes(folder)
    torn = [f"{name} is missing" for name in written if name not in sizes]
    torn += [f"{name} does not belong there" for name in sizes if name not in written]
    torn += [
        f"{name} has {sizes[name]} bytes instead of {entry['bytes']}"
        for name, entry in written.items()
        if name in sizes and sizes[name] != entry["bytes"]
    ]
    if torn:  # without reading the rest
        return torn
    return [
        f"{name} has other content than was written (CRC-32 {entry['crc32']} instead of {written[name]['crc32']})"
        for name, entry in _sums(folder, sizes).items()
        if entry["crc32"] != written[name]["crc32"]
    ]


def _foreign(written: dict[str, Any], own: Identity) -> str | None:
    others = [
        f"{key} is {json.dumps(written.get(key))} there, {json.dumps(own.get(key))} in this run"
        for key in sorted({*written, *own})
        if written.get(key) != own.get(key)
    ]
    return f"is of another run: {_list(others)}" if others else None


def _list(findings: list[str]) -> str:
    more = f" and {len(findings) - SHOWN} more" if len(findings) > SHOWN else ""
    return "; ".join(findings[:SHOWN]) + more


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder`, the manifest itself excepted."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _sums(folder: Path, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        sums = pool.map(lambda name: _crc32(folder / name), sizes)
        return {
            name: {"bytes": size, "crc32": f"{total:08x}"}
            for (name, size), total in zip(sizes.items(), sums, strict=True)
        }


def _crc32(path: Path) -> int:
    """Of a file's content; other threads run meanwhile."""
    total, buffer = 0, memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total = zlib.crc32(buffer[:count], total)
    return total
