"""The measurements that need no GPU, one part after the other: `make bench`, or `python -m bench [PART ...]`.

Each part runs in a process of its own, under a time limit. A run of all parts writes `results/cpu.json` (rows), its
neighbour `results/cpu_about.json` (machine, versions, floors) and the table in README.md; a run of some only prints.
Exits with 1 if a part could not run; a goal that is missed is said, and is no failure.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.report import FOLDER, Row, is_met, versions
from topd_ray.provenance import machine

PARTS = {"transport": 20, "loss": 195, "packing": 55, "end_to_end": 330}
"""`bench.<part>.measure()` gives the rows; seconds it may take. Together less than ten minutes."""
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- make bench: begin -->\n", "<!-- make bench: end -->\n"
CHILD = """
import importlib, json, sys
with open(sys.argv[2], "w") as file:
    json.dump(importlib.import_module(sys.argv[1]).measure(), file)
"""


class PartError(RuntimeError):
    """A part could not run, or gave something else than rows."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Ours against the peers, on the CPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parts = parser.parse_args().parts or list(PARTS)
    if strangers := sorted(set(parts) - set(PARTS)):
        parser.error(f"unknown part {', '.join(strangers)}: the parts are {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the part in hand ends too
    started = time.perf_counter()
    rows: list[Row] = []
    failed = []
    for part in parts:
        print(f"[{time.perf_counter() - started:4.0f} s] {part}, at most {PARTS[part]} s", flush=True)
        try:
            rows += run_part(part)
        except PartError as error:
            failed.append(part)
            print(f"{part} could not run: {error}", file=sys.stderr, flush=True)
    print(table(rows), end="")
    missed = [row["name"] for row in rows if not is_met(row)]
    if missed:
        print(f"GOAL MISSED: {', '.join(missed)}")
    if failed:
        print(f"COULD NOT RUN: {', '.join(failed)}; nothing was written", file=sys.stderr)
        return 1
    if set(parts) == set(PARTS):
        write_results(rows, time.perf_counter() - started)
    else:
        print("not all parts: nothing was written")
    return 0


def run_part(part: str) -> list[Row]:
    """The rows of one part. Raises PartError."""
    with tempfile.TemporaryDirectory(prefix=f"bench-{part}-") as folder:
        log, output = Path(folder) / "log", Path(folder) / "rows.json"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", CHILD, f"bench.{part}", str(output)], stdout=file, stderr=subprocess.STDOUT
            )
        try:
            code = process.wait(PARTS[part])
        except subprocess.TimeoutExpired:
            raise PartError(f"it took more than {PARTS[part]} s\n{tail(log)}") from None
        finally:
            process.terminate()
            process.wait()
        if code != 0:
            raise PartError(f"exit code {code}\n{tail(log)}")
        return checked(json.loads(output.read_text()))


def tail(log: Path, num_lines: int = 20) -> str:
    return "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-num_lines:])


def checked(rows: list[Row]) -> list[Row]:
    """`rows` if each has all keys and numbers that are some. Raises PartError."""
    if not rows:
        raise PartError("it gave no rows")
    for row in rows:
        if missing := Row.__required_keys__ - set(row):
            raise PartError(f"row {row.get('name')} lacks {', '.join(sorted(missing))}")
        numbers = [row["ours"], row["peer"], row["ratio"], *row["spread"]]
        if not all(isinstance(one, (int, float)) and math.isfinite(one) for one in numbers):
            raise PartError(f"row {row['name']} holds {numbers}, right would be finite numbers")
    return rows


def table(rows: list[Row]) -> str:
    """A Markdown table; the verdict says whether the goal is met."""
    lines = ["| measurement | unit | ours | peer | ratio [spread] | goal | | ours / floor |", "| --- " * 8 + "|"]
    for row in rows:
        sign = "≥" if row["unit"].endswith("/s") else "≤"
        goal = "" if row["goal"] is None else f"{sign} {row['goal']:g}"
        verdict = "" if row["goal"] is None else "met" if is_met(row) else "**missed**"
        low, high = row["spread"]
        ratio = f"{row['ratio']:.3g} [{low:.3g}, {high:.3g}]"
        floor = f"{row['ours'] / row['floor']:.2g}" if "floor" in row else ""
        peer = f"{row['peer']:.4g} ({row['peer_version']})"
        lines.append(
            f"| `{row['name']}` | {row['unit']} | {row['ours']:.4g} | {peer} | {ratio} | {goal} | {verdict} | {floor} |"
        )
    return "\n".join(lines) + "\n"


def write_results(rows: list[Row], seconds: float) -> None:
    """The rows, what they were taken on, and the table of README.md."""
    plain = [{key: row[key] for key in row if key != "floor"} for row in rows]  # type: ignore[literal-required]
    about = {
        "seconds": round(seconds),
        "machine": machine(),
        "versions": versions(),
        "floors": {row["name"]: row["floor"] for row in rows if "floor" in row},
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "cpu.json").write_text(json.dumps(plain, indent=1) + "\n")
    (FOLDER / "cpu_about.json").write_text(json.dumps(about, indent=1) + "\n")
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    place = about["machine"]
    where = f"{place['cores']} cores of {place['cpu']}, {round(seconds)} s for all of it:\n\n"  # type: ignore[index]
    README.write_text(f"{before}{BEGIN}{where}{table(rows)}{END}{after}")
    print(f"written: {FOLDER / 'cpu.json'}, cpu_about.json, and the table of {README}")


if __name__ == "__main__":
    sys.exit(main())
