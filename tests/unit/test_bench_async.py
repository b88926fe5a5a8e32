"""The asynchronous simulation at a tiny scale: its engines keep their times, and its driver overlaps them."""

import time
from dataclasses import replace

import pytest

from bench.asynchronous.fleet import SleepingRollout, Timers
from bench.asynchronous.run import run
from bench.asynchronous.workload import Workload
from topd_ray.actors.events import Event, Published, Written
from topd_ray.types import Prompt, RolloutRequest

TINY = Workload(
    name="tiny",
    num_rollouts=4,
    num_slots=4,
    num_teachers=2,
    prompts_per_step=8,
    samples_per_prompt=2,
    median_length=50.0,
    sigma=0.3,
    longest=80,
    step_seconds=2e-4,
    sequence_seconds=1e-4,
    score_seconds=5e-5,
    train_seconds=5e-5,
    update_seconds=0.0,
    pack_seconds=0.001,
    fetch_seconds=0.002,
    swap_seconds=0.001,
)


@pytest.mark.parametrize("mode", ["interrupt", "finish"])
def test_the_driver_overlaps_the_sleeping_engines(mode: str) -> None:
    started = time.perf_counter()
    synchronous = run(TINY, 0, num_updates=4)
    overlapped = run(TINY, 2, mode, num_updates=4)
    assert time.perf_counter() - started < 10
    assert synchronous.num_trained == overlapped.num_trained == 4 * TINY.batch_size
    assert synchronous.most_open == TINY.batch_size and overlapped.most_open == 3 * TINY.batch_size
    assert synchronous.means["staleness/max"] == 0 < overlapped.means["staleness/max"] <= 2
    assert overlapped.rate > 1.2 * synchronous.rate
    assert 0.0 < overlapped.control_cpu_ms < 5.0


def test_the_bound_is_of_the_slowest_stage() -> None:
    bounds = replace(TINY, sigma=0.0).bounds(1, 2, "finish")
    tokens = 16 * 50
    assert bounds == {
        "rollout": pytest.approx(16 / (tokens * 6e-4 / 4 / 4)),
        "teacher": pytest.approx(16 / (tokens * 5e-5 / 2)),
        "learner": pytest.approx(16 / (tokens * 5e-5 + 0.001)),
    }
    assert replace(TINY, sigma=0.0).bounds(1, 2, "interrupt")["rollout"] < bounds["rollout"]


@pytest.mark.parametrize(("mode", "versions"), [("interrupt", [0, 0, 1]), ("finish", [0, 0, 1])])
def test_an_engine_slows_down_with_load_and_takes_weights(mode: str, versions: list[int]) -> None:
    told: list[tuple[float, Event]] = []
    timers = Timers()
    workload = replace(TINY, sigma=0.0, num_slots=2)
    engine = SleepingRollout(0, workload, mode, timers, lambda event: told.append((timers.now, event)))
    prompt = Prompt(prompt_id="p", token_ids=(1,))
    engine.write([RolloutRequest(prompt=prompt, sample_index=i, epoch=0, seed=i) for i in range(3)], 0.0)
    timers.at(0.01, lambda now: engine.take_weights(1, now))
    timers.run_until(1.0)
    times = [at for at, event in told if isinstance(event, Written)]
    (published,) = [at for at, event in told if isinstance(event, Published)]
    pair, alone = 50 * 4e-4, 50 * 3e-4
    if mode == "interrupt":  # stands still for swap_seconds in the middle
        assert published == pytest.approx(0.011)
        assert times == pytest.approx([pair + 0.001, pair + 0.001, pair + 0.001 + alone])
    else:
        assert published == pytest.approx(pair + 0.001)
        assert times == pytest.approx([pair, pair, pair + 0.001 + alone])
    assert [event.chunk.policy_versions[0] for _, event in told if isinstance(event, Written)] == versions
