"""Tasks are drawn in the schedule's order, held while they are open, and opened again from a state."""

import json

import pytest

from topd_ray.actors.sharing import by_prompt
from topd_ray.data.schedule import PromptSchedule
from topd_ray.errors import DataError
from topd_ray.pipeline.tasks import Tasks
from topd_ray.types import Prompt


def make(num_prompts: int = 5, seed: int = 3) -> Tasks:
    prompts = [Prompt(prompt_id=f"p{index}", token_ids=(1,)) for index in range(num_prompts)]
    schedule = PromptSchedule([prompt.prompt_id for prompt in prompts], 2, seed=seed, shuffle=True)
    return Tasks(schedule, prompts, samples_per_prompt=2, seed=seed)


def test_drawn_in_order_and_held_until_closed() -> None:
    tasks = make()
    first, second = tasks.draw(), tasks.draw()
    assert [task.order for task in first + second] == list(range(8))
    assert [task.request.sample_index for task in first] == [0, 1, 0, 1]
    assert len({task.trajectory_id for task in first + second}) == 8 == len(tasks)
    assert tasks.position == 4
    assert all(task.trajectory_id == f"p{task.prompt_index}/0/{task.request.sample_index}" for task in first)
    one = first[2].trajectory_id
    assert tasks.close([one]) == [first[2]]
    assert one not in tasks and len(tasks) == 7
    assert tasks[first[0].trajectory_id] is first[0]
    with pytest.raises(KeyError):
        tasks.close([one])


def test_what_is_drawn_again_is_known_until_it_is_closed() -> None:
    tasks = make()
    first, second, *_ = tasks.draw()
    tasks.note_drawn_again([first.trajectory_id, second.trajectory_id])
    tasks.note_drawn_again([second.trajectory_id])
    assert dict(tasks.drawn_again) == {first.trajectory_id: first, second.trajectory_id: second}
    tasks.close([first.trajectory_id])
    assert list(tasks.drawn_again) == [second.trajectory_id]


def test_going_on_from_a_state() -> None:
    one, other = make(), make()
    drawn = one.draw() + one.draw() + one.draw()
    one.close([task.trajectory_id for task in drawn[1:6]])
    opened = other.load_state(json.loads(json.dumps(one.state())))
    assert [task.request for task in opened] == [task.request for task in (drawn[0], *drawn[6:])]
    assert [task.prompt_index for task in opened] == [task.prompt_index for task in (drawn[0], *drawn[6:])]
    assert len(other) == 7 and all(task.version is None and task.worker is None for task in opened)
    assert [task.request for task in one.draw()] == [task.request for task in other.draw()]
    orders = [task.order for task in [*opened, *other.draw()]]
    assert orders == sorted(set(orders)), "the order of being drawn stays one"
    assert other.state()["open"][:7] == one.state()["open"][:7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"open": [[0, 5, 0]]}, "the checkpoint's open prompt 5 is not one of 5"),
        ({"open": [[0, -1, 0]]}, "the checkpoint's open prompt -1 is not one of 5"),
        ({"seed": 4}, "the checkpoint's prompt order has seed=4, this run 3"),
    ],
)
def test_a_state_of_another_run(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError) as caught:
        make().load_state({**make().state(), **change})
    assert str(caught.value).startswith(message)


def test_a_state_without_open_tasks() -> None:
    state = make().state()
    assert state.pop("open") == []
    assert make().load_state(state) == []


def test_samples_of_a_prompt_are_put_together_by_epoch() -> None:
    tasks = make(num_prompts=2)
    first, second = tasks.draw(), tasks.draw()  # the same prompts in two epochs
    mixed = [first[2], second[1], first[0], first[3], second[0], first[1]]
    assert by_prompt(iter(mixed)) == [[first[2], first[3]], [second[1], second[0]], [first[0], first[1]]]
    assert by_prompt([]) == []
