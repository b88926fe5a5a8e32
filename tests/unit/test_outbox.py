"""What one thread puts into an outbox and another takes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from topd_ray.actors.messages import RolloutChunk
from topd_ray.actors.outbox import Outbox

SECONDS = 60.0


def chunk(name: str) -> RolloutChunk:
    return RolloutChunk(handle=None, trajectory_ids=(name,), policy_versions=(0,), num_tokens=(1,), metrics=())


def names(chunks: list[RolloutChunk]) -> list[str]:
    return [name for one in chunks for name in one.trajectory_ids]


def test_everything_comes_in_order_to_a_slow_reader() -> None:
    outbox = Outbox()

    def write() -> None:
        for number in range(1000):
            outbox.put(chunk(str(number)))
        outbox.close()

    writer = threading.Thread(target=write)
    writer.start()
    takes = []
    while chunks := outbox.take():
        takes.append(names(chunks))
        time.sleep(0.001)
    writer.join(SECONDS)
    assert [name for take in takes for name in take] == [str(number) for number in range(1000)]
    assert outbox.is_spent and len(takes) < 1000


def test_a_reader_waits_for_the_first_chunk() -> None:
    outbox = Outbox()
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(outbox.take)
        time.sleep(0.05)
        assert not taking.done()
        outbox.put(chunk("a"))
        assert names(taking.result(SECONDS)) == ["a"]


def test_an_error_comes_after_what_was_put_before_it() -> None:
    outbox = Outbox()
    outbox.put(chunk("a"))
    outbox.close(ValueError("the engine has failed"))
    assert names(outbox.take()) == ["a"] and not outbox.is_spent
    with pytest.raises(ValueError, match="the engine has failed"):
        outbox.take()
    assert outbox.is_spent


def test_a_spent_one_is_spent_from_the_start() -> None:
    assert Outbox.spent().is_spent and not Outbox().is_spent
