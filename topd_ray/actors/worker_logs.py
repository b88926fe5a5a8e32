"""What this job's workers wrote to their logs, on every node."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from topd_ray.actors.placement import cluster_nodes
from topd_ray.actors.room import Node
from topd_ray.redaction import Redactor

FILE_BYTES = 256 * 1024
"""Kept of each log: its end."""
NODE_BYTES = 4 * 1024**2
"""Kept of all logs of a node, those written to last first."""
LEAST_BYTES = 4096
"""Room for less is none."""
ASK_SECONDS = 20.0
"""How long other nodes have to answer."""
_NAME = re.compile(r"worker-[0-9a-f]+-[0-9a-f]+-(?P<pid>\d+)\.(?P<stream>out|err)")
_HEADER = re.compile(r":(?P<key>job_id|actor_name|task_name):(?P<value>.*)\n")
"""Ray's first lines. The file's name has the job only of processes that were started for it, not of those at hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLogs:
    """Logs of one node by file name, without secrets, and the names of those for which there was no room."""

    logs: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def own_node() -> NodeLogs:
    """Of the driver's node; asks nobody, so that it works while Ray does not."""
    return _look(ray.get_runtime_context().get_job_id())


def other_nodes() -> tuple[list[Node], dict[str, NodeLogs], list[str]]:
    """All nodes that are alive, logs by address of those but the driver's own, and why some are missing."""
    nodes, context = cluster_nodes(), ray.get_runtime_context()
    asked = {
        ray.remote(_look)
        .options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        )
        .remote(context.get_job_id()): node.address
        for node in nodes
        if node.node_id != context.get_node_id()
    }
    found, problems = {}, []
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ASK_SECONDS) if asked else ([], [])
    for future in ready:
        try:
            found[asked[future]] = ray.get(future)
        except Exception as error:  # the node died, or is too ill: what the others said is still of use
            problems.append(f"logs of {asked[future]}: {type(error).__name__}")
    return nodes, found, problems + [f"logs of {asked[future]}: no answer in {ASK_SECONDS:g} s" for future in late]


def tails(folder: Path, job_id: str) -> NodeLogs:
    """The ends of the logs in `folder` whose workers belonged to `job_id`; empty logs are no logs."""
    redact, kept, left_out, room = Redactor(), {}, [], NODE_BYTES
    for path, name, start in _of_job(folder, job_id):
        if room < LEAST_BYTES:
            left_out.append(name)
            continue
        text = redact(_tail(path, start, min(FILE_BYTES, room)))
        if text.strip():
            kept[name] = text
            room -= len(text.encode())
    return NodeLogs(logs=kept, left_out=tuple(left_out))


def _look(job_id: str) -> NodeLogs:
    node = ray._private.worker.global_worker.node  # no public name for this node's folder of logs
    return tails(Path(node.get_logs_dir_path()), job_id)


def _of_job(folder: Path, job_id: str) -> Iterator[tuple[Path, str, int]]:
    """(log, class and process that wrote it, bytes of Ray's header), written to last first."""
    named = [(path, match) for path in folder.glob("worker-*") if (match := _NAME.fullmatch(path.name))]
    for path, match in sorted(named, key=lambda pair: pair[0].stat().st_mtime_ns, reverse=True):
        job, actor, start = _header(path)
        if job == job_id:
            yield path, f"{actor}-{match['pid']}.{match['stream']}", start


def _header(path: Path) -> tuple[str | None, str, int]:
    """The job, the class of the actor, and where its own output begins."""
    with path.open("rb") as file:
        head = file.read(4096).decode(errors="replace")
    said, start = {}, 0
    while line := _HEADER.match(head, start):
        said[line["key"]], start = line["value"], line.end()
    return said.get("job_id"), re.sub(r"[^\w.-]", "_", said.get("actor_name", "worker")), start


def _tail(path: Path, start: int, num_bytes: int) -> str:
    """The last `num_bytes` from byte `start` on, from the beginning of a line: half a line may hide half a secret."""
    size = path.stat().st_size
    cut = size - start > num_bytes
    with path.open("rb") as file:
        file.seek(max(start, size - num_bytes))
        text = file.read(num_bytes).decode(errors="replace")
    return text.partition("\n")[2] if cut else text
