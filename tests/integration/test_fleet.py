"""The fleet under a real Ray whose workers, without engines, fail as they are told."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from ray.exceptions import ObjectLostError

from tests.stand_ins import Orders
from tests.tiny import make_requests
from topd_ray.actors import nodes
from topd_ray.actors.calls import Calls
from topd_ray.actors.events import (
    Event,
    Guided,
    GuideUnreadable,
    Learned,
    LearnUnreadable,
    Lost,
    Published,
    Ready,
    Written,
)
from topd_ray.actors.fleet import RayFleet
from topd_ray.actors.messages import GuidedItem, RolloutChunk
from topd_ray.config.load import load_config
from topd_ray.config.schema import EvaluationConfig, TopdConfig, WeightsConfig
from topd_ray.errors import NonFiniteLossError, RolloutError, TopdError, WorkerLostError
from topd_ray.types import Prompt, RolloutRequest

ROOT = Path(__file__).parents[2]
SECONDS = 240.0


def config_of(address: str, *overrides: str) -> TopdConfig:
    two = ("rollout.num_workers=2", "teacher.num_workers=2", "learner.num_ranks=2", "resources.threads_per_learner=1")
    more = ("faults.max_restarts=100", f"resources.ray_address={address}", *overrides)
    return load_config(ROOT / "jobs" / "demo.yaml", (*two, *more))


@pytest.fixture(scope="module")
def running(address: str, shared_orders: Orders) -> Iterator[RayFleet]:
    """One fleet for all failures that it survives."""
    fleet = RayFleet(config_of(address), total_updates=10)
    fleet.start()
    fleet.publish_weights()
    yield fleet
    fleet.shutdown()


@pytest.fixture
def fleet(running: RayFleet, orders: Orders) -> RayFleet:
    """It, with all workers there and nothing to do."""
    settle(running)
    return running


@pytest.fixture
def hurry(fleet: RayFleet) -> Iterator[Callable[..., None]]:
    """Sets other time limits for the calls to come: short ones, on a busy machine, hit the innocent too."""

    def limit(config: TopdConfig) -> None:
        reads = fleet._calls.of(kind="read")
        fleet._calls = Calls(config)
        for future, call in reads.items():
            fleet._calls.add("read", call.slot, future)

    yield lambda *overrides: limit(config_of("", *overrides))
    settle(fleet)  # what was called under these limits is forgotten with them
    limit(fleet._config)


def settle(fleet: RayFleet) -> None:
    deadline = time.monotonic() + SECONDS
    while (
        kinds_of_calls(fleet) != {"read"}
        or not fleet._all_serve_newest()
        or not all(one.is_ready for one in fleet._crew.slots)
    ):
        fleet.wait()
        assert time.monotonic() < deadline


def kinds_of_calls(fleet: RayFleet) -> set[str]:
    return {call.kind for call in fleet._calls.of().values()}


def hear(fleet: RayFleet, until: Callable[[list[Event]], bool]) -> list[Event]:
    events: list[Event] = []
    deadline = time.monotonic() + SECONDS
    while not until(events):
        events += fleet.wait()
        assert time.monotonic() < deadline, events
    return events


def some(*kinds: type) -> Callable[[list[Event]], bool]:
    """There is an event of each kind."""
    return lambda events: all(any(isinstance(event, kind) for event in events) for kind in kinds)


def request(name: str) -> RolloutRequest:
    (one,) = make_requests(1)
    return replace(one, prompt=Prompt(prompt_id=name, token_ids=(1, 2)))


def write(fleet: RayFleet, worker: int, *names: str) -> list[RolloutChunk]:
    fleet.write(worker, [request(name) for name in names])
    events = hear(fleet, lambda events: sum(isinstance(event, Written) for event in events) == len(names))
    return [event.chunk for event in events if isinstance(event, Written)]


def guide(fleet: RayFleet, teacher: int, chunks: list[RolloutChunk]) -> list[GuidedItem]:
    fleet.guide(teacher, chunks, 0.5)
    return [item for event in hear(fleet, some(Guided)) if isinstance(event, Guided) for item in event.chunk.items]


def pid_of(fleet: RayFleet, role: str, index: int) -> int:
    return int(ray.get(fleet._crew.of(role)[index].actor.pid.remote()))


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 20.0
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_update_from_end_to_end(fleet: RayFleet) -> None:
    before = fleet._rollouts[0].version
    assert before is not None
    items = guide(fleet, 1, write(fleet, 0, "p1", "p2"))
    assert [item.trajectory_id for item in items] == ["p1/0/0", "p2/0/0"]
    fleet.learn(items)
    fleet.publish()
    events = hear(  # of the learner at any time: the workers' answers may overtake its own
        fleet,
        lambda events: (
            sum(isinstance(event, Published) for event in events) == 2 and any(isinstance(e, Learned) for e in events)
        ),
    )
    assert {event.worker: event.version for event in events if isinstance(event, Published)} == {
        0: before + 1,
        1: before + 1,
    }
    (learned,) = [event for event in events if isinstance(event, Learned)]
    assert learned.report.policy_version == before + 1


def test_a_rollout_worker_that_dies_is_heard_of_once_and_comes_back_with_the_newest_weights(
    fleet: RayFleet, orders: Orders
) -> None:
    orders("rollout-write-killer", "once die")
    fleet.write(1, [request("before"), request("killer"), request("after")])
    fleet.write(1, [request("later")])
    events = hear(fleet, some(Lost, Published))
    lost, published = (next(e for e in events if isinstance(e, kind)) for kind in (Lost, Published))
    assert (lost.role, lost.worker) == ("rollout", 1) and "died" in lost.reason and "\n" not in lost.reason
    assert (published.worker, published.version) == (1, fleet._rollouts[0].version)
    written = [e.chunk.trajectory_ids[0] for e in events if isinstance(e, Written)]
    # Two calls of an actor are in no order: each request before the killer, and the other call's, is written or is not.
    assert sorted(written) in ([], ["before/0/0"], ["later/0/0"], ["before/0/0", "later/0/0"])
    assert sum(isinstance(e, Lost) for e in events) == 1
    assert [chunk.trajectory_ids for chunk in write(fleet, 1, "killer")] == [("killer/0/0",)]
    assert sorted((call.kind, call.slot.index) for call in fleet._calls.of().values()) == [("read", 0), ("read", 1)]


def test_what_a_slow_driver_hears_late_is_still_there(fleet: RayFleet) -> None:
    """Ray loses objects whose handles wait in a streaming generator: ray-project/ray#58082."""
    fleet.write(0, [request(f"p{number}") for number in range(200)])
    handles = []
    while len(handles) < 200:
        for event in hear(fleet, some(Written)):
            if isinstance(event, Written):
                handles.append(event.chunk.handle)
        time.sleep(0.01)
    assert [one for ids in ray.get(handles) for one in ids] == [f"p{number}/0/0" for number in range(200)]


def test_a_teacher_that_dies_with_a_call_queued_is_heard_of_once(fleet: RayFleet, orders: Orders) -> None:
    (chunk,), (other,) = write(fleet, 0, "killer"), write(fleet, 0, "other")
    orders("teacher-look_ahead-killer", "once die")
    fleet.guide(0, [chunk], 0.5)
    fleet.guide(0, [other], 0.5)
    fleet.guide(0, [other], 0.5)
    events = hear(fleet, some(Ready))
    assert [e for e in events if isinstance(e, Lost)] != [] and isinstance(events[-1], Ready)
    assert sum(isinstance(e, Lost) for e in events) == 1 and kinds_of_calls(fleet) == {"read"}
    fleet.guide(0, [chunk, other], 0.5)
    (guided,) = [e for e in hear(fleet, some(Guided)) if isinstance(e, Guided)]
    assert guided.sources == (chunk, other)


def test_a_worker_whose_code_fails_is_made_anew_and_the_reason_is_one_line(fleet: RayFleet, orders: Orders) -> None:
    (chunk,) = write(fleet, 0, "bad")
    orders("teacher-look_ahead-bad", "once raise ValueError: no such token")
    orders("rollout-write-bad", "once raise RolloutError: the engine is broken")
    fleet.guide(0, [chunk], 0.5)
    fleet.write(0, [request("bad")])
    events = hear(fleet, some(Ready, Published))
    reasons = {e.role: e.reason for e in events if isinstance(e, Lost)}
    assert reasons == {"teacher": "ValueError: no such token", "rollout": "the engine is broken"}


def test_workers_that_hang_are_replaced_and_gone(fleet: RayFleet, orders: Orders, hurry: Callable[..., None]) -> None:
    (chunk,) = write(fleet, 0, "quiet")
    settle(fleet)
    hurry("faults.stall_seconds=3")
    pids = [pid_of(fleet, "rollout", 1), pid_of(fleet, "teacher", 1)]
    orders("rollout-write-quiet", "once stop")
    orders("teacher-look_ahead-quiet", "once stop")
    fleet.write(1, [request("quiet")])
    fleet.guide(1, [chunk], 0.5)
    events = hear(fleet, some(Ready, Published))
    reasons = {(e.role, e.worker): e.reason for e in events if isinstance(e, Lost)}
    assert reasons == {
        ("rollout", 1): "it wrote nothing within faults.stall_seconds=3 s",
        ("teacher", 1): "guide took longer than faults.stall_seconds=3 s",
    }
    for pid in pids:
        assert_gone(pid)


def test_a_worker_that_does_not_take_new_weights_in_time_is_replaced(
    fleet: RayFleet, orders: Orders, hurry: Callable[..., None]
) -> None:
    hurry("weights.timeout_seconds=3")
    version = fleet._rollouts[0].version
    orders(f"rollout-update_weights-{version}", "once stop")
    fleet.publish()
    events = hear(fleet, some(Lost))
    (lost,) = [e for e in events if isinstance(e, Lost)]
    assert lost.reason == "update_weights took longer than weights.timeout_seconds=3 s"
    assert sum(isinstance(e, Published) for e in hear(fleet, some(Published))) == 1


def test_a_teacher_that_answers_call_after_call_is_not_silent(
    fleet: RayFleet, orders: Orders, hurry: Callable[..., None]
) -> None:
    """Calls that wait for each other, together for longer than faults.stall_seconds."""
    chunks = [chunk for name in "abcd" for chunk in write(fleet, 0, name)]
    settle(fleet)
    hurry("faults.stall_seconds=4")
    started = time.monotonic()
    for chunk in chunks:
        orders(f"teacher-look_ahead-{chunk.trajectory_ids[0][0]}", f"wait go-{chunk.trajectory_ids[0][0]}")
        fleet.guide(0, [chunk], 0.5)
    guided: list[Event] = []
    for name in "abcd":
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            assert fleet.wait() == []
        orders(f"go-{name}")
        guided += hear(fleet, some(Guided))
    assert time.monotonic() > started + 4.0
    assert [type(event) for event in guided] == [Guided] * 4


def test_while_a_worker_is_made_anew_others_evaluate_and_new_weights_reach_it(fleet: RayFleet, orders: Orders) -> None:
    orders("rollout-setup", "wait loaded")
    os.kill(pid_of(fleet, "rollout", 0), signal.SIGKILL)
    hear(fleet, some(Lost))
    fleet.publish()  # the same version again; the worker that loads is left out
    hear(fleet, some(Published))
    version = fleet._rollouts[1].version
    prompts = [Prompt(prompt_id=f"h{index}", token_ids=(1,)) for index in range(4)]
    parts = list(fleet.evaluate(prompts, model="student", evaluation=EvaluationConfig(), seed=0))
    assert [part.num_tokens for part in parts] == [version] * 4
    items = guide(fleet, 0, write(fleet, 1, "p1"))
    orders(f"rollout-update_weights-{version}", "wait go")
    orders("loaded")
    deadline = time.monotonic() + SECONDS
    while not fleet._rollouts[0].is_ready:
        fleet.wait()
        assert time.monotonic() < deadline
    parts = list(fleet.evaluate(prompts, model="student", evaluation=EvaluationConfig(), seed=0))
    assert [part.num_tokens for part in parts] == [version] * 4, "not by a worker that has not taken weights yet"
    orders("go")
    fleet.learn(items)
    fleet.publish()
    events = hear(fleet, lambda events: fleet._all_serve_newest())
    assert max(e.version for e in events if isinstance(e, Published) and e.worker == 0) == version + 1


def test_receipts_of_weights_that_were_overtaken(fleet: RayFleet, orders: Orders) -> None:
    """Two versions wait for an engine, a third is still being packed: the first is answered for by the second."""
    first = fleet._rollouts[0].version
    assert first is not None
    items = guide(fleet, 0, write(fleet, 0, "p1"))
    for version in (first + 1, first + 2):
        orders(f"rollout-update_weights-{version}", "wait go")
        fleet.learn(items)
        hear(fleet, some(Learned))
        fleet.publish()
    time.sleep(0.5)  # both are with the workers
    orders("learner0-pack_weights-" + str(first + 3), "wait packed")
    fleet.learn(items)
    hear(fleet, some(Learned))
    fleet.publish()
    orders("go")
    events = hear(fleet, lambda events: sum(isinstance(event, Published) for event in events) == 4)
    assert {event.version for event in events if isinstance(event, Published)} == {first + 2}
    orders("packed")
    events = hear(fleet, lambda events: sum(isinstance(event, Published) for event in events) == 2)
    assert {event.version for event in events if isinstance(event, Published)} == {first + 3}


def wait_until_freed(handle: ray.ObjectRef) -> None:
    """A node notices after a moment that the owner of an object is gone."""
    deadline = time.monotonic() + SECONDS
    with pytest.raises(ObjectLostError):
        while time.monotonic() < deadline:
            ray.get(handle)
            time.sleep(0.1)


def test_a_rollout_worker_continues_prefixes_for_a_teacher(
    fleet: RayFleet, orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it is lost meanwhile, what was to be guided is unreadable, and the next one does it."""
    monkeypatch.setattr(fleet, "_config", config_of("", "near_future.student_window=resample"))
    (item,) = guide(fleet, 0, write(fleet, 0, "p1"))
    assert item.trajectory_id == "p1/0/0" and (orders.folder / "teacher-resampled").exists()
    chunks = write(fleet, 0, "p2")
    orders("rollout-continue_prefixes", "once die")
    fleet.guide(0, chunks, 0.5)
    events = hear(fleet, some(GuideUnreadable, Lost))
    (unreadable,) = [event for event in events if isinstance(event, GuideUnreadable)]
    assert (unreadable.teacher, unreadable.sources) == (0, tuple(chunks))
    assert unreadable.reason.startswith("the rollout worker that should continue prefixes is gone")
    assert [event.role for event in events if isinstance(event, Lost)] == ["rollout"]
    chunks = write(fleet, 1, "p3")
    assert [one.trajectory_id for one in guide(fleet, 0, chunks)] == ["p3/0/0"]


def test_what_a_lost_worker_held_is_unreadable(fleet: RayFleet, orders: Orders) -> None:
    """Of a teacher, when the ranks are to learn from it; of a rollout worker, when a teacher is to read it."""
    (chunk,), (other,) = write(fleet, 0, "p1"), write(fleet, 1, "p2")
    items = [*guide(fleet, 0, [chunk]), *guide(fleet, 1, [other])]
    os.kill(pid_of(fleet, "teacher", 0), signal.SIGKILL)
    os.kill(pid_of(fleet, "rollout", 0), signal.SIGKILL)
    hear(fleet, some(Lost))
    for handle in (chunk.handle, items[0].handle):
        wait_until_freed(handle)
    fleet.learn(items)
    fleet.guide(1, [chunk, other], 0.5)
    fleet.guide(0, [other], 0.5)  # which is how an idle teacher's death is found out
    events = hear(fleet, some(LearnUnreadable, GuideUnreadable, Ready))
    assert not some(Learned)(events)
    assert [e.sources for e in events if isinstance(e, GuideUnreadable)] == [(chunk, other)]
    assert [e.reason for e in events if isinstance(e, LearnUnreadable)] == ["gone"]
    assert [e.role for e in events if isinstance(e, Lost)] == ["teacher"]


@pytest.mark.parametrize("end", ["answers", "dies"])
def test_by_ipc_a_version_waits_until_nobody_reads_the_last_one(
    fleet: RayFleet, orders: Orders, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    by_ipc = fleet._config.model_copy(update={"weights": WeightsConfig(channel="ipc")})
    monkeypatch.setattr(fleet, "_config", by_ipc)
    last = fleet._rollouts[0].version
    assert last is not None
    pids = [pid_of(fleet, "rollout", 0), pid_of(fleet, "rollout", 1)]
    orders(f"rollout-update_weights-{last + 1}", "once wait read")

    def learn(worker: int) -> None:
        fleet.learn(guide(fleet, 0, write(fleet, worker, "p1")))
        hear(fleet, some(Learned))
        fleet.publish()

    def published(events: list[Event]) -> list[tuple[int, int]]:
        return [(event.worker, event.version) for event in events if isinstance(event, Published)]

    learn(0)
    ((quick, version),) = published(hear(fleet, some(Published)))
    learn(quick)
    assert version == last + 1 and not fleet._calls.of(kind="pack"), "one worker still reads"
    if end == "answers":
        orders("read")
    else:
        os.kill(pids[1 - quick], signal.SIGKILL)
    events = hear(fleet, lambda events: {(0, last + 2), (1, last + 2)} <= {*published(events)})
    assert [(1 - quick, last + 1)] == [one for one in published(events) if one[1] != last + 2] or end == "dies"
    assert some(Lost)(events) == (end == "dies")


def test_what_each_rank_says_of_a_loss_that_is_not_finite(fleet: RayFleet, orders: Orders) -> None:
    orders("learner0-learn", "raise NonFiniteLossError: nan on 0")
    orders("learner1-learn", "raise NonFiniteLossError: nan on 1")
    fleet.learn(guide(fleet, 0, write(fleet, 0, "p1")))
    with pytest.raises(NonFiniteLossError) as error:
        hear(fleet, some(Learned))
    assert sorted(str(error.value).split("; ")) == ["nan on 0", "nan on 1"]


@pytest.fixture
def started(address: str, orders: Orders) -> Iterator[Callable[..., RayFleet]]:
    """Starts fleets that do not survive their test, one after the other; `running` has ended by then."""
    ray.shutdown()

    def start(*overrides: str) -> RayFleet:
        fleet = RayFleet(config_of(address, *overrides), total_updates=10)
        fleet.start()
        fleet.publish_weights()
        return fleet

    yield start
    ray.shutdown()


def test_weights_by_broadcast_while_workers_die(started: Callable[..., RayFleet], orders: Orders) -> None:
    on_cpus = ("resources.gpus_per_learner=0", "resources.gpus_per_rollout=0")
    fleet = started("weights.channel=broadcast", *on_cpus, "teacher.num_workers=1", "learner.num_ranks=1")

    def learn() -> None:
        fleet.learn(guide(fleet, 0, write(fleet, 1, "p1")))
        hear(fleet, some(Learned))
        fleet.publish()

    def published(events: list[Event]) -> list[tuple[int, int]]:
        return [(event.worker, event.version) for event in events if isinstance(event, Published)]

    os.kill(pid_of(fleet, "rollout", 0), signal.SIGKILL)
    assert published(hear(fleet, some(Lost, Published))) == [(0, 0)], "the newest version, to it alone"
    orders("rollout-receive", "once die")
    learn()
    events = hear(fleet, lambda events: len(published(events)) == 2)
    (lost,) = [event for event in events if isinstance(event, Lost)]
    assert published(events) == [(1 - lost.worker, 1), (lost.worker, 1)], "in the middle of it: again to the other one"
    orders("rollout-fetch-2", "once wait go")  # until version 3 has been sent to the other worker
    learn()
    first = published(hear(fleet, some(Published)))
    fleet.learn(guide(fleet, 0, write(fleet, first[0][0], "p2")))
    hear(fleet, some(Learned))
    fleet.publish()
    events = hear(fleet, some(Published))
    orders("go")
    settle(fleet)
    assert [slot.version for slot in fleet._rollouts] == [3, 3]
    assert not some(Lost)(events)


@pytest.mark.parametrize("moment", ["learn", "save"])
def test_a_rank_that_dies_is_the_reason_though_another_is_heard_of_first(
    started: Callable[..., RayFleet], orders: Orders, tmp_path: Path, moment: str
) -> None:
    fleet = started()
    items = guide(fleet, 0, write(fleet, 0, "p1"))
    orders(f"learner1-{moment}", "wait failed")
    orders(f"learner0-{moment}", "raise RuntimeError: Connection closed by peer")
    pid = pid_of(fleet, "learner", 1)
    threading.Timer(1.0, lambda: os.kill(pid, signal.SIGKILL)).start()
    with pytest.raises(WorkerLostError, match=r"^learner rank 1 is lost: The actor died unexpectedly"):
        if moment == "save":
            fleet.save_learner(tmp_path)
        fleet.learn(items)
        hear(fleet, some(Learned))


def test_ranks_that_hang(started: Callable[..., RayFleet], orders: Orders, tmp_path: Path) -> None:
    fleet = started("faults.stall_seconds=2")
    orders("learner1-save", "stop")
    with pytest.raises(WorkerLostError, match=r"a call has not been answered within faults\.stall_seconds=2 s"):
        fleet.save_learner(tmp_path)
    fleet.learn(guide(fleet, 0, write(fleet, 0, "p1")))
    with pytest.raises(WorkerLostError, match=r"learner rank 1 does not answer: learn took longer than faults\.stall"):
        hear(fleet, some(Learned))


def test_a_loss_that_is_not_finite_while_another_rank_dies(started: Callable[..., RayFleet], orders: Orders) -> None:
    fleet = started()
    items = guide(fleet, 0, write(fleet, 0, "p1"))
    orders("learner0-learn", "raise NonFiniteLossError: nan on 0")
    orders("learner1-learn", "die")
    with pytest.raises(TopdError, match=r"nan on 0; The actor died|learner rank 1 is lost"):
        fleet.learn(items)
        hear(fleet, some(Learned))


def test_a_worker_that_cannot_be_set_up(started: Callable[..., RayFleet], orders: Orders) -> None:
    orders("rollout-setup", "raise RolloutError: no such model")
    with pytest.raises(RolloutError, match=r"^no such model$"):
        started()
    ray.shutdown()
    orders("rollout-setup", "die")
    message = (
        r"^rollout worker [01] has failed more than faults\.max_restarts=1 times within faults\.window_seconds=600, "
    )
    with pytest.raises(RolloutError, match=message + "the last time: The actor died unexpectedly"):
        started("faults.max_restarts=1")


def test_slow_losses_of_a_worker_are_forgotten_only_after_progress(
    started: Callable[..., RayFleet], orders: Orders
) -> None:
    one = ("rollout.num_workers=1", "teacher.num_workers=1", "learner.num_ranks=1")
    fleet = started("faults.max_restarts=1", "faults.window_seconds=0.01", *one)

    def lose() -> None:
        os.kill(pid_of(fleet, "rollout", 0), signal.SIGKILL)
        hear(fleet, some(Lost))
        settle(fleet)

    for _ in range(2):
        write(fleet, 0, "p1")
        lose()
    message = r"^rollout worker 0 has failed more than faults\.max_restarts=1 times without progress, the last time"
    with pytest.raises(RolloutError, match=message):
        lose()


def test_a_worker_is_not_set_up_where_it_does_not_fit(
    started: Callable[..., RayFleet], orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = started()
    orders("rollout-setup", "raise RolloutError: it has been set up")
    monkeypatch.setattr(nodes, "problems_of", lambda *_: ["10.0.0.1 has python 2.7"])
    os.kill(pid_of(fleet, "rollout", 0), signal.SIGKILL)
    message = r"^rollout worker 0 is not back: the nodes .* do not fit together:\n  10\.0\.0\.1 has python 2\.7$"
    with pytest.raises(RolloutError, match=message):
        hear(fleet, some(Published))
