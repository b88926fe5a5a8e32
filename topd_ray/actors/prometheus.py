"""A run's figures as Ray metrics, which the Ray agent of the driver's node exports to Prometheus."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path

import ray
from ray.util.metrics import Gauge

from topd_ray.errors import ConfigError
from topd_ray.metrics.figures import FIGURES, STEP, Figure

TARGETS = ".prometheus"
"""Folder below run.root with a file for each run that lasts: where to scrape, for Prometheus' `file_sd_configs`, which
takes a * in a file's name but in no folder's."""


REFRESH_SECONDS = 5.0
"""Ray's agent forgets a gauge that was not set for 20 s, and an update may take minutes."""


class PrometheusSink:
    """Every figure as a gauge with the tag `run`; Ray's agent takes them over every ten seconds.

    Made before Ray is started, as sinks are; the first figures ask the driver's node for its port. Raises ConfigError
    there if Ray is not running, or the node exports nothing. Ray leaves out figures that are not finite.
    """

    def __init__(self, root: Path, run_name: str) -> None:
        self._tags = {"run": run_name}
        self._targets = root / TARGETS / f"{run_name}.json"
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, float] = {}
        self._node_id = ""
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._refreshing = threading.Thread(target=self._refresh, name="prometheus", daemon=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._tell_where_to_scrape()
        if not self._values:
            self._refreshing.start()
        with self._lock:
            self._values.update({**values, STEP.key: step})
            self._set_all()

    def close(self) -> None:
        self._closing.set()
        if self._refreshing.is_alive():
            self._refreshing.join()
        self._targets.unlink(missing_ok=True)

    def _refresh(self) -> None:
        while not self._closing.wait(REFRESH_SECONDS):
            with self._lock:
                self._set_all()

    def _set_all(self) -> None:
        for key, value in self._values.items():
            if key not in self._gauges:
                figure = FIGURES.get(key) or Figure(key, "", "Not in docs/metrics.md.")
                gauge = Gauge(figure.name, description=figure.text, tag_keys=("run",))
                self._gauges[key] = gauge.set_default_tags(self._tags)
            self._gauges[key].set(float(value))

    def _tell_where_to_scrape(self) -> None:
        """Also after Ray was started again, on another port."""
        if not ray.is_initialized() or self._node_id != ray.get_runtime_context().get_node_id():
            address = scrape_address()
            self._targets.parent.mkdir(parents=True, exist_ok=True)
            self._targets.write_text(json.dumps([{"targets": [address], "labels": {"job": "topd"}}]) + "\n")
            self._node_id = ray.get_runtime_context().get_node_id()


def scrape_address() -> str:
    """host:port of the metrics of the driver's node. Raises ConfigError where there are none."""
    if not ray.is_initialized():
        raise ConfigError(
            "metrics.prometheus: found true for a run without Ray, whose agents export the figures; right would be "
            "false, or a run without --inline"
        )
    own = ray.get_runtime_context().get_node_id()
    (node,) = [one for one in ray.nodes() if one["NodeID"] == own]
    if node["MetricsExportPort"] <= 0:
        raise ConfigError(
            f"metrics.prometheus: found true, but Ray exports no metrics on node {node['NodeManagerAddress']}; right "
            "would be the package ray[default] there"
        )
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
