"""docs/config.md says what the schema says."""

from pathlib import Path

from topd_ray.config.fields import fields
from topd_ray.config.reference import main, reference

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    committed = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert committed == reference(), "run: python -m topd_ray.config.reference"


def test_every_field_is_documented() -> None:
    assert [path for path, field in fields().items() if not field.description] == []


def test_rows() -> None:
    lines = reference().splitlines()
    assert any(line.startswith("| `top_k` | integer >= 1, or full | `64` | Teacher tokens kept ") for line in lines)
    assert any(line.startswith("| `model` | text | **required** | ") for line in lines)
    assert any(line.startswith('| `resume` | auto \\| never \\| must | `"auto"` | ') for line in lines)
    assert "## data.arithmetic" in lines


def test_main_writes_where_told(tmp_path: Path) -> None:
    main([str(tmp_path / "docs" / "page.md")])
    assert (tmp_path / "docs" / "page.md").read_text(encoding="utf-8") == reference()
