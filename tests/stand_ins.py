"""Workers without engines for a fleet under real Ray; files in a folder tell them when to fail, and how.

A file `<role>-<moment>` is an order that a worker obeys when it comes to that moment: `die`, `stop` (SIGSTOP),
`interrupt` (SIGTERM), `pause` (a fifth of a second), `wait NAME` until there is a file of that name, or
`raise CLASS: message`, with `once` in front for the first worker only.
Moments are the names of methods, for some of them with what is asked for (`rollout-write-p3`, `learner1-learn`).
"""

import builtins
import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import cloudpickle

from topd_ray import errors
from topd_ray.actors.messages import GuidedChunk, GuidedItem, LearnerCheck, RolloutChunk
from topd_ray.config.schema import EvaluationConfig
from topd_ray.errors import PayloadLostError
from topd_ray.types import Completions, Metric, Prompt, RolloutRequest, UpdateReport
from topd_ray.weights.bundle import WeightsBundle
from topd_ray.weights.checksum import WeightReceipt
from topd_ray.weights.choice import open_channel
from topd_ray.weights.group import Group


class StandIn:
    folder: Path
    role: str

    def __init__(self, *, store: Any, rank: int | str = "", weights: Any = None, **parts: Any) -> None:
        self.store = store
        self.rank = rank
        broadcasts = weights is not None and weights.channel == "broadcast"
        self.channel = open_channel(weights, store, num_workers=2) if broadcasts else None

    def setup(self, *_: Any, **__: Any) -> str:
        self.obey("setup")
        return "stand-in"

    def shutdown(self) -> None:
        (self.folder / f"{self.role}-ended").touch()

    def pid(self) -> int:
        return os.getpid()

    def obey(self, moment: str) -> None:
        path = self.folder / f"{self.role}{self.rank}-{moment}"
        try:
            order = path.read_text()
            if order.startswith("once "):
                path.rename(path.with_suffix(".done"))
        except FileNotFoundError:  # no order, or another worker was first
            return
        order = order.removeprefix("once ")
        if order == "die":
            os._exit(1)
        if order == "stop":
            # This thread first: were the process told, another thread might take it, and this one answer before that.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        verb, _, rest = order.partition(" ")
        if order == "interrupt":
            os.kill(os.getpid(), signal.SIGTERM)
        if order == "pause":
            time.sleep(0.2)
        if verb == "wait":
            while not (self.folder / rest).exists():
                time.sleep(0.02)
        if verb == "raise":
            name, _, message = rest.partition(": ")
            raise getattr(errors, name, getattr(builtins, name, None))(message)  # type: ignore[misc]


class Rollout(StandIn):
    role = "rollout"

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.requests: queue.Queue[RolloutRequest] = queue.Queue()
        self.newest: WeightsBundle | None = None
        broadcast = Group.broadcast

        def obey(group: Group, octets: Any) -> None:
            broadcast(group, octets)
            self.obey("receive")  # a piece of the weights, more are to come

        Group.broadcast = obey  # type: ignore[method-assign]

    def submit(self, requests: Sequence[RolloutRequest], *, whole: bool) -> None:
        for request in requests:
            self.requests.put(request)

    def read(self) -> list[RolloutChunk]:
        return [self._write([self.requests.get()])]

    def generate(self, requests: Sequence[RolloutRequest], *, whole: bool) -> Iterator[RolloutChunk]:
        for share in [requests] if whole else [[request] for request in requests]:
            yield self._write(share)

    def generate_whole(self, requests: Sequence[RolloutRequest]) -> list[RolloutChunk]:
        return list(self.generate(requests, whole=True))

    def _write(self, requests: Sequence[RolloutRequest]) -> RolloutChunk:
        for request in requests:
            self.obey(f"write-{request.prompt.prompt_id}")
        return RolloutChunk(
            handle=self.store.put([request.trajectory_id for request in requests]),
            trajectory_ids=tuple(request.trajectory_id for request in requests),
            policy_versions=(self.newest.version if self.newest else 0,) * len(requests),
            num_tokens=(5,) * len(requests),
            metrics=(),
        )

    def update_weights(self, bundle: WeightsBundle, *, interrupt: bool = False) -> WeightReceipt | None:
        if self.channel is not None:
            self.obey(f"fetch-{bundle.version}")
            if self.channel.fetch(bundle) is None:
                return None
        if self.newest is None or self.newest.version < bundle.version:
            self.newest = bundle
        self.obey(f"update_weights-{bundle.version}")
        newest = self.newest
        return WeightReceipt(
            version=newest.version, num_tensors=1, num_bytes=newest.num_bytes, checksum=newest.checksum
        )

    def evaluate(self, prompts: Sequence[Prompt], *, evaluation: EvaluationConfig, seed: int) -> Iterator[Completions]:
        for prompt in prompts:
            self.obey("evaluate")
            served = self.newest.version if self.newest else -1
            yield Completions(correct={prompt.prompt_id: (True,)}, num_tokens=served, num_cut=0)

    def continue_prefixes(self, prefixes: Sequence[Any], num_tokens: int, *, seeds: Sequence[int]) -> list[Any]:
        self.obey("continue_prefixes")
        return [np.full(num_tokens, seed, np.int32) for seed in seeds]

    def own_teacher(self, requests: Sequence[RolloutRequest], top_k: int | str) -> list[GuidedItem]:
        return list(_guide(self.store, [self._write(requests)]))


class Teacher(StandIn):
    role = "teacher"

    def look_ahead(self, chunks: Sequence[RolloutChunk], threshold: float, student: Any = None) -> GuidedChunk:
        if student is not None:
            assert student.continue_prefixes([[1], [2]], 2, seeds=[3, 4])[1].tolist() == [4, 4]
            (self.folder / "teacher-resampled").touch()
        self.store.get([chunk.handle for chunk in chunks])
        for trajectory_id in (one for chunk in chunks for one in chunk.trajectory_ids):
            self.obey(f"look_ahead-{trajectory_id.split('/')[0]}")
        return GuidedChunk(items=tuple(_guide(self.store, chunks)), metrics=())

    def evaluate(self, prompts: Sequence[Prompt], *, evaluation: EvaluationConfig, seed: int) -> Iterator[Completions]:
        yield Completions(correct={prompt.prompt_id: (True,) for prompt in prompts}, num_tokens=1, num_cut=0)

    def verify(self, chunks: Sequence[RolloutChunk]) -> float | None:
        self.store.get([chunk.handle for chunk in chunks])
        return None


class Learner(StandIn):
    role = "learner"
    version = 0

    def rendezvous(self) -> str:
        return "tcp://nowhere"

    def learn(self, items: Sequence[GuidedItem], normalisers: Any) -> UpdateReport:
        lost = False
        try:
            self.store.get([item.handle for item in items])
        except PayloadLostError:
            lost = True
        self.obey("learn")
        self.obey(f"learn-{self.version}")
        if lost or (self.folder / "another-rank-lost-its-share").exists():
            (self.folder / "another-rank-lost-its-share").touch()
            raise PayloadLostError("gone")
        self.version += 1
        return UpdateReport(policy_version=self.version, metrics=[Metric(key="loss/total", sum=1.0)])

    def pack_weights(self) -> WeightsBundle | None:
        self.obey(f"pack_weights-{self.version}")
        if self.rank != 0:
            return None
        if self.channel is not None:
            return self.channel.send(self.version, [(str(i), torch.full((2**17,), self.version)) for i in range(3)])
        return WeightsBundle(
            version=self.version, content=self.store.put([self.version]), num_bytes=8, checksum=1000 + self.version
        )

    def preflight(self, items: list[GuidedItem]) -> LearnerCheck:
        return LearnerCheck(loss=0.0, largest_difference=0.0, mean_difference=0.0)

    def save(self, folder: Path) -> None:
        self.obey("save")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{self.rank}").write_text(str(self.version))

    def load(self, folder: Path) -> int:
        self.obey("load")
        self.version = int((folder / f"rank-{self.rank}").read_text())
        return self.version

    def export(self, folder: Path) -> None:
        self.obey("export")
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (folder / "student").write_text(str(self.version))


def _guide(store: Any, chunks: Sequence[RolloutChunk]) -> Iterator[GuidedItem]:
    for chunk in chunks:
        for row, (trajectory_id, version) in enumerate(zip(chunk.trajectory_ids, chunk.policy_versions, strict=True)):
            yield GuidedItem(
                handle=store.put([trajectory_id]),
                row=row,
                trajectory_id=trajectory_id,
                policy_version=version,
                num_tokens=5,
                num_sequence_tokens=9,
                num_guided=1.0,
                num_bytes=100,
                distances=(0.1,),
            )


class Orders:
    """Gives orders to the workers of `workers(folder)`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, moment: str, order: str = "") -> None:
        unfinished = self.folder / "unfinished"
        unfinished.write_text(order)
        unfinished.rename(self.folder / moment)

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


def workers(folder: Path) -> dict[str, type]:
    """For `crew.WORKERS`; orders lie in `folder`."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return {kind.role: type(kind.__name__, (kind,), {"folder": folder}) for kind in (Rollout, Teacher, Learner)}
