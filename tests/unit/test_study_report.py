"""Tables of figures, and the page made of all studies."""

import json
from pathlib import Path

import pytest

from topd_ray.config.load import dump_config, load_config
from topd_ray.errors import ConfigError
from topd_ray.provenance import UNKNOWN, commit
from topd_ray.studies.report import write_report
from topd_ray.studies.results import Results, save_results
from topd_ray.studies.statistics import Interval
from topd_ray.studies.tables import Table, shown

TABLE = Table(title="Distances", columns=("positions", "ours", "paper"), rows=[("high | loss", "0.5", "0.566")])


def save(
    folder: Path,
    study: str,
    commits: tuple[str, ...] = ("abc",),
    seconds: float = 120.0,
    examples: tuple[dict[str, str], ...] = (),
) -> None:
    save_results(
        folder,
        Results(
            study=study,
            command=f"topd {study} jobs/demo.yaml",
            seeds=(0, 1),
            seconds=seconds,
            commits=commits,
            figures={
                "median": Interval(value=0.5, low=None, high=None, n=3).to_json(),
                **({"examples": examples} if examples else {}),
            },
            tables=[TABLE],
            pictures=["scatter.png"],
            notes=["too few positions for an interval: 3"],
            config=dump_config(load_config(Path("jobs/demo.yaml"))),
        ),
    )
    (folder / "scatter.png").touch()


@pytest.mark.parametrize(
    ("figure", "unit", "text"),
    [
        (0.5664, "", "0.566"),
        (Interval(value=0.5, low=0.25, high=0.75, n=30), "", "0.500 [0.250, 0.750]"),
        (Interval(value=0.5, low=0.25, high=0.75, n=30), "%", "50.0 % [25.0, 75.0]"),
        (Interval(value=0.5, low=None, high=None, n=3), "%", "50.0 %"),
        (Interval(value=1.5, low=1.0, high=2.0, n=30), "s", "1.500 s [1.000, 2.000]"),
        (None, "%", "-"),
        (float("nan"), "", "-"),
    ],
)
def test_a_figure_is_shown(figure: Interval | float | None, unit: str, text: str) -> None:
    assert shown(figure, unit) == text


def test_a_table_is_aligned_and_its_bars_are_escaped() -> None:
    assert TABLE.text().splitlines() == ["Distances", "positions    ours  paper", "high | loss   0.5  0.566"]
    assert TABLE.markdown().splitlines()[-1] == "| high \\| loss | 0.5 | 0.566 |"


def test_the_page_holds_every_study_in_order_with_its_reading(tmp_path: Path) -> None:
    save(tmp_path / "studies" / "ablation", "ablation")
    save(tmp_path / "studies" / "probe", "probe")
    (tmp_path / "studies" / "probe" / "reading.md").write_text("Futures part rarely.\n")
    write_report(tmp_path / "studies", tmp_path / "docs" / "results.md")
    page = (tmp_path / "docs" / "results.md").read_text()
    assert page.index("## probe") < page.index("Futures part rarely.") < page.index("0.566") < page.index("## ablation")
    assert "](../studies/probe/scatter.png)" in page and "- too few positions for an interval: 3" in page
    assert "`topd probe jobs/demo.yaml`" in page and "seeds 0, 1, 2 minutes" in page
    assert "student `topd_ray/demo/pair/student`" in page


def test_the_page_says_whose_rows_are_of_another_commit(tmp_path: Path) -> None:
    here = commit() or UNKNOWN
    for name, commits, text in (("one", (here,), f"commit {here}, seeds"), ("two", ("b", "a"), "rows of commit a, b,")):
        save(tmp_path / name / "probe", "probe", commits)
        write_report(tmp_path / name, tmp_path / f"{name}.md")
        assert text in (tmp_path / f"{name}.md").read_text()


@pytest.mark.parametrize(
    ("seconds", "text"), [(21.4, "21 seconds on"), (119.0, "119 seconds on"), (150, "2 minutes on")]
)
def test_a_short_study_took_seconds(tmp_path: Path, seconds: float, text: str) -> None:
    save(tmp_path / "probe", "probe", seconds=seconds)
    write_report(tmp_path, tmp_path / "results.md")
    assert f"seeds 0, 1, {text}" in (tmp_path / "results.md").read_text()


def test_the_page_links_examples_and_misses_them(tmp_path: Path) -> None:
    folder = tmp_path / "studies" / "probe"
    save(folder, "probe", examples=({"sort": "real fork"},))
    with pytest.raises(ConfigError, match=r"found no examples\.md; right would be a folder in which a study ended"):
        write_report(tmp_path / "studies", tmp_path / "docs" / "results.md")
    (folder / "examples.md").touch()
    write_report(tmp_path / "studies", tmp_path / "docs" / "results.md")
    assert "[Near futures to read](../studies/probe/examples.md)" in (tmp_path / "docs" / "results.md").read_text()


def test_the_committed_page_is_that_of_the_committed_studies(tmp_path: Path) -> None:
    """Otherwise `topd study report` was forgotten after a study, or a reading of it, had changed."""
    (tmp_path / "studies").symlink_to(Path("studies").resolve())
    write_report(tmp_path / "studies", tmp_path / "docs" / "results.md")
    assert (tmp_path / "docs" / "results.md").read_text() == Path("docs/results.md").read_text()


def test_no_study_and_a_torn_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no"):
        write_report(tmp_path, tmp_path / "results.md")
    save(tmp_path / "probe", "probe")
    (tmp_path / "probe" / "results.json").write_text(json.dumps({"study": "probe"})[:-3])
    with pytest.raises(ConfigError, match="cannot be read"):
        write_report(tmp_path, tmp_path / "results.md")


def test_a_missing_picture_and_a_page_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "studies" / "probe", "probe")
    (tmp_path / "file").touch()
    for page in (tmp_path / "studies", tmp_path / "file" / "results.md"):
        with pytest.raises(ConfigError, match=r"cannot be written .* right would be another page \(--page\)"):
            write_report(tmp_path / "studies", page)
    (tmp_path / "studies" / "probe" / "scatter.png").unlink()
    with pytest.raises(ConfigError, match=r"found no scatter\.png"):
        write_report(tmp_path / "studies", tmp_path / "results.md")
    assert not (tmp_path / "results.md").exists()
