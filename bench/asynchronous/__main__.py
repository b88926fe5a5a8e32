"""`make bench-async`: the simulation, `results/async.json`, `results/async_about.json` and the tables of README.md.

    python -m bench.asynchronous

Takes about three minutes, most of them asleep. A goal that is missed is said, and is no failure.
"""

import json
import sys
import time
from pathlib import Path

from bench.__main__ import table
from bench.asynchronous import cases
from bench.asynchronous.cases import BALANCED, LONG_TAIL, MANY, SLOW_LEARNER, SLOW_WRITERS
from bench.asynchronous.run import Seen, run
from bench.report import FOLDER, Row, is_met, versions
from topd_ray.provenance import machine

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- make bench-async: begin -->\n", "<!-- make bench-async: end -->\n"
COLUMNS = {
    "waits: rollout (s)": "waiting/rollout",
    "teacher": "waiting/teacher",
    "learner": "waiting/learner",
    "queue: writing": "queue/writing",
    "teacher ": "queue/teacher",
    "buffer": "queue/buffer",
    "staleness: mean": "staleness/mean",
    "max": "staleness/max",
}


def main() -> int:
    started = time.perf_counter()
    rows, runs = measure()
    seconds = time.perf_counter() - started
    print(table(rows), end="")
    if missed := [row["name"] for row in rows if not is_met(row)]:
        print(f"GOAL MISSED: {', '.join(missed)}")
    write_results(rows, runs, seconds)
    return 0


def measure() -> tuple[list[Row], list[Seen]]:
    """All rows, and a run of each kind."""
    rows: list[Row] = []
    runs: list[Seen] = []
    for workload, goal_at in ((BALANCED, 2), (LONG_TAIL, 4)):
        swept = cases.sweep(workload, num_updates=6, repeats=3)
        rows += cases.rate_rows(swept, goal_at)
        runs += [sorted(seen, key=lambda one: one.rate)[1] for seen in swept.values()]
        runs += [run(workload, staleness, "finish", num_updates=6) for staleness in (1, 2, 4)]
        print(f"{workload.name} is done", flush=True)
    slow_learner = run(SLOW_LEARNER, 2, num_updates=60)
    slow_writers = run(SLOW_WRITERS, 2, num_updates=5)
    rows += cases.memory_rows(slow_learner, SLOW_LEARNER.batch_size, SLOW_LEARNER.max_bytes)
    rows += cases.waiting_rows(slow_learner, slow_writers)
    many = [run(MANY, 1, skip=1, num_updates=2) for _ in range(3)]
    rows += cases.control_rows(many)
    print("ten thousand in flight are done", flush=True)
    rows += cases.ray_rows(MANY)
    return rows, [*runs, slow_learner, slow_writers, many[0]]


def runs_table(runs: list[Seen]) -> str:
    """A Markdown table of what the flow's own metrics say."""
    titles = ["case", "S", "new weights", "trajectories/s", "of bound", "dropped", *COLUMNS, "control (ms)"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for seen in runs:
        mode = seen.on_new_weights if seen.max_staleness else ""
        cells = [seen.workload, str(seen.max_staleness), mode, f"{seen.rate:.0f}", f"{seen.rate / seen.bound:.2f}"]
        cells += [f"{seen.dropped_share:.1%}", *(f"{seen.means[key]:.3g}" for key in COLUMNS.values())]
        lines.append(f"| {' | '.join([*cells, f'{seen.control_cpu_ms:.3f}'])} |")
    return "\n".join(lines) + "\n"


def write_results(rows: list[Row], runs: list[Seen], seconds: float) -> None:
    about = {"seconds": round(seconds), "machine": machine(), "versions": versions()}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "async.json").write_text(json.dumps(rows, indent=1) + "\n")
    about["runs"] = [seen.figures() for seen in runs]
    (FOLDER / "async_about.json").write_text(json.dumps(about, indent=1) + "\n")
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    place = machine()
    where = f"{place['cores']} cores of {place['cpu']}, {round(seconds)} s for all of it:\n\n"
    tables = where + table(rows).replace(" | ours / floor |", " | |") + "\n" + runs_table(runs)
    README.write_text(f"{before}{BEGIN}{tables}{END}{after}")
    print(f"written: {FOLDER / 'async.json'}, async_about.json, and the tables of {README}")


if __name__ == "__main__":
    sys.exit(main())
