"""Figures reach the metrics port of Ray's agent on the driver's node."""

import json
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from topd_ray.actors import prometheus
from topd_ray.actors.prometheus import PrometheusSink
from topd_ray.config.load import load_config
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import ConfigError
from topd_ray.metrics.figures import FIGURES
from topd_ray.pipeline.sinks import open_sinks

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 200.0


def config_of(folder: Path) -> TopdConfig:
    overrides = (f"run.root={folder}", "run.name=watched", "metrics.prometheus=true")
    return load_config(ROOT / "jobs" / "debug.yaml", overrides)


@pytest.fixture
def ray_without_dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As `topd run` starts it, in a tenth of the time: figures reach agents every second, and last there for two."""
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    monkeypatch.setattr(prometheus, "REFRESH_SECONDS", 0.5)
    options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 80_000_000}
    ray.init(address="local", num_cpus=1, _system_config={"metrics_report_interval_ms": 1000}, **options)
    yield
    ray.shutdown()


def scrape(address: str) -> dict[str, tuple[str, str, list[tuple[str, float]]]]:
    """Our metrics at `address`: type, help text, and (run, value) of each series."""
    connection = HTTPConnection(address, timeout=5)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {
        family.name: (family.type, family.documentation, [(one.labels["run"], one.value) for one in family.samples])
        for family in text_string_to_metric_families(text)
        if family.name.startswith("ray_topd_")
    }


def wait_for(address: str, name: str, value: float) -> dict[str, tuple[str, str, list[tuple[str, float]]]]:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        found = scrape(address)
        if name in found and found[name][2] == [("watched", value)]:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_every_figure_can_be_scraped_with_its_help_and_run(tmp_path: Path, ray_without_dashboard: None) -> None:
    config = config_of(tmp_path)
    sinks = open_sinks(config, resume_step=0)
    values = {key: 0.5 + index for index, key in enumerate(FIGURES) if key != "step"}
    sinks.write(7, values)
    (target,) = json.loads((tmp_path / ".prometheus" / "watched.json").read_text())
    (address,) = target["targets"]
    found = wait_for(address, "ray_topd_step", 7.0)
    wanted = {
        figure.prometheus_name: ("gauge", figure.text, [("watched", values.get(key, 7.0))])
        for key, figure in FIGURES.items()
    }
    assert found == wanted
    time.sleep(5)
    assert scrape(address) == wanted, "still there when the next update takes long"
    sinks.write(8, {"loss/total": float("inf"), "mine/own": 3.0})
    found = wait_for(address, "ray_topd_step", 8.0)
    assert "ray_topd_loss_total_nats" not in found, "Ray exports finite figures only: better none than the last one"
    assert found["ray_topd_loss_opd_nats"] == wanted["ray_topd_loss_opd_nats"]
    assert found["ray_topd_mine_own"] == ("gauge", "Not in docs/metrics.md.", [("watched", 3.0)])
    sinks.close()
    assert not (tmp_path / ".prometheus" / "watched.json").exists()
    assert json.loads((config.run.folder / "metrics.jsonl").read_text().splitlines()[0])["step"] == 7


def test_without_ray_it_says_what_would_be_right(tmp_path: Path) -> None:
    assert not ray.is_initialized()
    with pytest.raises(ConfigError, match=r"metrics\.prometheus: found true for a run without Ray.*right would be"):
        PrometheusSink(tmp_path, "alone").write(1, {"loss/total": 1.0})


def test_a_node_that_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_enable_metrics_collection", "0")
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80_000_000,
        _system_config={"enable_metrics_collection": False},
    )
    try:
        with pytest.raises(ConfigError, match="Ray exports no metrics on node"):
            PrometheusSink(tmp_path, "silent").write(1, {"loss/total": 1.0})
    finally:
        ray.shutdown()
