"""What the threads of a rollout worker do to each other; the threads are real, the engine takes steps when told to."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.scripted_engine import SECONDS, Clock, ScriptedEngine, names, receipt, requests
from topd_ray.actors import serving as serving_module
from topd_ray.actors.serving import RolloutServer
from topd_ray.errors import RolloutError, WeightSyncError
from topd_ray.types import RolloutRequest, Trajectory
from topd_ray.weights.checksum import WeightReceipt


def eventually(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, "this did not come to pass"
        time.sleep(0.001)


def test_a_version_that_can_not_be_fetched_any_more_leaves_the_engine_alone() -> None:
    engine = ScriptedEngine()
    assert RolloutServer(engine).update_weights(1, lambda: None, interrupt=False) is None
    assert (engine.policy_version, engine.loaded) == (0, [])


class Served:
    """A server with a thread in `serve`, and threads for calls that may block."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine()
        self.server = RolloutServer(self.engine)
        self.pool = ThreadPoolExecutor(8)
        self.batches: list[str] = []
        self.start()

    def start(self) -> None:
        def serve() -> None:
            for batch in self.server.serve():
                self.batches.append(names(batch))

        self.stream: Future[None] = self.pool.submit(serve)

    def steps(self, number: int) -> None:
        """Let the engine take steps, and wait until it has begun the last one."""
        self.engine.permits.release(number)
        eventually(lambda: self.engine.permits._value == 0)

    def running(self, number: int) -> None:
        eventually(lambda: self.engine.num_running == number and self.engine._in_use.locked())

    def update(self, version: int, *, interrupt: bool = False, tensors: Any = ()) -> "Future[WeightReceipt]":
        """Call `update_weights`, and wait until it has offered its weights."""
        offered = threading.Event()
        offer = self.server._offer
        self.server._offer = lambda one: (offer(one), offered.set())[0]  # type: ignore[method-assign]
        call = self.pool.submit(self.server.update_weights, version, lambda: tensors, interrupt=interrupt)
        assert offered.wait(SECONDS)
        self.server._offer = offer  # type: ignore[method-assign]
        return call

    def end(self) -> None:
        self.server.stop()
        self.engine.permits.release(1000)
        self.stream.result(SECONDS)


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served()
    try:
        yield found
    finally:
        found.server.stop()
        found.engine.permits.release(1000)
        found.pool.shutdown()


def handovers(
    batches: Callable[[RolloutServer, list[RolloutRequest]], Iterator[list[Trajectory]]],
    asked: list[RolloutRequest],
    monkeypatch: pytest.MonkeyPatch,
    *,
    cost: float,
) -> list[tuple[float, int]]:
    """(second, number of trajectories) of each handover, if its receiver takes `cost` seconds."""
    clock = Clock()
    monkeypatch.setattr(serving_module, "time", clock)
    found = []
    for batch in batches(RolloutServer(ScriptedEngine(clock)), asked):
        found.append((round(clock.now - 100.0, 6), len(batch)))
        clock.now += cost
    return found


def generated(server: RolloutServer, asked: list[RolloutRequest]) -> Iterator[list[Trajectory]]:
    return server.generate(asked, whole=False)


def streamed(server: RolloutServer, asked: list[RolloutRequest]) -> Iterator[list[Trajectory]]:
    """What `serve` yields of `asked`; it is stopped with the last one."""
    server.submit(asked, whole=False)
    missing = len(asked)
    for batch in server.serve():
        missing -= len(batch)
        yield batch
        if not missing:
            server.stop()


@pytest.mark.parametrize("batches", [generated, streamed])
def test_trajectories_of_one_step_leave_together(batches, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(**dict.fromkeys("abcdefgh", 2), i=5)
    assert handovers(batches, asked, monkeypatch, cost=0.0) == [(2.0, 8), (5.0, 1)]


@pytest.mark.parametrize("batches", [generated, streamed])
def test_a_handover_is_made_up_for_by_steps_in_which_nothing_finishes(batches, monkeypatch) -> None:
    """The first costs 0.2 s, so the next may leave 2 s later, in the step without a trajectory of its own."""
    asked = requests(a=1, b=2, c=2, d=2, e=6)
    assert handovers(batches, asked, monkeypatch, cost=0.2) == [(1.0, 1), (4.2, 3), (6.4, 1)]


def test_a_whole_generation_leaves_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(server: RolloutServer, asked: list[RolloutRequest]) -> Iterator[list[Trajectory]]:
        return server.generate(asked, whole=True)

    assert handovers(whole, requests(a=2, b=5), monkeypatch, cost=0.0) == [(5.0, 2)]


def test_what_is_submitted_joins_what_runs(served: Served) -> None:
    served.server.submit(requests(a=4), whole=False)
    served.running(1)
    served.server.submit(requests(b=1, c=4), whole=False)
    served.steps(2)
    served.running(2)
    assert served.engine.entered == [("a", 0, 0), ("b", 0, 1), ("c", 0, 1)]
    served.steps(3)
    eventually(lambda: served.batches[-1:] == ["c"])
    assert "".join(served.batches) == "bac"
    served.server.submit(requests(d=1), whole=False)
    served.steps(1)
    eventually(lambda: served.batches[-1:] == ["d"])
    served.end()


def test_many_threads_may_submit(served: Served) -> None:
    served.engine.permits.release(10_000)
    shares = [requests(**{f"{thread}-{index}": 1 + index % 3 for index in range(20)}) for thread in range(6)]

    def submit(share: list[RolloutRequest]) -> None:
        for request in share:
            served.server.submit([request], whole=False)

    for call in [served.pool.submit(submit, share) for share in shares]:
        call.result(SECONDS)
    eventually(lambda: sum(batch.count("-") for batch in served.batches) == 120)
    served.end()


def test_whole_submissions_run_alone_and_leave_in_the_order_of_their_ids(served: Served) -> None:
    for asked, whole in ((requests(z=1), False), (requests(c=3, a=1, b=2), True), (requests(e=1, d=2), True)):
        served.server.submit(asked, whole=whole)
    served.server.submit(requests(f=1), whole=False)
    served.steps(7)
    eventually(lambda: len(served.batches) == 4)
    assert served.batches == ["z", "abc", "de", "f"]
    assert all(running == 0 for _, _, running in served.engine.entered)
    served.end()


def test_what_runs_finishes_under_its_weights_before_new_ones_come(served: Served) -> None:
    served.server.submit(requests(a=3, b=1), whole=False)
    served.running(2)
    call = served.update(1)
    served.server.submit(requests(c=1), whole=False)
    served.steps(2)
    served.running(1)
    assert not call.done() and served.engine.loaded == []
    served.steps(1)
    assert call.result(SECONDS) == receipt(1)
    assert served.engine.loaded == [(1, False, 0)]
    served.steps(1)
    eventually(lambda: served.batches[-1:] == ["c"])
    assert served.engine.entered == [("a", 0, 0), ("b", 0, 0), ("c", 1, 0)]
    served.end()


def test_an_interrupting_update_comes_between_two_steps(served: Served) -> None:
    served.server.submit(requests(a=3), whole=False)
    served.running(1)
    call = served.update(1, interrupt=True)
    served.steps(1)
    assert call.result(SECONDS) == receipt(1)
    assert served.engine.loaded == [(1, True, 1)]
    served.end()


def test_an_update_comes_while_there_is_nothing_to_write(served: Served) -> None:
    assert served.update(1).result(SECONDS) == receipt(1)
    assert served.engine.loaded == [(1, False, 0)]
    served.end()


def test_an_overtaken_update_is_not_loaded(served: Served) -> None:
    served.server.submit(requests(a=1), whole=False)
    served.running(1)
    calls = [served.update(version) for version in (1, 3, 2)]
    served.steps(1)
    assert [call.result(SECONDS) for call in calls] == [receipt(3)] * 3
    assert served.engine.loaded == [(3, False, 0)]
    served.end()


def test_a_late_update_never_serves(served: Served) -> None:
    asked, may_arrive = threading.Event(), threading.Event()

    def fetch() -> tuple[()]:
        asked.set()
        assert may_arrive.wait(SECONDS)
        return ()

    slow = served.pool.submit(served.server.update_weights, 1, fetch, interrupt=False)
    assert asked.wait(SECONDS)
    assert served.update(2).result(SECONDS) == receipt(2)
    may_arrive.set()
    assert slow.result(SECONDS) == receipt(2), "overtaken while it was fetched"
    with pytest.raises(WeightSyncError, match="version 1 of the weights came late: version 2 is served already"):
        served.server.update_weights(1, lambda: (), interrupt=True)
    assert served.engine.loaded == [(2, False, 0)]
    served.end()


def test_weights_that_do_not_load_are_told_to_their_sender_and_serving_goes_on(served: Served) -> None:
    served.server.submit(requests(a=2), whole=False)
    served.running(1)
    call = served.update(1, interrupt=True, tensors=WeightSyncError("missing: head"))
    served.steps(1)
    with pytest.raises(WeightSyncError, match="missing: head"):
        call.result(SECONDS)
    served.steps(1)
    eventually(lambda: served.batches == ["a"])
    assert served.engine.entered == [("a", 0, 0)]
    served.end()


def test_an_engine_without_a_policy_ends_the_stream_until_it_has_one(served: Served) -> None:
    served.engine.is_whole = False
    call = served.update(1, tensors=WeightSyncError("halfway"))
    for waiting in (call, served.stream):
        with pytest.raises(WeightSyncError, match="halfway"):
            waiting.result(SECONDS)
    served.engine.is_whole = True
    assert served.server.update_weights(2, lambda: (), interrupt=False) == receipt(2), "in the calling thread"
    served.start()
    served.server.submit(requests(a=1), whole=False)
    served.steps(1)
    eventually(lambda: served.batches == ["a"])
    served.end()


def test_an_error_of_the_engine_ends_the_stream_and_another_starts_anew(served: Served) -> None:
    served.server.submit(requests(a=2), whole=False)
    served.running(1)
    served.server.submit(requests(b=2), whole=True)
    served.engine.error = RolloutError("out of memory")
    served.steps(1)
    with pytest.raises(RolloutError, match="out of memory"):
        served.stream.result(SECONDS)
    assert served.engine.num_running == 0
    served.engine.error = None
    served.start()
    served.server.submit(requests(c=1), whole=False)
    served.steps(1)
    eventually(lambda: served.batches == ["c"])
    served.end()


def test_an_update_that_waits_when_the_stream_ends_is_loaded_by_its_sender(served: Served) -> None:
    served.server.submit(requests(a=9), whole=False)
    served.running(1)
    call = served.update(1)
    served.end()
    assert call.result(SECONDS) == receipt(1)
    assert served.engine.loaded == [(1, False, 0)]


def test_others_use_the_engine_while_nothing_is_written(served: Served) -> None:
    with served.server.turn():
        served.server.submit(requests(a=2), whole=False)
        call = served.update(1)
        time.sleep(0.05)
        assert served.engine.entered == [] and not call.done()
    assert call.result(SECONDS) == receipt(1)
    served.running(1)
    entered = threading.Event()

    def evaluate() -> int:
        with served.server.turn():
            entered.set()
            return served.engine.num_running

    evaluation = served.pool.submit(evaluate)
    served.steps(1)
    assert not entered.wait(0.05)
    served.steps(1)
    assert evaluation.result(SECONDS) == 0
    served.end()


def test_there_is_one_stream_at_a_time_and_a_stop_that_comes_early_counts(served: Served) -> None:
    eventually(lambda: served.server._is_serving)
    with pytest.raises(RolloutError, match="served already"):
        next(served.server.serve())
    served.end()
    served.server.stop()
    served.server.submit(requests(a=1), whole=False)
    assert list(served.server.serve()) == []


def test_a_closed_stream_leaves_an_idle_engine() -> None:
    server = RolloutServer(engine := ScriptedEngine(Clock()))
    server.submit(requests(a=1, b=5), whole=False)
    stream = server.serve()
    assert names(next(stream)) == "a"
    stream.close()  # type: ignore[attr-defined]
    assert engine.num_running == 0
    assert [names(batch) for batch in server.generate(requests(c=1), whole=False)] == ["c"]
