"""The buffer keeps every item exactly once, within its bytes, until it is released or discarded."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from topd_ray.actors.buffer import TrajectoryBuffer
from topd_ray.actors.messages import GuidedItem
from topd_ray.config.schema import BufferConfig
from topd_ray.errors import TopdError


def item(trajectory_id: str, *, num_bytes: int = 10, policy_version: int = 0) -> GuidedItem:
    return GuidedItem(
        handle=None,
        row=0,
        trajectory_id=trajectory_id,
        policy_version=policy_version,
        num_tokens=1,
        num_sequence_tokens=2,
        num_guided=0.0,
        num_bytes=num_bytes,
        distances=(),
    )


def ids(items: tuple[GuidedItem, ...]) -> list[str]:
    return [one.trajectory_id for one in items]


def test_takes_whole_batches_the_oldest_policy_first() -> None:
    buffer = TrajectoryBuffer(BufferConfig())
    buffer.put([item("c"), item("a", policy_version=1)])
    assert buffer.take(3) == () and buffer.num_waiting == 2
    buffer.put([item("b"), item("d", policy_version=2), item("e", policy_version=1)])
    assert ids(buffer.take(3)) == ["b", "c", "a"]
    assert ids(tuple(buffer.waiting)) == ["d", "e"]
    assert ids(buffer.release()) == ["b", "c", "a"]
    assert ids(buffer.take(1)) == ["e"]


def test_refuses_what_would_exceed_its_bytes_and_says_how_much_it_took() -> None:
    buffer = TrajectoryBuffer(BufferConfig(max_bytes=25))
    assert buffer.put([item("a"), item("b"), item("c"), item("d", num_bytes=1)]) == 2
    assert buffer.num_bytes == 20
    buffer.take(2)
    assert buffer.put([item("c")]) == 0, "leased items still take room"
    buffer.release()
    assert buffer.put([item("c")]) == 1
    buffer.discard({"c", "unknown"})
    assert (buffer.num_bytes, buffer.num_waiting) == (0, 0)


def test_one_lease_at_a_time() -> None:
    buffer = TrajectoryBuffer(BufferConfig())
    buffer.put([item("a"), item("b")])
    buffer.take(1)
    with pytest.raises(TopdError, match="1 trajectories are still leased"):
        buffer.take(1)
    buffer.discard({"a"})
    assert ids(buffer.release()) == ["a"], "what is leased is not discarded"
    assert buffer.release() == ()


def test_refuses_an_id_it_holds_waiting_or_leased() -> None:
    buffer = TrajectoryBuffer(BufferConfig())
    buffer.put([item("a")])
    with pytest.raises(TopdError, match="a is already in the buffer"):
        buffer.put([item("a")])
    buffer.take(1)
    with pytest.raises(TopdError, match="a is already in the buffer"):
        buffer.put([item("a")])
    buffer.release()
    assert buffer.put([item("a")]) == 1


class BufferMachine(RuleBasedStateMachine):
    """Any order of puts, takes, releases and discards loses and doubles nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = TrajectoryBuffer(BufferConfig(max_bytes=100))
        self.num_made = 0
        self.waiting: dict[str, int] = {}
        self.leased: dict[str, int] = {}

    @rule(num_items=st.integers(1, 5), num_bytes=st.integers(1, 40))
    def put(self, num_items: int, num_bytes: int) -> None:
        items = [item(f"{self.num_made + i:05d}", num_bytes=num_bytes) for i in range(num_items)]
        num_taken = self.buffer.put(items)
        assert num_taken == min(num_items, (100 - sum([*self.waiting.values(), *self.leased.values()])) // num_bytes)
        self.num_made += num_taken
        self.waiting |= {one.trajectory_id: num_bytes for one in items[:num_taken]}

    @precondition(lambda self: not self.leased)
    @rule(num_items=st.integers(1, 4))
    def take(self, num_items: int) -> None:
        taken = ids(self.buffer.take(num_items))
        assert taken == (sorted(self.waiting)[:num_items] if num_items <= len(self.waiting) else [])
        self.leased = {one: self.waiting.pop(one) for one in taken}

    @rule()
    def release(self) -> None:
        assert ids(self.buffer.release()) == list(self.leased)
        self.leased = {}

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(sorted(self.waiting)))
        self.buffer.discard({one})
        del self.waiting[one]

    @invariant()
    def counts_add_up(self) -> None:
        assert ids(tuple(self.buffer.waiting)) == list(self.waiting)
        assert self.buffer.num_bytes == sum([*self.waiting.values(), *self.leased.values()]) <= 100


TestBufferMachine = BufferMachine.TestCase
TestBufferMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
