"""The order of prompts, and the seeds of what is asked of them."""

import json
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topd_ray.data.schedule import PromptSchedule, rollout_requests
from topd_ray.errors import DataError
from topd_ray.types import Prompt


def names(num: int) -> list[str]:
    return [f"p{index}" for index in range(num)]


@given(num=st.integers(1, 30), per_step=st.integers(1, 40), seed=st.integers(0, 5), shuffle=st.booleans())
def test_every_prompt_once_per_epoch_and_full_steps(num: int, per_step: int, seed: int, shuffle: bool) -> None:
    schedule = PromptSchedule(names(num), prompts_per_step=per_step, seed=seed, shuffle=shuffle)
    steps = [schedule.take() for _ in range(3 * num // per_step + 1)]
    assert {len(step) for step in steps} == {per_step}
    drawn = [pair for step in steps for pair in step]
    assert [epoch for epoch, _ in drawn] == [position // num for position in range(len(drawn))]
    for epoch in range(len(drawn) // num):
        assert sorted(drawn[epoch * num : (epoch + 1) * num]) == [(epoch, index) for index in range(num)]


def test_orders() -> None:
    plain = PromptSchedule(names(3), prompts_per_step=4, seed=0, shuffle=False)
    assert plain.take() == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert plain.take() == [(1, 1), (1, 2), (2, 0), (2, 1)]
    shuffled = PromptSchedule(names(6), prompts_per_step=6, seed=1, shuffle=True)
    assert [index for _, index in shuffled.take()] == [2, 1, 4, 0, 3, 5]
    assert [index for _, index in shuffled.take()] == [5, 2, 0, 3, 1, 4]


@given(num=st.integers(1, 9), per_step=st.integers(1, 9), taken=st.integers(0, 7))
def test_going_on_from_a_state(num: int, per_step: int, taken: int) -> None:
    one = PromptSchedule(names(num), prompts_per_step=per_step, seed=3, shuffle=True)
    for _ in range(taken):
        one.take()
    other = PromptSchedule(names(num), prompts_per_step=per_step, seed=3, shuffle=True)
    other.load_state(json.loads(json.dumps(one.state())))
    assert [one.take() for _ in range(4)] == [other.take() for _ in range(4)]


@pytest.mark.parametrize(
    ("prompt_ids", "seed", "shuffle", "message"),
    [
        (names(4), 0, True, "the checkpoint's prompt order has num_prompts=5, this run 4; right would be the prompts"),
        (names(5), 1, True, "the checkpoint's prompt order has seed=0, this run 1"),
        (names(5), 0, False, "the checkpoint's prompt order has shuffle=True, this run False"),
        ([*names(4), "q"], 0, True, "the checkpoint's prompt order has prompts_digest="),
    ],
)
def test_a_state_of_another_order(prompt_ids: list[str], seed: int, shuffle: bool, message: str) -> None:
    state = PromptSchedule(names(5), prompts_per_step=2, seed=0, shuffle=True).state()
    with pytest.raises(DataError) as caught:
        PromptSchedule(prompt_ids, prompts_per_step=2, seed=seed, shuffle=shuffle).load_state(state)
    assert str(caught.value).startswith(message)


def test_nothing_to_draw_from() -> None:
    with pytest.raises(DataError, match="found 0 prompts to draw 2 a step from, right would be 1 or more"):
        PromptSchedule(names(0), prompts_per_step=2, seed=0, shuffle=True)


def test_requests() -> None:
    prompts = [Prompt(prompt_id=name, token_ids=(1,)) for name in ("a", "b")]
    requests = rollout_requests(list(product((0, 1), prompts)), samples=(0, 1), run_seed=7)
    assert [request.trajectory_id for request in requests] == [
        "a/0/0", "a/0/1", "b/0/0", "b/0/1", "a/1/0", "a/1/1", "b/1/0", "b/1/1",
    ]  # fmt: skip
    seeds = [request.seed for request in requests]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds[0] == 600618070
    assert rollout_requests([(1, prompts[1])], samples=(0, 1), run_seed=7) == requests[6:]
    assert {r.seed for r in rollout_requests([(0, prompts[0])], samples=(0, 1), run_seed=8)}.isdisjoint(seeds)
