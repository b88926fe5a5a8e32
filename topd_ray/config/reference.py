"""The reference page docs/config.md, made from the schema: `python -m topd_ray.config.reference [PATH]` writes it."""

import json
import sys
from pathlib import Path

from topd_ray.config.fields import FieldDoc, SectionDoc, sections

DEFAULT_PATH = Path("docs/config.md")
_HEAD = """# Configuration

Every field of a run's YAML file. Generated from the schema by `python -m topd_ray.config.reference`; edit
`topd_ray/config/schema.py` (studies: `study_schema.py`) instead of this page.

Any field can be set on the command line: `topd run jobs/demo.yaml run.steps=10 learner.learning_rate=1e-5`. Values are
YAML 1.2. Keys that do not exist, values of another type, values out of range and contradictions are errors.
"""


def reference() -> str:
    """The whole page as Markdown."""
    return "\n".join([_HEAD, *(_section(section) for section in sections())])


def main(arguments: list[str]) -> None:
    """Write the page to the path given, by default to docs/config.md below the working folder."""
    path = Path(arguments[0]) if arguments else DEFAULT_PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(reference(), encoding="utf-8")
    print(f"wrote {path}")


def _section(section: SectionDoc) -> str:
    rows = "\n".join(_row(field) for field in section.fields)
    return (
        f"## {section.path}\n\n{section.description}\n\n"
        f"| field | type | default | meaning |\n| --- | --- | --- | --- |\n{rows}\n"
    )


def _row(field: FieldDoc) -> str:
    default = "**required**" if field.required else f"`{json.dumps(field.default)}`"
    name = field.path.rpartition(".")[2]
    cells = [f"`{name}`", _escaped(field.type_text), default, _escaped(field.description)]
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main(sys.argv[1:])
