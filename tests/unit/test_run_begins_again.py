"""What `run` does when the workers cannot start again, with fleets that never start."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from topd_ray.config.load import load_config
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import ConfigError, WorkerLostError
from topd_ray.pipeline.plan import Plan, plan_run
from topd_ray.pipeline.run import run

ROOT = Path(__file__).parents[2]


class Failing:
    """A fleet whose sessions end one after the other, each after `seconds`, with `errors`."""

    def __init__(self, *errors: Exception, seconds: float = 0.0) -> None:
        self._errors = list(errors)
        self._seconds = seconds
        self.waits: list[float] = []
        """resources.wait_seconds of each session"""

    def check(self, config: TopdConfig) -> None:
        pass

    def __call__(
        self, config: TopdConfig, total_updates: int, check_interrupt: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        self.waits.append(config.resources.wait_seconds)
        time.sleep(self._seconds)
        raise self._errors.pop(0)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(ROOT)
    small = ("data.arithmetic.num_train=64", "data.heldout=null", "metrics.tensorboard=false")
    settings = (f"run.root={tmp_path}", "faults.replace_seconds=77", *small)
    return plan_run(load_config(Path("jobs/demo.yaml"), settings), print)


def test_nodes_that_are_gone_are_waited_for_and_missed_in_the_end(plan: Plan) -> None:
    fleet = Failing(WorkerLostError("learner rank 0 is lost"), ConfigError("no node can hold learner 0"))
    with pytest.raises(WorkerLostError) as caught:
        run(plan, fleet, print)  # type: ignore[arg-type]
    said = "learner rank 0 is lost, and the workers could not start again: no node can hold learner 0"
    assert str(caught.value) == said
    assert fleet.waits == [0.0, 77.0]


def test_a_cluster_that_is_too_small_from_the_start_is_an_input_error(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="no node can hold learner 0"):
        run(plan, Failing(ConfigError("no node can hold learner 0")), print)  # type: ignore[arg-type]


def test_workers_that_are_lost_before_any_progress_end_the_run_however_slowly(plan: Plan) -> None:
    faults = plan.config.faults.model_copy(update={"window_seconds": 0.001, "max_restarts": 3})
    slow = replace(plan, config=plan.config.model_copy(update={"faults": faults}))
    fleet = Failing(*[WorkerLostError(f"learner rank {rank} is lost") for rank in range(9)], seconds=0.01)
    with pytest.raises(WorkerLostError) as caught:
        run(slow, fleet, print)  # type: ignore[arg-type]
    said = "the run had to begin again more than faults.max_restarts=3 times without progress, the last time: "
    assert str(caught.value) == said + "learner rank 3 is lost"
    assert len(fleet.waits) == 4
