"""What a learner does with a loss that is not finite, and what tells that workers are late, gone or given up."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    UnserializableException,
)

from topd_ray.actors.answers import is_loss, reason_of
from topd_ray.actors.calls import Calls
from topd_ray.actors.cluster import KEEP_FREED_MEMORY, worker_environment
from topd_ray.actors.crew import Slot
from topd_ray.actors.learner import LearnerWorker
from topd_ray.actors.messages import GuidedItem, Normalisers
from topd_ray.actors.restarts import RestartBudget
from topd_ray.actors.room import Need
from topd_ray.actors.store import LocalStore, Store
from topd_ray.config.load import load_config
from topd_ray.config.schema import (
    FaultsConfig,
    LearnerConfig,
    ObjectiveConfig,
    StudentConfig,
    TopdConfig,
    WeightsConfig,
)
from topd_ray.data.arrow import GUIDED_SCHEMA
from topd_ray.errors import NonFiniteLossError, PayloadLostError, RolloutError

DEMO = Path(__file__).parents[2] / "jobs" / "demo.yaml"
STUDENT = StudentConfig(model="s")
FUTURE: Any = "future"


class NonFiniteEngine:
    policy_version = 3

    def all_ranks(self, condition: bool) -> bool:
        return condition

    def learn(self, *_: object, **__: object) -> None:
        raise NonFiniteLossError("update 4: the loss is nan")


def failing_learner(folder: Path, store: Store | None = None) -> LearnerWorker:
    worker = LearnerWorker(
        STUDENT,
        LearnerConfig(),
        ObjectiveConfig(),
        weights=WeightsConfig(),
        num_rollout_workers=1,
        temperature=1.0,
        total_updates=1,
        rank=1,
        timeout_seconds=1.0,
        threads=1,
        seed=0,
        deterministic=False,
        failed_batch_folder=folder,
        store=store or LocalStore(),
    )
    worker._engine = NonFiniteEngine()
    return worker


def test_an_empty_share_is_saved_as_an_empty_table(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="the loss is nan; this rank's share of the batch is in"):
        failing_learner(tmp_path).learn([], Normalisers.of([]))
    table = pq.read_table(tmp_path / "version-000003-rank-1.parquet")
    assert (table.num_rows, table.schema.names) == (0, GUIDED_SCHEMA.names)


def test_a_share_that_cannot_be_saved_does_not_hide_the_loss(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"the loss is nan; this rank's share of the batch could not be saved: .*Not a directory"
    with pytest.raises(NonFiniteLossError, match=message):
        failing_learner(tmp_path / "file" / "failed").learn([], Normalisers.of([]))


class MeetingEngine:
    """One of two ranks that meet in threads."""

    policy_version = 1

    def __init__(self, meeting: threading.Barrier, votes: list[bool]) -> None:
        self._meeting, self._votes = meeting, votes

    def all_ranks(self, condition: bool) -> bool:
        self._votes.append(condition)
        self._meeting.wait(timeout=10.0)
        return all(self._votes)

    def learn(self, *_: object, **__: object) -> None:
        raise AssertionError("a rank has learnt though another could not fetch its share")


class LossyStore(LocalStore):
    def get(self, handles: Sequence[Any]) -> list[Any]:
        if "gone" in handles:
            raise PayloadLostError("the node that held it is gone")
        return super().get(handles)


def test_no_rank_learns_if_one_cannot_fetch_its_share(tmp_path: Path) -> None:
    meeting, votes = threading.Barrier(2), []
    ranks = [failing_learner(tmp_path, store=LossyStore()) for _ in range(2)]
    for rank in ranks:
        rank._engine = MeetingEngine(meeting, votes)
    lost = GuidedItem(
        handle="gone",
        row=0,
        trajectory_id="p/0/0",
        policy_version=1,
        num_tokens=1,
        num_sequence_tokens=2,
        num_guided=0.0,
        num_bytes=1,
        distances=(),
    )
    with ThreadPoolExecutor(2) as pool:
        learning = [
            pool.submit(rank.learn, share, Normalisers.of([lost]))
            for rank, share in zip(ranks, ([lost], []), strict=True)
        ]
    assert [type(one.exception()) for one in learning] == [PayloadLostError] * 2
    assert sorted(votes) == [False, True]
    messages = [str(one.exception()) for one in learning]
    assert messages == ["the node that held it is gone", "another rank cannot fetch its share of the batch"]


@pytest.mark.parametrize(
    ("on_new_weights", "kind", "setting", "silence_counts"),
    [
        ("finish", "learn", "faults.stall_seconds=7 s", True),
        ("finish", "update_weights", "faults.stall_seconds=7 s", True),
        ("interrupt", "update_weights", "weights.timeout_seconds=7 s", False),
        ("finish", "look", "faults.replace_seconds=7 s", False),
        ("finish", "setup", "faults.replace_seconds=7 s", False),
    ],
)
def test_how_long_a_call_may_take(on_new_weights: str, kind: str, setting: str, silence_counts: bool) -> None:
    limits = ("faults.stall_seconds=7", "weights.timeout_seconds=7", "faults.replace_seconds=7")
    config = load_config(DEMO, (f"pipeline.on_new_weights={on_new_weights}", *limits))
    calls, slot = Calls(config), slot_of("rollout", 0, config)
    calls.add(kind, slot, FUTURE)
    (call,) = calls.of().values()
    assert str(call.limit) == setting
    assert calls.late(call.made_at + 6.9) == [] and calls.late(call.made_at + 7.1) == [call]
    slot.heard_at = call.made_at + 1.0
    assert calls.late(call.made_at + 7.1) == ([] if silence_counts else [call])
    assert calls.late(call.made_at + 8.1) == [call]


def test_calls_of_a_lost_worker_are_forgotten() -> None:
    config = load_config(DEMO, ())
    calls, lost, other = Calls(config), slot_of("teacher", 0, config), slot_of("teacher", 1, config)
    futures: list[Any] = ["a", "b", "c"]
    for future, slot in zip(futures, (lost, other, lost), strict=True):
        calls.add("guide", slot, future)
    calls.drop(lost)
    assert list(calls) == ["b"] and "a" not in calls and calls.pop(futures[1]).slot is other
    assert list(calls) == []


def slot_of(role: str, index: int, config: TopdConfig) -> Slot:
    need = Need(role=role, index=index, num_cpus=1, num_gpus=0.0)
    return Slot(role=role, index=index, need=need, bundle=0, budget=RestartBudget(config.faults))


def test_a_restart_budget_forgets_what_is_long_ago_once_there_was_progress() -> None:
    now = 0.0
    budget = RestartBudget(FaultsConfig(max_restarts=2, window_seconds=10.0), clock=lambda: now)
    assert [budget.spend(), budget.spend(), budget.has_room, budget.spend()] == [True, True, False, False]
    assert str(budget) == "more than faults.max_restarts=2 times within faults.window_seconds=10"
    now = 1.0
    budget.progressed()
    now = 9.9
    assert not budget.has_room
    now = 10.0
    assert budget.has_room and budget.spend()
    assert budget.num_spent == 4
    assert not RestartBudget(FaultsConfig(max_restarts=0)).spend()


def test_a_restart_budget_forgets_what_an_input_may_have_done_once_there_was_progress() -> None:
    now = 0.0
    budget = RestartBudget(FaultsConfig(max_restarts=3, window_seconds=100.0), clock=lambda: now)
    for when in (1.0, 3.0, 5.0):
        now = when
        assert budget.spend()
        now += 1.0
        if when < 5.0:
            budget.progressed()
    assert not budget.has_room
    budget.excuse()
    assert budget.has_room, "but for the last, all were before there was progress"
    assert [budget.spend(), budget.spend(), budget.spend()] == [True, True, False]
    now = 7.0
    budget.progressed()
    now = 8.0
    assert budget.spend(), "progress after it was excused"
    assert [budget.spend(), budget.spend(), budget.spend()] == [True, True, False]


@pytest.mark.parametrize("seconds", [1.0, 120.0, 1e6])
def test_restarts_without_progress_add_up_however_slowly_they_come(seconds: float) -> None:
    now = 0.0
    budget = RestartBudget(FaultsConfig(max_restarts=5, window_seconds=10.0), clock=lambda: now)
    budget.progressed()
    spent = []
    for _ in range(7):
        now += seconds
        spent.append(budget.spend())
    assert spent == [True] * 5 + [False] * 2
    quick = "within faults.window_seconds=10"
    reason = quick if seconds == 1.0 else "without progress"
    assert str(budget) == f"more than faults.max_restarts=5 times {reason}"
    now += 1.0
    budget.progressed()
    now += 10.0
    assert budget.spend(), "all are forgotten at once"


def test_slow_restarts_with_progress_after_each_go_on_for_ever() -> None:
    now = 0.0
    budget = RestartBudget(FaultsConfig(max_restarts=1, window_seconds=10.0), clock=lambda: now)
    for _ in range(100):
        now += 10.0
        assert budget.spend()
        now += 1.0
        budget.progressed()
    now += 5.0
    assert not budget.spend(), "progress alone does not make it forget"


@pytest.mark.parametrize(
    ("error", "gone", "reason"),
    [
        (RayActorError(error_msg="The actor died unexpectedly.\n\tpid: 3"), True, "The actor died unexpectedly."),
        (ActorUnavailableError("cut off", None), True, "The actor None is unavailable: cut off. The task may or"),
        (OutOfMemoryError("killed for its memory\nmore"), True, "killed for its memory"),
        (
            RayTaskError("look_ahead", "Traceback\n  File", ValueError("no such token")),
            False,
            "ValueError: no such token",
        ),
        (
            UnserializableException("ray::setup()\n  File\nhub.MissesFile: no weights\n"),
            False,
            "hub.MissesFile: no weights",
        ),
        (RolloutError("it is broken"), False, "it is broken"),
        (RolloutError(), False, "RolloutError"),
    ],
    ids=["died", "unavailable", "memory", "code", "not unpickled", "own", "wordless"],
)
def test_whether_a_worker_is_gone_and_why(error: Exception, gone: bool, reason: str) -> None:
    if isinstance(error, RayTaskError):
        error = error.as_instanceof_cause()
    assert is_loss(error) == gone
    assert reason_of(error).startswith(reason) and "\n" not in reason_of(error)


def test_the_loss_of_another_worker_that_a_call_waited_for() -> None:
    died = RayActorError(error_msg="The actor died unexpectedly.")
    waited = RayTaskError("update_weights", "Traceback", died).as_instanceof_cause()
    assert is_loss(waited) and reason_of(waited) == "The actor died unexpectedly."


def test_why_an_actor_is_dead() -> None:
    causes = (
        "its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits "
        "with a connection error code 2. End of file. Some common causes include: (1) the process was killed by the "
        "OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly "
        "due to SIGSEGV or another unexpected error."
    )
    advice = (
        "If the process was killed by the kernel OOM killer (verifiable by checking for OOM in dmesg), consider it."
    )
    message = f"The actor is dead because {causes} {advice}"
    died = ActorDiedError(ActorDiedErrorContext(class_name="Worker", actor_id=b"0" * 16, pid=3, error_message=message))
    assert reason_of(died) == f"The actor died unexpectedly before finishing this task: {causes} ..."
    waited = RayTaskError("update_weights", "Traceback", RayActorError(error_msg=str(died))).as_instanceof_cause()
    assert reason_of(waited) == reason_of(died)


def test_the_users_own_malloc_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_TOP_PAD_", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "5")
    found = worker_environment(1, on_cpu=True)
    assert found["MALLOC_TRIM_THRESHOLD_"] == "5"
    assert found["MALLOC_TOP_PAD_"] == KEEP_FREED_MEMORY["MALLOC_TOP_PAD_"]
    assert found["CUDA_VISIBLE_DEVICES"] == ""
    assert not {*KEEP_FREED_MEMORY, "CUDA_VISIBLE_DEVICES"} & worker_environment(1, on_cpu=False).keys()
