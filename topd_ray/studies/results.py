"""A study's folder: `results.json` with all its figures, pictures beside it, raw rows and `config.yaml`.

results.json is meant to be committed: docs/results.md is made from it, and from nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from topd_ray.actors.node_facts import versions
from topd_ray.config.load import dump_config, load_config
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import ConfigError
from topd_ray.pipeline.checkpoint import write_whole
from topd_ray.provenance import commit, machine
from topd_ray.studies.tables import Table

RESULTS = "results.json"
CONFIG = "config.yaml"
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


def claim_folder(folder: Path, config: TopdConfig, ignore: Sequence[str] = ()) -> None:
    """Make `folder` this config's, or go on in it.

    Raises ConfigError where it is another config's, naming the first fields that differ (those below a dotted key in
    `ignore` may), or cannot be written. A field that is newer than the folder counts as having had its default there.
    """
    path = folder / CONFIG
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, dump_config(config))
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error}); right would be another folder (--out)") from error
        return
    found = _flat(load_config(path).model_dump(mode="json"))
    mine = _flat(config.model_dump(mode="json"))
    keys = [
        key
        for key in sorted({*found, *mine})
        if found.get(key) != mine.get(key) and not any(key == one or key.startswith(f"{one}.") for one in ignore)
    ]
    if keys:
        lines = [f"{key}: {found.get(key)!r} there, {mine.get(key)!r} here" for key in keys[:SHOWN_DIFFERENCES]]
        more = [f"and {len(keys) - len(lines)} more"] if len(keys) > len(lines) else []
        raise ConfigError(
            f"{folder} holds the results of another config; right would be an empty folder (--out)\n  "
            + "\n  ".join([*lines, *more])
        )


def save_results(folder: Path, results: Results) -> Path:
    """Write results.json, with the commit, the versions and the machine it was found on."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {**asdict(results), "commit": commit(), "versions": versions(), "machine": machine()}
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
