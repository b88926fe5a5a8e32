"""What `run` does when workers are lost, with fleets that never start, or that lose the learner as they are told."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from topd_ray.actors.events import Event, Guided, Learned, Published, Written
from topd_ray.actors.messages import GuidedChunk, GuidedItem, LearnerCheck, RolloutChunk
from topd_ray.actors.placement import needs, with_gpus_of
from topd_ray.actors.traffic import Traffic
from topd_ray.config.load import load_config
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import ConfigError, WorkerLostError
from topd_ray.pipeline.checkpoint import Checkpoints
from topd_ray.pipeline.fleet import Fleet
from topd_ray.pipeline.ledger import read_ledger
from topd_ray.pipeline.plan import Plan, plan_run
from topd_ray.pipeline.run import run
from topd_ray.types import Completions, Metric, Prompt, RolloutRequest, UpdateReport

ROOT = Path(__file__).parents[2]


class Failing:
    """A fleet whose sessions end one after the other, each after `seconds`, with `errors`.

    The first one plans its workers with half a GPU each.
    """

    def __init__(self, *errors: Exception, seconds: float = 0.0) -> None:
        self._errors = list(errors)
        self._seconds = seconds
        self.waits: list[float] = []
        """resources.wait_seconds of each session"""
        self.shares: list[float | None] = []
        """resources.gpus_per_learner of each session, as it begins"""

    def check(self, config: TopdConfig) -> None:
        pass

    def __call__(
        self, config: TopdConfig, total_updates: int, check_interrupt: Callable[[], None], say: Callable[[str], None]
    ) -> "Failing":
        self.waits.append(config.resources.wait_seconds)
        self.shares.append(config.resources.gpus_per_learner)
        self.planned = with_gpus_of(config, needs(config, num_gpus=2 if len(self.waits) == 1 else 0))
        return self

    def start(self) -> None:
        time.sleep(self._seconds)
        raise self._errors.pop(0)

    def shutdown(self) -> None:
        pass


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(ROOT)
    small = (
        "rollout.prompts_per_step=4",
        "run.steps=6",
        "run.checkpoint_every=2",
        "data.arithmetic.num_train=64",
        "data.heldout=null",
        "metrics.tensorboard=false",
    )
    settings = (f"run.root={tmp_path}", "faults.replace_seconds=77", *small)
    return plan_run(load_config(Path("jobs/demo.yaml"), settings), print)


def test_a_chat_template_that_writes_the_time_writes_that_of_the_first_session(plan: Plan, tmp_path: Path) -> None:
    """As Llama's and gpt-oss' write the date: the prompts of another day would be those of another run."""
    shutil.copytree(plan.config.student.model, tmp_path / "student")
    template = tmp_path / "student" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%f') }}\n" + template.read_text())
    student = plan.config.student.model_copy(update={"model": str(tmp_path / "student")})
    config = plan.config.model_copy(update={"student": student})
    first = plan_run(config, print)
    checkpoints = Checkpoints(config.run.folder / "checkpoints", keep=1, identity=first.identity)
    checkpoints.save(replace(first.state, step=2), lambda folder: None)
    second = plan_run(config, print)
    assert (second.state.step, second.train) == (2, first.train)


def test_nodes_that_are_gone_are_waited_for_and_missed_in_the_end(plan: Plan) -> None:
    fleet = Failing(WorkerLostError("learner rank 0 is lost"), ConfigError("no node can hold learner 0"))
    with pytest.raises(WorkerLostError) as caught:
        run(plan, fleet, print)  # type: ignore[arg-type]
    said = "learner rank 0 is lost, and the workers could not start again: no node can hold learner 0"
    assert str(caught.value) == said
    assert fleet.waits == [0.0, 77.0]


def test_the_sessions_of_a_run_share_gpus_as_the_first_does_whatever_is_left(plan: Plan) -> None:
    fleet = Failing(*[WorkerLostError("learner rank 0 is lost") for _ in range(3)])
    with pytest.raises(WorkerLostError):
        run(with_faults(plan, 2), fleet, print)  # type: ignore[arg-type]
    assert fleet.shares == [None, 0.5, 0.5]


def test_a_cluster_that_is_too_small_from_the_start_is_an_input_error(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="no node can hold learner 0"):
        run(plan, Failing(ConfigError("no node can hold learner 0")), print)  # type: ignore[arg-type]


def test_workers_that_are_lost_before_any_progress_end_the_run_however_slowly(plan: Plan) -> None:
    fleet = Failing(*[WorkerLostError(f"learner rank {rank} is lost") for rank in range(9)], seconds=0.01)
    with pytest.raises(WorkerLostError) as caught:
        run(with_faults(plan, 3), fleet, print)  # type: ignore[arg-type]
    said = "the run had to begin again more than faults.max_restarts=3 times without progress, the last time: "
    assert str(caught.value) == said + "learner rank 3 is lost"
    assert len(fleet.waits) == 4


class Losing(Fleet):
    """Fleets, session after session, of one rollout and one teacher worker, whose learner is lost at `updates`."""

    learner_attention = "stand-in"

    def __init__(self, *updates: int) -> None:
        self._updates = list(updates)
        self.num_sessions = 0

    def check(self, config: TopdConfig) -> None:
        pass

    def __call__(self, config: TopdConfig, *_: object) -> "Losing":
        self.planned = config
        return self

    def start(self) -> None:
        self.traffic = Traffic()
        self._events: list[Event] = []
        self._version = 0
        self._is_lost = False
        self.num_sessions += 1

    def shutdown(self) -> None:
        time.sleep(0.01)

    def write(self, worker: int, requests: Sequence[RolloutRequest]) -> None:
        ids = tuple(request.trajectory_id for request in requests)
        chunk = RolloutChunk(
            handle=None,
            trajectory_ids=ids,
            policy_versions=(self._version,) * len(ids),
            num_tokens=(3,) * len(ids),
            metrics=(Metric(key="rollout/tokens", sum=3.0),),
        )
        self._events.append(Written(worker=worker, chunk=chunk))

    def guide(self, teacher: int, chunks: Sequence[RolloutChunk], threshold: float) -> None:
        items = [
            GuidedItem(
                handle=None,
                row=0,
                trajectory_id=one,
                policy_version=version,
                num_tokens=3,
                num_sequence_tokens=5,
                num_guided=1.0,
                num_bytes=1,
                distances=(),
            )
            for chunk in chunks
            for one, version in zip(chunk.trajectory_ids, chunk.policy_versions, strict=True)
        ]
        guided = GuidedChunk(items=tuple(items), metrics=(Metric(key="teacher/tokens", sum=3.0),))
        self._events.append(Guided(teacher=teacher, sources=tuple(chunks), chunk=guided))

    def learn(self, items: Sequence[GuidedItem]) -> None:
        if self._updates and self._updates[0] == self._version + 1:
            self._is_lost = True
            self._updates.pop(0)
        self._version += 1
        report = UpdateReport(policy_version=self._version, metrics=[Metric(key="loss/total", sum=1.0)])
        self._events.append(Learned(report=report))

    def publish(self) -> None:
        self._events.append(Published(worker=0, version=self._version))

    def excuse(self, role: str) -> None:
        raise AssertionError("no input is given up")

    def wait(self) -> list[Event]:
        if self._is_lost:
            raise WorkerLostError("learner rank 0 is lost")
        events, self._events = self._events, []
        return events

    def publish_weights(self) -> int:
        return self._version

    def evaluate(self, prompts: Sequence[Prompt], **_: object) -> Iterator[Completions]:
        raise AssertionError("there is nothing to evaluate")

    def own_teacher(self, requests: Sequence[RolloutRequest]) -> list[GuidedItem]:
        return []

    def preflight(self, items: list[GuidedItem]) -> LearnerCheck:
        return LearnerCheck(loss=0.0, largest_difference=0.0, mean_difference=0.0)

    def verify_teacher(self, requests: Sequence[RolloutRequest]) -> float | None:
        return None

    def save_learner(self, folder: Path) -> None:
        (folder / "version").write_text(str(self._version))

    def load_learner(self, folder: Path) -> int:
        self._version = int((folder / "version").read_text())
        return self._version

    def export(self, folder: Path) -> None:
        folder.mkdir()


def with_faults(plan: Plan, max_restarts: int) -> Plan:
    faults = plan.config.faults.model_copy(update={"window_seconds": 0.001, "max_restarts": max_restarts})
    return replace(plan, config=plan.config.model_copy(update={"faults": faults}))


def test_an_input_that_kills_the_learner_ends_the_run_with_its_batch_named(plan: Plan) -> None:
    fleet = Losing(*[4] * 9)
    with pytest.raises(WorkerLostError) as caught:
        run(with_faults(plan, 2), fleet, print)  # type: ignore[arg-type]
    path = plan.config.run.folder.absolute() / "failed_batch" / "update-000004.jsonl"
    ids = [json.loads(line)["trajectory_id"] for line in path.read_text().splitlines()]
    assert str(caught.value) == (
        "the run had to begin again more than faults.max_restarts=2 times without progress, the last time: learner "
        "rank 0 is lost; it was loss 3 while the learner made update 4 of 4 trajectories (prompt/epoch/sample): "
        f"{', '.join(ids)}; all are listed in {path}"
    )
    assert fleet.num_sessions == 3 and len(set(ids)) == 4
    (bundle,) = (plan.config.run.folder / "post-mortem").iterdir()
    assert (bundle / "failed_batch" / path.name).read_text() == path.read_text()


def test_a_learner_that_is_lost_at_newer_and_newer_updates_comes_to_the_end(plan: Plan) -> None:
    fleet = Losing(2, 3, 5, 6)
    said: list[str] = []
    assert run(with_faults(plan, 1), fleet, said.append).step == 6  # type: ignore[arg-type]
    assert fleet.num_sessions == 5
    assert read_ledger(plan.config.run.folder / "ledger.jsonl").faults == ()
    assert not (plan.config.run.folder / "failed_batch").exists()


def test_a_run_with_another_end_says_what_becomes_of_the_learning_rate(plan: Plan) -> None:
    def go(steps: int, **state: object) -> list[str]:
        said: list[str] = []
        learner = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_fraction": 0.0}
        config = plan.config.model_copy(
            update={
                "run": plan.config.run.model_copy(update={"steps": steps}),
                "learner": plan.config.learner.model_copy(update=learner),
            }
        )
        again = plan_run(config, said.append)
        run(replace(again, state=replace(again.state, **state)), Losing(), said.append)  # type: ignore[arg-type]
        return [line for line in said if "learning rate" in line]

    assert go(6) == []
    assert go(6) == []
    assert go(12) == [
        "the run was to end at update 6, and ends at 12 now: the learning rate of update 7 is 0.0005 instead of 0"
    ]
    assert go(12) == []
    assert go(16, total_updates=None) == [], "checkpoints of earlier versions do not tell"
