"""Ray on a busy machine, where its processes are not up in time. `ray.init` is a stand-in."""

from pathlib import Path

import pytest

from topd_ray.actors import cluster
from topd_ray.config.load import load_config
from topd_ray.errors import ConfigError

DEMO = Path(__file__).parents[2] / "jobs" / "demo.yaml"
LATE = Exception("The current node timed out during startup.")


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was said and done, in order."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    happened: list[str] = []
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: happened.append("shutdown"))
    return happened


def start(monkeypatch: pytest.MonkeyPatch, happened: list[str], *errors: Exception, address: str = "null") -> None:
    """Start Ray, whose first tries end with `errors`."""
    remaining = list(errors)

    def init(**_: object) -> None:
        happened.append("init")
        if remaining:
            raise remaining.pop(0)

    monkeypatch.setattr(cluster.ray, "init", init)
    cluster.start_ray(load_config(DEMO, [f"resources.ray_address={address}"]), happened.append)


def late(number: int) -> list[str]:
    return ["init", f"Ray did not start on this machine, try {number} of 3: {LATE}", "shutdown"]


def test_a_machine_that_is_busy_for_a_while(monkeypatch: pytest.MonkeyPatch, happened: list[str]) -> None:
    start(monkeypatch, happened, LATE, LATE)
    assert happened == [*late(1), *late(2), "init"]


def test_a_machine_that_is_too_busy(monkeypatch: pytest.MonkeyPatch, happened: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"in 3 tries, .*right would be to try when less is running, or"):
        start(monkeypatch, happened, LATE, LATE, LATE, LATE)
    assert happened == [*late(1), *late(2), *late(3)]


def test_other_errors_are_not_tried_again(monkeypatch: pytest.MonkeyPatch, happened: list[str]) -> None:
    with pytest.raises(ValueError, match="too small"):
        start(monkeypatch, happened, ValueError("the object store is too small"))
    with pytest.raises(ConfigError, match=r"cluster at a:1 does not answer"):
        start(monkeypatch, happened, ConnectionError("nobody"), address="a:1")
    assert happened == ["init", "init"]
