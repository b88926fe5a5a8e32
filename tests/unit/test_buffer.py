"""The buffer keeps every item exactly once, within its bytes, until it is acknowledged."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from topd_ray.actors.buffer import TrajectoryBuffer
from topd_ray.actors.messages import GuidedItem
from topd_ray.config.schema import BufferConfig
from topd_ray.errors import TopdError


def item(trajectory_id: str, num_bytes: int = 10) -> GuidedItem:
    return GuidedItem(
        handle=None,
        row=0,
        trajectory_id=trajectory_id,
        policy_version=0,
        num_tokens=1,
        num_sequence_tokens=2,
        num_guided=0.0,
        num_bytes=num_bytes,
        distances=(),
    )


def test_takes_whole_batches_in_the_order_of_ids() -> None:
    buffer = TrajectoryBuffer(BufferConfig())
    buffer.put([item("c"), item("a")])
    assert buffer.take(3) is None
    buffer.put([item("b"), item("d")])
    lease = buffer.take(3)
    assert lease is not None
    assert [one.trajectory_id for one in lease.items] == ["a", "b", "c"]
    assert buffer.counts().num_waiting == 1


def test_refuses_what_would_exceed_its_bytes_and_says_how_much_it_took() -> None:
    buffer = TrajectoryBuffer(BufferConfig(max_bytes=25))
    assert buffer.put([item("a"), item("b"), item("c")]) == 2
    assert buffer.counts().num_bytes == 20
    lease = buffer.take(2)
    assert lease is not None
    assert buffer.put([item("c")]) == 0, "leased items still take room"
    buffer.acknowledge(lease.lease_id)
    assert buffer.put([item("c")]) == 1
    assert buffer.counts().num_bytes == 10


def test_a_lease_that_runs_out_goes_back() -> None:
    now = [0.0]
    buffer = TrajectoryBuffer(BufferConfig(lease_seconds=5.0), clock=lambda: now[0])
    buffer.put([item("a")])
    first = buffer.take(1)
    assert first is not None and buffer.take(1) is None
    now[0] = 5.0
    second = buffer.take(1)
    assert second is not None and second.items == first.items
    with pytest.raises(TopdError, match="lease 1 is not held"):
        buffer.acknowledge(first.lease_id)
    buffer.acknowledge(second.lease_id)
    assert buffer.counts().num_acknowledged == 1
    assert buffer.counts().num_expired == 1


def test_refuses_an_id_it_holds_waiting_or_leased() -> None:
    buffer = TrajectoryBuffer(BufferConfig())
    buffer.put([item("a")])
    with pytest.raises(TopdError, match="a is already in the buffer"):
        buffer.put([item("a")])
    assert buffer.take(1) is not None
    with pytest.raises(TopdError, match="a is already in the buffer"):
        buffer.put([item("a")])


class BufferMachine(RuleBasedStateMachine):
    """Any order of puts, takes, acknowledgements, give-backs and expiries loses and doubles nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.buffer = TrajectoryBuffer(BufferConfig(max_bytes=100, lease_seconds=10.0), clock=lambda: self.now)
        self.num_made = 0
        self.unacknowledged: set[str] = set()
        self.acknowledged: set[str] = set()
        self.leases: dict[int, list[str]] = {}

    @rule(num_items=st.integers(1, 5), num_bytes=st.integers(1, 40))
    def put(self, num_items: int, num_bytes: int) -> None:
        items = [item(f"{self.num_made + i:05d}", num_bytes) for i in range(num_items)]
        num_taken = self.buffer.put(items)
        self.num_made += num_taken
        self.unacknowledged |= {one.trajectory_id for one in items[:num_taken]}

    @rule(num_items=st.integers(1, 4))
    def take(self, num_items: int) -> None:
        lease = self.buffer.take(num_items)
        if lease is not None:
            ids = [one.trajectory_id for one in lease.items]
            assert len(ids) == num_items
            assert set(ids) <= self.unacknowledged
            assert not any(set(ids) & set(held) for held in self.leases.values()), "leased twice at a time"
            self.leases[lease.lease_id] = ids

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        ids = set(self.leases.pop(lease_id))
        self.buffer.acknowledge(lease_id)
        assert not ids & self.acknowledged
        self.acknowledged |= ids
        self.unacknowledged -= ids

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        self.leases.pop(lease_id)
        self.buffer.give_back(lease_id)

    @rule()
    def all_leases_run_out(self) -> None:
        self.now += 10.0
        self.buffer.take(10**6)
        self.leases.clear()

    @invariant()
    def counts_add_up(self) -> None:
        counts = self.buffer.counts()
        assert counts.num_waiting + counts.num_leased == len(self.unacknowledged)
        assert counts.num_leased == sum(map(len, self.leases.values()))
        assert counts.num_acknowledged == len(self.acknowledged)
        assert 0 <= counts.num_bytes <= 100


TestBufferMachine = BufferMachine.TestCase
TestBufferMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
