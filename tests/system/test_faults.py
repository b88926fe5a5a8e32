"""Runs on this machine whose workers, inputs and memory fail."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.chaos import ACTIVE, RESTARTING, chaos, is_unharmed, summary
from topd_ray.pipeline.ledger import read_ledger

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
KILLS = 30
"""Within the time of the test run; `make chaos KILLS=100` for more."""


@pytest.mark.timeout(2400)
def test_thirty_kills_lose_nothing(tmp_path: Path) -> None:
    found = summary(tmp_path, chaos(tmp_path, KILLS, seed=0))
    assert found["kills"] == KILLS and is_unharmed(found), found
    assert len({*ACTIVE, *RESTARTING} & set(found["kills_while"])) >= 4, found
    assert set(found["killed"]) == {"driver", "rollout", "teacher", "learner"}, found


def command(root: Path, name: str, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "-m", "topd_ray", "run", "jobs/demo.yaml", f"run.root={root}", f"run.name={name}"),
        *("data.heldout=null", "teacher.verify=false", "metrics.tensorboard=false", "rollout.max_new_tokens=64"),
        *("rollout.prompts_per_step=8", "run.steps=4", "resources.threads_per_learner=1", *overrides),
    ]


POISON = """
import importlib.abc, importlib.machinery, os, sys

class AfterImport(importlib.abc.MetaPathFinder):
    "Let a rollout engine end its process as soon as it is given the prompt whose id begins as TOPD_TEST_POISON says."

    def find_spec(self, name, path, target=None):
        if name != "topd_ray.engines.rollout":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            add = module.RolloutEngine.add

            def add_or_die(self, requests):
                requests = list(requests)
                if any(one.prompt.prompt_id.startswith(os.environ["TOPD_TEST_POISON"]) for one in requests):
                    os._exit(1)
                add(self, requests)

            module.RolloutEngine.add = add_or_die

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, AfterImport())
"""


def test_an_input_that_kills_workers_is_put_into_quarantine(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(POISON)
    rows = [{"id": f"p{index}", "prompt": f"{index} + 1"} for index in range(32)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    environment["TOPD_TEST_POISON"] = "p5-"  # a digest of the text follows
    overrides = (f"data.train={tmp_path / 'prompts.jsonl'}", "faults.max_attempts=3", "faults.max_restarts=20")
    done = subprocess.run(
        command(tmp_path, "run", *overrides), cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt_id"].startswith("p5-")
    report = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert (report.trained_once, report.quarantined, report.lost, report.doubled) == (31, 1, 0, 0)


def spilled_by(raylet: psutil.Process) -> int:
    """Bytes that lie on the disk now."""
    sessions = [one.split("=", 1)[1] for one in raylet.cmdline() if one.startswith("--session_dir=")]
    files = [file for session in sessions for file in Path(session).glob("ray_spilled_objects*/*")]
    return sum(file.stat().st_size for file in files if file.exists())


@pytest.mark.long
def test_an_object_store_that_is_too_small_spills(tmp_path: Path) -> None:
    """An update whose trajectories, each with the teacher's whole distribution, take more than Ray's smallest store."""
    large = ("rollout.prompts_per_step=5120", "rollout.samples_per_prompt=1", "teacher.top_k=full", "run.steps=1")
    store = ("resources.object_store_bytes=78643200", "objective.method=opd", "rollout.max_num_seqs=512")
    process = subprocess.Popen(
        command(tmp_path, "run", *large, *store), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    spilled = 0
    deadline = time.monotonic() + 500
    while process.poll() is None and time.monotonic() < deadline:
        raylets = [child for child in psutil.Process(process.pid).children(recursive=True) if child.name() == "raylet"]
        for raylet in raylets:
            with contextlib.suppress(psutil.Error):  # it has ended
                spilled = max(spilled, spilled_by(raylet))
        time.sleep(0.2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert spilled > 10_000_000, output
    assert read_ledger(tmp_path / "run" / "ledger.jsonl").trained_once == 5120
