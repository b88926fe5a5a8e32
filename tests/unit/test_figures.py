"""The table of figures: what docs/metrics.md, Prometheus and the dashboard go by."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from topd_ray.engines.learner_metrics import METRIC_KEYS
from topd_ray.metrics.figures import FIGURES, main, reference

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "cluster" / "grafana.json").read_text())
METRIC = re.compile(r"\bray_topd_\w+")


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    committed = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert committed == reference(), "run: python -m topd_ray.metrics.figures"
    main([str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == committed


def test_names_end_in_their_unit() -> None:
    names = {key: figure.name for key, figure in FIGURES.items()}
    assert names["loss/total"] == "topd_loss_total_nats", "_total alone would say that it is a counter"
    assert names["seconds/step"] == "topd_step_seconds"
    assert names["step"] == "topd_step"
    assert names["weights/bytes"] == "topd_weights_bytes"
    assert names["throughput/trained_tokens_per_second"] == "topd_throughput_trained_tokens_per_second"
    assert names["evaluation/student/pass_at_1"] == "topd_evaluation_student_pass_at_1_ratio"
    assert len(set(names.values())) == len(names)
    assert [name for name in names.values() if not re.fullmatch(r"topd(_[a-z0-9]+)+", name)] == []


def test_every_figure_of_the_loss_is_in_the_table() -> None:
    assert set(METRIC_KEYS.values()) <= set(FIGURES)


def expressions() -> Iterator[tuple[str, str]]:
    """(title of the panel, query)"""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    known = {figure.prometheus_name for figure in FIGURES.values()}
    for title, expression in expressions():
        found = METRIC.findall(expression)
        assert found and set(found) <= known, (title, expression)
        assert expression.count('run=~"$run"') == len(found), (title, expression)


def test_the_dashboard_shows_what_it_should() -> None:
    shown = {name for _, expression in expressions() for name in METRIC.findall(expression)}
    parts = ("throughput/", "queue/", "staleness/", "waiting/", "faults/", "weights/", "seconds/", "preflight/")
    wanted = [figure for key, figure in FIGURES.items() if key.startswith(parts)]
    wanted += [FIGURES[key] for key in ("step", "loss/total", "loss/opd", "loss/guidance", "learner/grad_norm")]
    wanted += [FIGURES[f"evaluation/{model}/pass_at_1"] for model in ("student", "teacher")]
    assert [figure.key for figure in wanted if figure.prometheus_name not in shown] == []


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["type"] == "row" or len({one["refId"] for one in panel["targets"]}) == len(panel["targets"])
