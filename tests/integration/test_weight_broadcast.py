"""Weights by broadcast between processes, over gloo and NCCL: workers come, go, die and hang in the middle of it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.weight_worker import TIMEOUTS, Worker, open_end, tensors
from topd_ray.errors import WeightSyncError
from topd_ray.weights.broadcast import BroadcastChannel
from topd_ray.weights.bundle import WeightsBundle
from topd_ray.weights.checksum import fingerprint
from topd_ray.weights.group import Backend
from topd_ray.weights.rounds import GATHER_SECONDS, PAUSE_SECONDS

SLACK: dict[Backend, float] = {"gloo": 3.0, "nccl": 10.0}
"""Seconds that a busy machine may add, and NCCL for its next group."""


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    found: Backend = request.param
    return found


@pytest.fixture(scope="module")
def limit(backend: Backend) -> float:
    """Longest wait inside of a round (seconds)."""
    return TIMEOUTS[backend] / 4


@pytest.fixture(scope="module")
def learner(backend: Backend) -> BroadcastChannel:
    return open_end(backend)


@pytest.fixture
def make(backend: Backend) -> Iterator[Callable[[], Worker]]:
    made: list[Worker] = []

    def make() -> Worker:
        made.append(Worker(backend))
        return made[-1]

    yield make
    for one in made:
        one.kill()


def generation(learner: BroadcastChannel) -> int:
    assert learner._sender is not None
    return learner._sender._generation


def served(workers: list[Worker], bundle: WeightsBundle) -> bool:
    for one in workers:
        one.ask(bundle)
    return [one.answer()[0] for one in workers] == [bundle.checksum] * len(workers)


def test_workers_that_stay_keep_their_group_and_others_get_one(learner, make, backend):
    workers = [make(), make()]
    groups = []
    for version in (1, 2, 3):
        bundle = learner.send(version, tensors(version, backend))
        assert bundle.checksum == fingerprint(tensors(version, backend)).checksum
        assert served(workers, bundle)
        groups.append(generation(learner))
    assert groups == [groups[0]] * 3
    workers[0].kill()
    workers[0] = make()
    assert served(workers[:1], bundle), "the newest version, which the other one serves already"
    assert generation(learner) == groups[0] + 1
    for version in (4, 5):
        assert served(workers, learner.send(version, tensors(version, backend)))
        assert generation(learner) == groups[0] + 2


@pytest.mark.parametrize("order", ["die", "fail", "stop"])
def test_a_worker_that_fails_in_the_middle_holds_up_no_other_for_long(learner, make, backend, limit, order):
    lost, other = make(), make()
    assert served([lost, other], learner.send(1, tensors(1, backend)))
    bundle = learner.send(2, tensors(2, backend))
    lost.ask(bundle, order)
    other.ask(bundle)
    found, seconds = other.answer()
    assert found == bundle.checksum
    notices_at_once = order == "die" and backend == "gloo"
    assert seconds < (0.0 if notices_at_once else limit) + PAUSE_SECONDS + SLACK[backend]
    assert served([other], learner.send(3, tensors(3, backend)))


def test_a_worker_that_hangs_does_not_hold_up_the_learner(learner, make, backend, limit):
    lost, other = make(), make()
    old, before = learner.send(1, tensors(1, backend)), generation(learner)
    lost.ask(old, "stop")
    other.ask(old)
    deadline = time.monotonic() + 4 * limit
    while generation(learner) == before:
        assert time.monotonic() < deadline, "no round was begun"
        time.sleep(0.01)
    time.sleep(0.5)
    started = time.monotonic()
    new = learner.send(2, tensors(2, backend))
    assert time.monotonic() - started < 1.0
    found, seconds = other.answer()
    assert found is None, "it is told that a newer version has overtaken what it could not receive"
    assert limit - 1.0 < seconds < limit + GATHER_SECONDS + PAUSE_SECONDS + SLACK[backend]
    assert served([other], new)


def test_an_altered_version_and_a_learner_that_does_not_answer(learner, make, backend):
    bundle = learner.send(2, tensors(2, backend))
    (first, *others) = bundle.content.parcels
    foreign = replace(first, fingerprint=replace(first.fingerprint, checksum=first.fingerprint.checksum ^ 1))
    worker = make()
    worker.ask(replace(bundle, content=replace(bundle.content, parcels=(foreign, *others))))
    assert "chunk 0 of version 2 of the weights was altered on its way" in worker.answer()[0]
    assert served([worker], bundle)
    nowhere = replace(bundle, content=replace(bundle.content, desk=replace(bundle.content.desk, port=1)))
    with pytest.raises(WeightSyncError, match=r"the learner at 127\.0\.0\.1:1 did not .* weights\.timeout_seconds=1 s"):
        open_end(backend, timeout_seconds=1.0).fetch(nowhere)
