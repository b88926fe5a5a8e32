"""One run of the driver over sleeping engines, and what is seen of it."""

import time
from dataclasses import asdict, dataclass, field
from statistics import mean

import psutil

from bench.asynchronous.fleet import SleepingFleet
from bench.asynchronous.workload import OnNewWeights, Workload
from topd_ray.pipeline.flow import Flow

METRICS = (
    "waiting/rollout",
    "waiting/teacher",
    "waiting/learner",
    "queue/rollout",
    "queue/writing",
    "queue/teacher",
    "queue/buffer",
    "queue/bytes",
    "staleness/mean",
    "staleness/max",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Of the updates after the first ones."""

    workload: str
    max_staleness: int
    on_new_weights: OnNewWeights
    num_updates: int
    num_trained: int
    seconds: float
    rate: float
    """trained trajectories/s"""
    bounds: dict[str, float]
    """trajectories/s of each stage at most; see Workload.bounds"""
    control_cpu_ms: float
    """a trajectory, of the driver's thread outside the engines"""
    control_wall_ms: float
    engines_cpu_ms: float
    """a trajectory, of the simulation's own bookkeeping"""
    dropped_share: float
    """of the guided trajectories"""
    most_open: int
    """trajectories, from the beginning on"""
    most_bytes: int
    """of the buffer, from the beginning on"""
    means: dict[str, float]
    """of the updates' metrics, a sum over its count"""
    rss_mb: list[float] = field(repr=False)
    """of this process after each update, the first ones too"""

    @property
    def bound(self) -> float:
        return min(self.bounds.values())

    def figures(self) -> dict[str, object]:
        return {key: value for key, value in asdict(self).items() if key != "rss_mb"}


class Watch:
    """The highest that a flow has come to whenever it waits."""

    def __init__(self) -> None:
        self.most_open = 0
        self.most_bytes = 0
        self.flow: Flow | None = None

    def __call__(self) -> None:
        if self.flow is not None:
            self.most_open = max(self.most_open, len(self.flow._tasks))
            self.most_bytes = max(self.most_bytes, self.flow._buffer.num_bytes)


def run(
    workload: Workload,
    max_staleness: int,
    on_new_weights: OnNewWeights = "interrupt",
    *,
    num_updates: int,
    skip: int | None = None,
) -> Seen:
    """Make `num_updates` updates after the first `skip` (as many as it takes until all stages overlap)."""
    skip = 2 + max_staleness if skip is None else skip
    watch = Watch()
    fleet = SleepingFleet(workload, on_new_weights, before_wait=watch)
    open_at_end = max_staleness + 1  # so that the flow does not run dry in the updates that count
    watch.flow = flow = Flow(
        workload.config(max_staleness, on_new_weights),
        fleet,
        workload.tasks(skip + num_updates + open_at_end),
        updates_left=skip + num_updates + open_at_end,
        policy_version=0,
        threshold=lambda: 0.3,
    )
    process, rss = psutil.Process(), []
    for _ in range(skip):
        flow.update()
        rss.append(process.memory_info().rss / 1e6)
    started, cpu = time.perf_counter(), time.thread_time()
    engines_cpu, engines_wall = fleet.cpu_seconds, fleet.wall_seconds
    updates = []
    for _ in range(num_updates):
        update = flow.update()
        updates.append(
            (len(update.items), update.num_dropped, {one.key: one.sum / one.count for one in update.metrics})
        )
        rss.append(process.memory_info().rss / 1e6)
    seconds, cpu = time.perf_counter() - started, time.thread_time() - cpu
    engines_cpu, engines_wall = fleet.cpu_seconds - engines_cpu, fleet.wall_seconds - engines_wall
    num_trained, num_dropped = sum(one[0] for one in updates), sum(one[1] for one in updates)
    return Seen(
        workload=workload.name,
        max_staleness=max_staleness,
        on_new_weights=on_new_weights,
        num_updates=num_updates,
        num_trained=num_trained,
        seconds=seconds,
        rate=num_trained / seconds,
        bounds=workload.bounds(skip, num_updates, on_new_weights),
        control_cpu_ms=1e3 * (cpu - engines_cpu) / num_trained,
        control_wall_ms=1e3 * (seconds - engines_wall) / num_trained,
        engines_cpu_ms=1e3 * engines_cpu / num_trained,
        dropped_share=num_dropped / (num_trained + num_dropped),
        most_open=watch.most_open,
        most_bytes=watch.most_bytes,
        means={key: mean(metrics[key] for _, _, metrics in updates) for key in METRICS},
        rss_mb=rss,
    )
