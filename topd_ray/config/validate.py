"""From a tree of plain values to a TopdConfig, or to one line for each thing that is wrong with it."""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from pydantic import ValidationError

from topd_ray.config.contradictions import ContradictionError
from topd_ray.config.fields import fields, section_paths
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import ConfigError

_NEAR_ENOUGH = 0.55
_LONGEST_VALUE = 60
_MISSING = object()


def validated(tree: Any) -> tuple[TopdConfig | None, list[str]]:
    """The config that `tree` describes, or None and every problem: dotted key, what was found, what would be right.

    A section that is null counts as empty. Contradictions are reported beside other problems as far as they do not
    involve a key that is wrong by itself.
    """
    if not isinstance(tree, dict):
        return None, [f"found {shown(tree)}, right would be a mapping of the sections {_names(section_paths())}"]
    tree = _with_sections(tree)
    try:
        return TopdConfig.model_validate_json(json.dumps(tree)), []
    except ValidationError as error:
        return None, _problems(error, tree)
    except (ValueError, RecursionError) as error:
        return None, [f"found values that refer to themselves ({error})"]


def report(source: str, problems: Sequence[str]) -> ConfigError:
    """One error for all problems of `source`."""
    counted = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError("\n  ".join([f"{source}: {counted}", *problems]))


def shown(value: Any) -> str:
    """A value and what it is, for an error message."""
    if value is None:
        return "null (nothing)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return f"a mapping of {len(value)}"
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > _LONGEST_VALUE:
        text = text[:_LONGEST_VALUE] + "..."
    kind = {int: "an integer", float: "a number", str: "text", list: "a list"}[type(value)]
    return f"{text} ({kind})"


def nearest_key(path: str, *, is_section: bool) -> str | None:
    """The known dotted key most like `path`, by the whole key and by its last part; None if none is near."""
    leaf = path.rpartition(".")[2]
    candidates = section_paths() if is_section else fields()
    scored = [(_similarity(path, key) + _similarity(leaf, key.rpartition(".")[2]), key) for key in candidates]
    score, key = max(scored, key=lambda pair: pair[0])
    return key if score / 2 >= _NEAR_ENOUGH else None


def _problems(error: ValidationError, tree: dict[str, Any]) -> list[str]:
    problems: dict[str, str] = {}
    contradictory: list[str] = []
    for item in error.errors():
        if item["type"] == "json_invalid":
            return [f"found a value that JSON cannot hold ({item['ctx']['error']})"]
        if not item["loc"]:
            contradictory += _contradictory(item["ctx"]["error"], known_bad=())
            continue
        key = _key(item["loc"], unknown=item["type"] == "extra_forbidden")
        problems.setdefault(key, _problem(key, item["type"], tree))
    if problems:
        contradictory = _contradictions_beside(tree, list(problems))
    return [*problems.values(), *contradictory]


def _key(location: tuple[int | str, ...], *, unknown: bool) -> str:
    """The dotted key a location of pydantic's lies in; parts beyond a field (an index, a member of a union) go."""
    path = ".".join(str(part) for part in location)
    if unknown:
        return path
    while path not in fields() and path not in section_paths():
        path = path.rpartition(".")[0]
    return path


def _problem(key: str, kind: str, tree: Mapping[str, Any]) -> str:
    found = _look_up(tree, key)
    if kind == "extra_forbidden":
        if key in fields():
            section, _, leaf = key.rpartition(".")
            return f"{key}: found a dotted key in the file, right would be the key {leaf} inside the section {section}"
        nearest = nearest_key(key, is_section=isinstance(found, dict))
        if nearest:
            return f"{key}: unknown key, the nearest right one is {nearest}"
        return f"{key}: unknown key, right would be one of {_names(_siblings(key))}"
    if key in section_paths():
        keys = _names(_siblings(f"{key}.any"))
        return f"{key}: found {shown(found)}, right would be a section with some of {keys}"
    if found is _MISSING:
        return f"{key}: missing, right would be {fields()[key].type_text}: {fields()[key].description}"
    return f"{key}: found {shown(found)}, right would be {fields()[key].type_text}"


def _contradictions_beside(tree: dict[str, Any], bad: Sequence[str]) -> list[str]:
    """Contradictions of what is left of `tree` without its bad keys."""
    pruned = copy.deepcopy(tree)
    for key in bad:
        _remove(pruned, key)
        if key in fields() and fields()[key].required:
            section, _, leaf = key.partition(".")
            pruned.setdefault(section, {})[leaf] = "unknown"
    try:
        TopdConfig.model_validate_json(json.dumps(_with_sections(pruned)))
    except ValidationError as error:
        return [
            line
            for item in error.errors()
            if not item["loc"]
            for line in _contradictory(item["ctx"]["error"], known_bad=bad)
        ]
    return []


def _contradictory(error: Exception, known_bad: Sequence[str]) -> list[str]:
    assert isinstance(error, ContradictionError)
    return [
        f"{', '.join(one.keys)}: {one.text}"
        for one in error.found
        if not any(key == bad or key.startswith(f"{bad}.") for key in one.keys for bad in known_bad)
    ]


def _with_sections(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with its null sections as empty ones, and with those that hold required fields."""
    filled = {key: {} if value is None and key in section_paths() else value for key, value in tree.items()}
    for field in fields().values():
        if field.required:
            filled.setdefault(field.path.partition(".")[0], {})
    for path in section_paths():
        section, _, nested = path.partition(".")
        if nested and isinstance(filled.get(section), dict) and filled[section].get(nested, _MISSING) is None:
            filled[section] = {**filled[section], nested: {}}
    return filled


def _look_up(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return _MISSING
        tree = tree[part]
    return tree


def _remove(tree: Any, key: str) -> None:
    parent, _, leaf = key.rpartition(".")
    holder = _look_up(tree, parent) if parent else tree
    if isinstance(holder, dict):
        holder.pop(leaf, None)


def _siblings(key: str) -> list[str]:
    parent = key.rpartition(".")[0]
    return [one for one in [*fields(), *section_paths()] if one.rpartition(".")[0] == parent]


def _names(keys: Iterable[str]) -> str:
    return ", ".join(keys)


def _similarity(first: str, second: str) -> float:
    return SequenceMatcher(None, first, second, autojunk=False).ratio()
