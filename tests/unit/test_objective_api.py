"""The public API of the objective is what its docstring says it is."""

import re
from types import ModuleType

import topd_ray.objective as objective


def test_the_table_names_exactly_the_public_api() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", objective.__doc__ or "", re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(objective.__all__)


def test_nothing_else_can_be_seen() -> None:
    seen = {name for name, value in vars(objective).items() if not name.startswith("_")}
    modules = {name for name in seen if isinstance(getattr(objective, name), ModuleType)}
    assert seen - modules == set(objective.__all__)


def test_every_name_says_what_it_is() -> None:
    assert [name for name in objective.__all__ if len((getattr(objective, name).__doc__ or "").split()) < 5] == []
