from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from topd_ray.grouping import runs_within


@given(sizes=st.lists(st.integers(0, 12)), limit=st.integers(1, 20))
def test_runs_keep_order_and_stay_within_the_limit(sizes: list[int], limit: int) -> None:
    runs = list(runs_within(sizes, lambda size: size, limit))
    assert [size for run in runs for size in run] == sizes
    assert all(run for run in runs)
    for run in runs:
        assert sum(run) <= limit or len(run) == 1
    for run, following in pairwise(runs):
        assert sum(run) + following[0] > limit


def test_an_item_larger_than_the_limit_goes_alone() -> None:
    assert list(runs_within([1, 9, 1, 1], lambda size: size, 2)) == [[1], [9], [1, 1]]
