"""A config from a YAML file and `key=value` overrides, and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topd_ray.config import yaml12
from topd_ray.config.inputs import check_inputs
from topd_ray.config.schema import TopdConfig
from topd_ray.config.text import read_text
from topd_ray.config.validate import report, shown, validated
from topd_ray.errors import ConfigError

__all__ = ["check_inputs", "dump_config", "load_config", "overridden"]


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> TopdConfig:
    """The config in the YAML file `path`, with `overrides` such as `run.steps=10` put over it, the last one winning.

    The value of an override is YAML; one for a whole section replaces that section.
    Raises ConfigError with a line for every problem there is: dotted key, what was found, what would be right.
    """
    tree = yaml12.parse(read_text(Path(path)), str(path))
    return _resolved({} if tree is None else tree, overrides, str(path))


def overridden(config: TopdConfig, overrides: Sequence[str]) -> TopdConfig:
    """`config` with `overrides` put over it. Raises ConfigError as `load_config` does."""
    return _resolved(config.model_dump(mode="json"), overrides, "its config")


def dump_config(config: TopdConfig) -> str:
    """YAML with every field of `config`; `load_config` reads an equal config from it."""
    return yaml12.dump(config.model_dump(mode="json"))


def _resolved(tree: Any, overrides: Sequence[str], origin: str) -> TopdConfig:
    problems = [problem for override in overrides if (problem := _override(tree, override))]
    config, more = validated(tree)
    if config is None or problems:
        raise report(origin, [*problems, *more])
    return config


def _override(tree: Any, override: str) -> str | None:
    """Set one key in `tree`; the problem, if there is one."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        return f"override {override!r}: found no dotted key and value, right would be, for instance, run.steps=10"
    try:
        value = yaml12.parse(text, f"override {override!r}")
    except ConfigError as error:
        return str(error)
    holder = tree
    for depth, part in enumerate(parts[:-1]):
        if isinstance(holder, dict) and holder.get(part) is None:
            holder[part] = {}
        holder = holder[part] if isinstance(holder, dict) else None
        if not isinstance(holder, dict):
            return f"override {override!r}: {'.'.join(parts[: depth + 1])} is no section, it holds {shown(holder)}"
    if isinstance(holder, dict):
        holder[parts[-1]] = value
    return None
