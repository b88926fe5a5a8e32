"""docs/results.md, made from every `studies/*/results.json`: `topd study report`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from topd_ray.config import yaml12
from topd_ray.errors import ConfigError
from topd_ray.pipeline.checkpoint import write_whole
from topd_ray.provenance import UNKNOWN
from topd_ray.studies.results import RESULTS, load_results
from topd_ray.studies.tables import Table

READING = "reading.md"
"""Beside results.json: what a person concludes from the figures, put above them as it is."""
EXAMPLES = "examples.md"
"""Beside results.json of a study whose figures hold `examples`: those to read; the page links it."""
ORDER = ("probe", "local-correction", "ablation", "sweep")
_HEAD = """# Results

What the paper's experiments give on the pairs that run here. Made by `topd study report` from `studies/*/results.json`
and the `reading.md` beside it; edit neither this page nor the figures. Brackets hold 95 % intervals; those of whole
runs, over seeds and prompts, are too short where seeds differ much: with three seeds they then hold the truth in 75 %
of cases, with five in 85 %. "Paper" is arXiv 2606.00305v1, whose models are thousands of times larger: its numbers
stand beside ours for their order, not for their size.
"""


def write_report(studies: Path, page: Path) -> list[Path]:
    """Write `page` from the studies below the folder; returns those in it.

    Raises ConfigError where there are none, for results, pictures or examples that are not there whole, and for a page
    that cannot be written.
    """
    folders = sorted((path.parent for path in studies.glob(f"*/{RESULTS}")), key=_place)
    if not folders:
        raise ConfigError(f"{studies}: found no */{RESULTS}, right would be a folder in which studies ended")
    to_studies = os.path.relpath(studies, page.parent)
    parts = [_section(folder, load_results(folder), f"{to_studies}/{folder.name}") for folder in folders]
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_whole(page, "\n".join([_HEAD, *parts]))
    except OSError as error:
        raise ConfigError(f"{page} cannot be written ({error}); right would be another page (--page)") from error
    return folders


def _place(folder: Path) -> tuple[int, str]:
    study = load_results(folder)["study"]
    return (ORDER.index(study) if study in ORDER else len(ORDER), folder.name)


def _section(folder: Path, document: Mapping[str, Any], link: str) -> str:
    lines = [f"## {folder.name}", ""]
    if (folder / READING).exists():
        lines += [(folder / READING).read_text().strip(), ""]
    for table in document["tables"]:
        lines += [Table.from_json(table).markdown(), ""]
    for name in document["pictures"]:
        _check_there(folder, name)
        lines += [f"![{folder.name}: {Path(name).stem}]({link}/{name})", ""]
    if document["figures"].get("examples"):
        _check_there(folder, EXAMPLES)
        lines += [f"[Near futures to read]({link}/{EXAMPLES})", ""]
    if document["notes"]:
        lines += [*(f"- {note}" for note in document["notes"]), ""]
    return "\n".join([*lines, _provenance(document), ""])


def _check_there(folder: Path, name: str) -> None:
    if not (folder / name).exists():
        raise ConfigError(f"{folder}: found no {name}; right would be a folder in which a study ended, whole")


def _provenance(document: Mapping[str, Any]) -> str:
    machine, versions = document["machine"], document["versions"]
    place = machine["gpu"] or machine["cpu"]
    seeds: Sequence[int] = document["seeds"]
    config = yaml12.parse(document["config"], RESULTS)
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "none")
    return (
        f"`{document['command']}`, {_commits(document)}, seeds {', '.join(map(str, seeds))}, "
        f"{_duration(document['seconds'])} on {machine['cores']} cores of {place}; "
        f"student `{config['student']['model']}`, teacher `{config['teacher']['model']}`; {packages}."
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _commits(document: Mapping[str, Any]) -> str:
    made, shown = document.get("commits", [UNKNOWN]), document["commit"] or UNKNOWN
    return f"commit {shown}" if made == [shown] else f"rows of commit {', '.join(made)}, figures of {shown}"
