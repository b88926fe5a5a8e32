"""The workloads, and what is measured of each."""

import itertools
from dataclasses import replace
from statistics import median

from bench.asynchronous import ray_hop
from bench.asynchronous.run import Seen, run
from bench.asynchronous.workload import Workload
from bench.report import Row

BALANCED = Workload(
    name="balanced",
    num_slots=2,
    prompts_per_step=256,
    median_length=400.0,
    sigma=0.5,
    longest=1200,
    step_seconds=2e-4,
    sequence_seconds=5e-5,
    score_seconds=6e-6,
    train_seconds=8e-7,
).scaled(1.2)
"""Rollout, teacher and learner need about 0.65, 0.8 and 1 of an update's time, the longest response 1.7."""
LONG_TAIL = replace(BALANCED, name="long_tail", sigma=0.9, longest=2000, median_length=280.0)
"""The same work a batch within 10 %, but the longest responses take about three updates' time."""
SLOW_LEARNER = replace(BALANCED, name="slow_learner", train_seconds=3e-6, max_bytes=420 * 1024**2).scaled(0.2)
"""Its buffer holds about two and a half batches, one of which the learner has."""
SLOW_WRITERS = replace(BALANCED, name="slow_writers", step_seconds=8e-4)
MANY = Workload(
    name="many",
    num_slots=40,
    num_teachers=16,
    prompts_per_step=1250,
    samples_per_prompt=4,
    sigma=0.5,
    longest=1200,
    step_seconds=1.5e-3,
    sequence_seconds=2e-5,
    score_seconds=8e-6,
    train_seconds=5e-7,
    max_bytes=32 * 1024**3,
)
"""5,000 trajectories an update, and 256 x 40 slots for 10,000."""
STALENESS = (0, 1, 2, 4)
GOAL_RATE, GOAL_BOUND = 1.6, 0.9
MOST_CONTROL_MS = 1.0
MOST_GROWTH = 1.02


def sweep(workload: Workload, *, num_updates: int, repeats: int) -> dict[int, list[Seen]]:
    """Runs by max_staleness, which take turns."""
    runs: dict[int, list[Seen]] = {staleness: [] for staleness in STALENESS}
    for _, staleness in itertools.product(range(repeats), STALENESS):
        runs[staleness].append(run(workload, staleness, num_updates=num_updates))
    return runs


def rate_rows(runs: dict[int, list[Seen]], goal_at: int) -> list[Row]:
    """Each staleness against the synchronous runs, and against the slowest stage with a goal for `goal_at`."""
    rows = []
    for staleness, seen in runs.items():
        name = f"{seen[0].workload}_staleness_{staleness}"
        rates, unit = [one.rate for one in seen], "trajectories/s"
        if staleness:
            synchronous = [one.rate for one in runs[0]]
            rows.append(row(f"{name}_vs_synchronous", rates, synchronous, "max_staleness 0", unit, GOAL_RATE))
        slowest = min(seen[0].bounds, key=seen[0].bounds.__getitem__)
        goal = GOAL_BOUND if staleness == goal_at else None
        rows.append(row(f"{name}_vs_bound", rates, [one.bound for one in seen], f"bound of the {slowest}", unit, goal))
    return rows


def control_rows(seen: list[Seen]) -> list[Row]:
    """Of several runs with as many trajectories open as `most_open` says."""
    name, limit = f"control_{seen[0].most_open}_open", [MOST_CONTROL_MS] * len(seen)
    return [
        row(f"{name}_cpu", [one.control_cpu_ms for one in seen], limit, "limit", "ms/trajectory", 1.0),
        row(f"{name}_wall", [one.control_wall_ms for one in seen], limit, "limit", "ms/trajectory", 1.0),
    ]


def memory_rows(seen: Seen, batch_size: int, max_bytes: int) -> list[Row]:
    """Of one long run. Memory: the last fifth of the updates against the third one."""
    fifth = len(seen.rss_mb) // 5
    before, after = median(seen.rss_mb[2 * fifth : 3 * fifth]), median(seen.rss_mb[-fifth:])
    most = (seen.max_staleness + 1) * batch_size
    return [
        row("memory_most_open", [seen.most_open], [most], "(max_staleness + 1) batches", "trajectories", 1.0),
        row("memory_buffer", [seen.most_bytes / 1e6], [max_bytes / 1e6], "buffer.max_bytes", "MB", 1.0),
        row("memory_driver_rss", [after], [before], "two fifths of the updates earlier", "MB", MOST_GROWTH),
    ]


def waiting_rows(slow_learner: Seen, slow_writers: Seen) -> list[Row]:
    """Back-pressure: who waits (seconds an update, mean over the workers) while the slowest stage sets the rate."""
    waits = [(slow_learner, "rollout", "learner"), (slow_writers, "learner", "rollout")]
    return [
        row(
            f"{seen.workload}_{fast}_waits",
            [seen.means[f"waiting/{slow}"]],
            [seen.means[f"waiting/{fast}"]],
            f"the {fast}'s wait",
            "s",
            1.0,
        )
        for seen, fast, slow in waits
    ] + [
        row(f"{seen.workload}_vs_bound", [seen.rate], [seen.bound], f"bound of the {slow}", "trajectories/s", None)
        for seen, _, slow in waits
    ]


def ray_rows(workload: Workload) -> list[Row]:
    """The driver with Ray's hop: its thread alone, and its process with Ray's threads."""
    seen = ray_hop.measure(workload, 1, 2)
    return [
        row(f"ray_{name}_cpu", [seen[f"{name}_ms"]], [MOST_CONTROL_MS], "limit", "ms/trajectory", goal)
        for name, goal in (("thread", 1.0), ("process", None))
    ]


def row(name: str, ours: list[float], peer: list[float], peer_version: str, unit: str, goal: float | None) -> Row:
    ratios = [one / other for one, other in zip(ours, peer, strict=True)]
    return {
        "name": name,
        "ours": round(median(ours), 4),
        "peer": round(median(peer), 4),
        "peer_version": peer_version,
        "unit": unit,
        "ratio": round(median(ratios), 4),
        "goal": goal,
        "repeats": len(ours),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
    }
