"""The learner worker: one data-parallel rank of the DeepSpeed learner."""

import os
import socket
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from torch.distributed import DistError

from topd_ray.actors.messages import GuidedItem, LearnerCheck, Normalisers
from topd_ray.actors.store import Store
from topd_ray.config.schema import LearnerConfig, ObjectiveConfig, StudentConfig, WeightsConfig
from topd_ray.data.arrow import GUIDED_SCHEMA, batch_to_guided
from topd_ray.errors import LearnerError, NonFiniteLossError, PayloadLostError
from topd_ray.types import GuidedTrajectory, UpdateReport
from topd_ray.weights.bundle import WeightsBundle
from topd_ray.weights.choice import open_channel


def interface_of(address: str) -> str:
    """The network interface that carries `address`.

    Left alone, gloo takes the one that the node's own name resolves to, which is the loopback on many systems, and NCCL
    any other.
    """
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    raise LearnerError(f"this node has no network interface with the address {address} that Ray knows it by")


class LearnerWorker:
    """One rank. Calls that say 'collective' must be made on every rank."""

    def __init__(
        self,
        student: StudentConfig,
        learner: LearnerConfig,
        objective: ObjectiveConfig,
        *,
        weights: WeightsConfig,
        num_rollout_workers: int,
        temperature: float,
        total_updates: int,
        rank: int,
        timeout_seconds: float,
        threads: int,
        seed: int,
        deterministic: bool,
        failed_batch_folder: Path,
        store: Store,
    ) -> None:
        self._store = store
        self._rank = rank
        self._num_ranks = learner.num_ranks
        self._failed_batch_folder = failed_batch_folder
        self._rollout_dtype = student.dtype
        self._channel = open_channel(weights, store, num_workers=num_rollout_workers)
        self._parts: dict[str, Any] = {
            "student": student,
            "learner": learner,
            "objective": objective,
            "temperature": temperature,
            "total_updates": total_updates,
            "rank": rank,
            "world_size": learner.num_ranks,
            "timeout_seconds": timeout_seconds,
            "threads": threads,
            "seed": seed,
            "deterministic": deterministic,
        }

    def rendezvous(self) -> str:
        """An address on this rank's node at which the ranks can meet."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((address, 0))
            return f"tcp://{address}:{free.getsockname()[1]}"

    def setup(self, init_method: str | None) -> str:
        """Load the student; with several ranks, meet the others at `init_method` (collective).

        Returns the name of the attention implementation that was chosen for it.
        """
        from topd_ray.engines.learner import LearnerEngine  # DeepSpeed is loaded where it runs, not in the driver

        if init_method is not None:
            interface = interface_of(ray.util.get_node_ip_address())
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # this one, not all that begin with its name
        try:
            self._engine = LearnerEngine(**self._parts, init_method=init_method)
        except RuntimeError as error:
            if not isinstance(error, DistError) and not str(error).startswith("Gloo"):  # gloo has no class of its own
                raise
            raise LearnerError(
                f"learner rank {self._rank} cannot meet the others at {init_method}: {error}; nodes must reach each "
                "other on all ports above 1023, as Ray itself needs it"
            ) from error
        return self._engine.attention

    def learn(self, items: Sequence[GuidedItem], normalisers: Normalisers) -> UpdateReport:
        """Apply one update to this rank's share of a batch (collective).

        Raises NonFiniteLossError, with the weights as before, and the share saved as Parquet for a look if that works;
        PayloadLostError on every rank, with the weights as before, if one cannot fetch its share.
        """
        guided, missing = self._try_fetch(items)
        if not self._engine.all_ranks(missing is None):
            raise missing or PayloadLostError("another rank cannot fetch its share of the batch")
        try:
            metrics = self._engine.learn(
                guided,
                num_tokens=normalisers.num_tokens,
                num_guided=normalisers.num_guided,
                num_trajectories=normalisers.num_trajectories,
            )
        except NonFiniteLossError as error:
            try:
                saved = f"is in {self._save_share(items)}"
            except (OSError, PayloadLostError) as reason:
                saved = f"could not be saved: {reason}"
            raise NonFiniteLossError(f"{error}; this rank's share of the batch {saved}") from error
        return UpdateReport(policy_version=self._engine.policy_version, metrics=metrics)

    def preflight(self, items: list[GuidedItem]) -> LearnerCheck:
        """Compare the learner with whoever scored `items` (collective).

        Every rank is given all of `items`, and the loss is summed over ranks.
        """
        guided = self._fetch(items)
        normalisers = Normalisers.of(items * self._num_ranks)
        loss = self._engine.loss(
            guided,
            num_tokens=normalisers.num_tokens,
            num_guided=normalisers.num_guided,
            num_trajectories=normalisers.num_trajectories,
        )
        logprobs = self._engine.logprobs([one.trajectory for one in guided])
        differences = np.concatenate(
            [np.abs(mine - one.scores.sampled_logprobs) for mine, one in zip(logprobs, guided, strict=True)]
        )
        return LearnerCheck(
            loss=loss, largest_difference=float(differences.max()), mean_difference=float(differences.mean())
        )

    def pack_weights(self) -> WeightsBundle | None:
        """Make the current policy ready to be fetched (collective); only rank 0 returns it."""
        import torch

        tensors = self._engine.state_tensors(getattr(torch, self._rollout_dtype), self._channel.staging_device)
        if self._rank != 0:
            deque(tensors, maxlen=0)  # the others only help to gather
            return None
        return self._channel.send(self._engine.policy_version, tensors)

    def save(self, folder: Path) -> None:
        """Write what `load` needs to go on bitwise (collective)."""
        self._engine.save(folder)

    def load(self, folder: Path) -> int:
        """Go on from `folder` (collective); return the policy version found there."""
        self._engine.load(folder)
        return self._engine.policy_version

    def export(self, folder: Path) -> None:
        """Write the student in the Hugging Face layout (collective)."""
        self._engine.export(folder)

    def shutdown(self) -> None:
        self._engine.shutdown()

    def _try_fetch(self, items: Sequence[GuidedItem]) -> tuple[list[GuidedTrajectory], PayloadLostError | None]:
        try:
            return self._fetch(items), None
        except PayloadLostError as error:
            return [], error

    def _fetch(self, items: Sequence[GuidedItem]) -> list[GuidedTrajectory]:
        batches = self._store.get([item.handle for item in items])
        rows = {key: batch_to_guided(batch) for key, batch in {id(batch): batch for batch in batches}.items()}
        return [rows[id(batch)][item.row] for item, batch in zip(items, batches, strict=True)]

    def _save_share(self, items: Sequence[GuidedItem]) -> Path:
        self._failed_batch_folder.mkdir(parents=True, exist_ok=True)
        path = self._failed_batch_folder / f"version-{self._engine.policy_version:06d}-rank-{self._rank}.parquet"
        unfinished = path.with_suffix(".tmp")
        batches: list[pa.RecordBatch] = self._store.get([item.handle for item in items])
        rows = [batch.slice(item.row, 1) for item, batch in zip(items, batches, strict=True)]
        pq.write_table(pa.Table.from_batches(rows, GUIDED_SCHEMA), unfinished)
        unfinished.rename(path)
        return path
