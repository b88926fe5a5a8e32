"""Stages that are timed from place to place, and the time workers have nothing to do."""

from tests.unit.test_buffer import item
from topd_ray.metrics.records import reduce
from topd_ray.metrics.timing import IdleTime, Stopwatch
from topd_ray.pipeline.gauges import Gauges
from topd_ray.types import Metric


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_stages() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    watch.start("learn")
    clock.now += 2.0
    watch.start("learn")
    with watch.time("publish"):
        clock.now += 0.5
    assert reduce(watch.metrics()) == {"seconds/publish": 0.5}, "a stage counts once it has ended"
    watch.stop("learn")
    watch.stop("learn")
    watch.stop("never")
    watch.start("learn")
    clock.now += 1.0
    watch.stop("learn")
    assert reduce(watch.take()) == {"seconds/publish": 0.5, "seconds/learn": 3.5}
    assert watch.take() == []


def test_idle_time_is_the_mean_over_the_workers() -> None:
    clock = Clock()
    idle = IdleTime(4, clock)
    clock.now += 2.0
    idle.busy(0)
    idle.busy(0)
    clock.now += 3.0
    idle.idle(0)
    idle.idle(1)
    clock.now += 1.0
    assert idle.take() == (2.0 + 1.0 + 3 * 6.0) / 4
    clock.now += 1.0
    idle.busy(1)
    clock.now += 1.0
    assert idle.take() == (2.0 + 1.0 + 2.0 + 2.0) / 4


def test_idle_time_leaves_out_a_pause() -> None:
    clock = Clock()
    idle = IdleTime(2, clock)
    clock.now += 50.0
    idle.go_on()
    clock.now += 1.0
    idle.pause()
    clock.now += 50.0
    idle.go_on()
    clock.now += 2.0
    idle.busy(0)
    clock.now += 4.0
    assert idle.take() == (3.0 + 7.0) / 2
    clock.now += 50.0
    idle.go_on()
    assert idle.take() == 0.0


def test_gauges_count_from_update_to_update() -> None:
    clock = Clock()
    figures = Gauges(num_rollouts=2, num_teachers=1, clock=clock)
    figures.add([Metric(key="loss/total", sum=3.0, count=2.0)])
    figures.count_tokens("rollout", 5)
    figures.count_tokens("rollout", 2)
    figures.trained([item("a", policy_version=3), item("b", policy_version=1)], version=3)
    figures.busy("rollout", 1)
    clock.now += 4.0
    assert reduce(figures.take({"queue/buffer": 7})) == {
        "loss/total": 1.5,
        "rollout/tokens": 7.0,
        "teacher/tokens": 0.0,
        "faults/restarts_rollout": 0.0,
        "faults/restarts_teacher": 0.0,
        "staleness/mean": 1.0,
        "staleness/max": 2.0,
        "queue/buffer": 7.0,
        "waiting/rollout": 2.0,
        "waiting/teacher": 4.0,
        "waiting/learner": 4.0,
    }
    later = reduce(figures.take({}))
    assert later["rollout/tokens"] == 0.0 and "loss/total" not in later and "staleness/max" not in later
