"""What is needed to understand a failure, in one folder that can be passed on.

runs/<name>/post-mortem/<UTC time>/
    error.txt            the exception with its traceback and causes
    about.json           time, command, versions, environment, nodes, and what was left out
    config.yaml          the resolved config
    metrics.jsonl        the run's last lines; the same of quarantine.jsonl and of each file ledger*, if any
    logs/<node>/...      the end of what this job's workers wrote, one file for each process and stream
    failed_batch/        the batch that failed, if one was saved or listed

Bounded in size and in time; text is without secrets (`topd_ray.redaction`), the batch is as it was.
"""

import json
import os
import platform
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import ray

from topd_ray.actors.node_facts import versions
from topd_ray.actors.worker_logs import ASK_SECONDS, NodeLogs, other_nodes, own_node
from topd_ray.config.load import dump_config
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import RunInterrupted
from topd_ray.pipeline.plan import Say
from topd_ray.redaction import REDACTED, SECRET_NAME, Redactor

LINES = 200
"""Of metrics, of what was given up and of each ledger."""
TEXT_BYTES = 1024**2
"""Of each of these, and of the error."""
BATCH_BYTES = 256 * 1024**2
"""Of all files of the failed batch together."""
KEPT = 5
"""Bundles of a run; older ones are deleted."""
ENVIRONMENT = ("CUDA_", "NCCL_", "GLOO_", "OMP_", "RAY_", "VLLM_", "TORCH_", "DS_", "HF_", "TOPD_")
"""Variables whose names begin so are written down."""


def write_post_mortem(config: TopdConfig, error: BaseException, say: Say) -> Path | None:
    """Write the bundle of a run that fails with `error`, while its Ray still runs; returns its folder.

    None for an interrupt, which is no failure, and where it cannot be written: it then says why, and never raises over
    the error that there already is.
    """
    if isinstance(error, RunInterrupted) or not isinstance(error, Exception):
        return None
    try:
        folder = _Bundle(config).write(error)
        _delete_oldest(folder.parent)
    except Exception as problem:  # whatever it is, the run's own error matters more
        say(f"no post-mortem bundle could be written: {type(problem).__name__}: {problem}")
        return None
    say(f"what is needed to understand the failure is in {folder}/")
    return folder


class _Bundle:
    def __init__(self, config: TopdConfig) -> None:
        self._config = config
        self._run = config.run.folder.absolute()
        self._redact = Redactor()
        self._left_out: list[str] = []
        name = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        self._target = self._run / "post-mortem" / name
        self._folder = self._target.with_name(f".{name}.tmp")

    def write(self, error: BaseException) -> Path:
        self._folder.mkdir(parents=True)
        try:
            self._text("error.txt", "".join(traceback.format_exception(error)))
            self._text("config.yaml", dump_config(self._config))
            lines = [self._run / name for name in ("metrics.jsonl", "quarantine.jsonl")]
            for path in [*lines, *sorted(self._run.glob("ledger*"))]:
                self._try(path.name, partial(self._tail, path))
            nodes = self._try("logs", self._logs) or []
            self._try("failed_batch", self._batch)
            self._text("about.json", json.dumps(self._about(nodes), indent=1) + "\n")
            self._folder.rename(self._target)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self._target

    def _text(self, name: str, text: str) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._redact(text[-TEXT_BYTES:]), encoding="utf-8")

    def _try(self, part: str, collect: Callable[[], Any]) -> Any:
        """A part that cannot be had is left out, and said so."""
        try:
            return collect()
        except Exception as error:  # a torn file, a dead cluster: the other parts are still of use
            self._left_out.append(f"{part}: {type(error).__name__}: {error}")
            return None

    def _tail(self, path: Path) -> None:
        if path.is_file():
            cut = max(0, path.stat().st_size - TEXT_BYTES)
            with path.open("rb") as file:
                file.seek(cut)
                lines = file.read(TEXT_BYTES).decode(errors="replace").splitlines(keepends=True)
            whole = lines[1:] if cut else lines
            self._text(path.name, "".join(whole[-LINES:]))

    def _logs(self) -> list[dict[str, Any]]:
        """Write logs, this node's first, which needs nobody's answer; returns the nodes."""
        if not ray.is_initialized():
            self._left_out.append("logs: Ray does not run")
            return []
        self._write_logs("driver-node", own_node())
        nodes, logs, problems = _within(ASK_SECONDS + 10.0, other_nodes)
        self._left_out += problems
        for address, found in logs.items():
            self._write_logs(address, found)
        return [asdict(node) for node in nodes]

    def _write_logs(self, node: str, found: NodeLogs) -> None:
        for name, text in found.logs.items():
            path = self._folder / "logs" / node.replace(":", "_") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        self._left_out += [f"logs/{node}/{name}: no room" for name in found.left_out]

    def _batch(self) -> None:
        room = BATCH_BYTES
        folder = self._run / "failed_batch"
        files = [*folder.glob("*.parquet"), *folder.glob("*.jsonl")]
        for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            size = path.stat().st_size
            if size > room:
                self._left_out.append(f"{path}: {size} bytes, no room")
                continue
            room -= size
            (self._folder / "failed_batch").mkdir(exist_ok=True)
            shutil.copyfile(path, self._folder / "failed_batch" / path.name)

    def _about(self, nodes: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": self._config.run.name,
            "command": self._redact(" ".join(sys.argv)),
            "host": platform.node(),
            "platform": platform.platform(),
            "versions": versions(),
            "environment": {
                name: REDACTED if SECRET_NAME.search(name) and not name.endswith("_PATH") else value
                for name, value in sorted(os.environ.items())
                if name.startswith(ENVIRONMENT)
            },
            "nodes": nodes,
            "left_out": self._left_out,
        }


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What `ask` returns. Raises TimeoutError after `seconds`: a cluster whose head is gone may never answer."""
    answer: list[Any] = []
    failure: list[Exception] = []

    def work() -> None:
        try:
            answer.append(ask())
        except Exception as error:  # raised again in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=work, name="post-mortem", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise TimeoutError(f"Ray did not answer within {seconds:g} s")
    return answer[0]


def _delete_oldest(folder: Path) -> None:
    for path in sorted(folder.glob("[0-9]*Z"))[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)
