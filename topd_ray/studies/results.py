"""A study's folder: `results.json` with all its figures, pictures beside it, raw rows and `config.yaml`.

results.json is meant to be committed: docs/results.md is made from it, and from nothing else.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from topd_ray.actors.node_facts import versions
from topd_ray.config.load import dump_config, load_config
from topd_ray.config.schema import ModelConfig, TopdConfig
from topd_ray.errors import ConfigError
from topd_ray.pipeline.checkpoint import write_whole
from topd_ray.provenance import commit, machine
from topd_ray.studies.tables import Table

RESULTS = "results.json"
CONFIG = "config.yaml"
OWNER = "owner.json"
DIGESTED_BYTES = 1024**2
SHOWN_DIFFERENCES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a study found. Everything is plain JSON."""

    study: str
    """`probe`, `local-correction`, `ablation`, `sweep`"""
    command: str
    """what repeats it, without paths of a machine"""
    seeds: Sequence[int]
    seconds: float
    """of the study's work, all sessions"""
    commits: Collection[str]
    """of the source that made the rows or runs: those of earlier sessions stay, whatever has changed since"""
    figures: Mapping[str, Any]
    """by name; one with an interval is {"value", "low", "high", "n"} (see statistics.Interval)"""
    tables: Sequence[Table] = ()
    """the figures to read"""
    pictures: Sequence[str] = ()
    """file names beside results.json"""
    notes: Sequence[str] = ()
    """what could not be computed, and why"""
    config: str
    """the resolved config as YAML"""


def claim_folder(folder: Path, study: str, config: TopdConfig, ignore: Sequence[str] = ()) -> None:
    """Make `folder` this study's with this config and these models, or go on in it.

    Raises ConfigError where it is another's, naming the first fields that differ (those below a dotted key in `ignore`
    may), or cannot be written. A field that is newer than the folder counts as having had its default there.
    """
    path, owner = folder / CONFIG, folder / OWNER
    mine = {"study": study, **{role: model_digest(getattr(config, role)) for role in ("student", "teacher")}}
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(owner, json.dumps(mine, indent=1) + "\n")
            write_whole(path, dump_config(config))
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error}); right would be another folder (--out)") from error
        return
    try:
        theirs, there = json.loads(owner.read_text()), load_config(path)
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"{folder}: {OWNER} or {CONFIG} is torn ({error}); right would be an empty folder") from error
    differing = [
        f"{key}: {theirs.get(key)!r} there, {value!r} here" for key, value in mine.items() if theirs.get(key) != value
    ]
    differing += _differing(there, config, ignore)
    if differing:
        more = len(differing) - SHOWN_DIFFERENCES
        raise ConfigError(
            f"{folder} holds the results of another config; right would be an empty folder (--out)\n  "
            + "\n  ".join([*differing[:SHOWN_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])])
        )


def model_digest(model: ModelConfig) -> str:
    """What tells a local model from another at the same path: sizes, first and last MB of its weights. Hub: its name.

    Not of all bytes, as weights may be hundreds of GB.
    """
    folder = Path(model.model)
    if not folder.is_dir():
        return f"{model.model}@{model.revision}"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(DIGESTED_BYTES))
            file.seek(max(0, size - DIGESTED_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _differing(there: TopdConfig, here: TopdConfig, ignore: Sequence[str]) -> list[str]:
    theirs, mine = (_flat(config.model_dump(mode="json")) for config in (there, here))
    return [
        f"{key}: {theirs.get(key)!r} there, {mine.get(key)!r} here"
        for key in sorted({*theirs, *mine})
        if theirs.get(key) != mine.get(key) and not any(key == one or key.startswith(f"{one}.") for one in ignore)
    ]


def save_results(folder: Path, results: Results) -> Path:
    """Write results.json, with the commit, the versions and the machine on which the figures were computed."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        **asdict(results),
        "commits": sorted(results.commits),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }
    path = folder / RESULTS
    write_whole(path, json.dumps(document, indent=1) + "\n")
    return path


def load_results(folder: Path) -> dict[str, Any]:
    """The document that `save_results` wrote. Raises ConfigError where there is none, or it is another."""
    path = folder / RESULTS
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); right would be a folder in which a study ended") from error
    wanted = [*Results.__dataclass_fields__, "commit", "versions", "machine"]
    lacking = [key for key in wanted if not isinstance(document, dict) or key not in document]
    if lacking:
        raise ConfigError(f"{path}: found no {', '.join(lacking)}; right would be a folder in which a study ended")
    read: dict[str, Any] = document
    return read


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
