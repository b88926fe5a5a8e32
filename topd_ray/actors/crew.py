"""The actors of a run: where each is placed, how it is made, and made again."""

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from topd_ray.actors.cluster import worker_environment
from topd_ray.actors.learner import LearnerWorker
from topd_ray.actors.parts import learner_part, rollout_part, teacher_part, threads
from topd_ray.actors.restarts import RestartBudget
from topd_ray.actors.rollout import RolloutWorker
from topd_ray.actors.room import Need
from topd_ray.actors.store import RayStore
from topd_ray.actors.teacher import TeacherWorker
from topd_ray.config.schema import TopdConfig
from topd_ray.weights.checksum import WeightReceipt

WORKERS: dict[str, type] = {"rollout": RolloutWorker, "teacher": TeacherWorker, "learner": LearnerWorker}


@dataclass(slots=True, kw_only=True, eq=False)
class Slot:
    """One worker's place, and the actor that fills it now."""

    role: str
    index: int
    need: Need
    bundle: int
    """of the placement group"""
    budget: RestartBudget
    actor: Any = None
    is_ready: bool = False
    num_writing: int = 0
    """trajectories a rollout worker owes"""
    heard_at: float = 0.0
    """when it last answered or delivered something, or was given work while it had none"""
    receipt: WeightReceipt | None = None
    """what a rollout worker has acknowledged last"""

    @property
    def version(self) -> int | None:
        """Of the policy that a rollout worker serves."""
        return None if self.receipt is None else self.receipt.version

    def __str__(self) -> str:
        return f"{self.role} {'rank' if self.role == 'learner' else 'worker'} {self.index}"


class Crew:
    """A slot for each of `wanted`, bundle by bundle of `group`.

    A worker that dies is not restarted by Ray but made anew in its bundle (which Ray places again if its node is
    gone): calls to the dead one can then not reach its successor, which has to load its model first.
    """

    def __init__(self, config: TopdConfig, wanted: list[Need], group: PlacementGroup, total_updates: int) -> None:
        self._config = config
        self._group = group
        self._total_updates = total_updates
        self._store = RayStore()
        self.slots = [
            Slot(role=need.role, index=need.index, need=need, bundle=bundle, budget=RestartBudget(config.faults))
            for bundle, need in enumerate(wanted)
        ]
        self._slot_of: dict[str, Slot] = {}

    def of(self, role: str) -> list[Slot]:
        """The slots of a role in the order of their index."""
        return sorted((slot for slot in self.slots if slot.role == role), key=lambda slot: slot.index)

    def slot_of(self, actor_id: str | None) -> Slot | None:
        """Whose actor `actor_id` is or was."""
        return None if actor_id is None else self._slot_of.get(actor_id)

    def make(self, slot: Slot) -> None:
        """Fill the slot with a new actor, which still has to be set up; the one before it is killed."""
        if slot.actor is not None:
            ray.kill(slot.actor)
        slot.is_ready, slot.receipt, slot.num_writing, slot.heard_at = False, None, 0, time.monotonic()
        environment = worker_environment(threads(self._config, slot.role), on_cpu=not slot.need.num_gpus)
        slot.actor = (
            ray.remote(WORKERS[slot.role])
            .options(
                num_cpus=slot.need.num_cpus,
                num_gpus=slot.need.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=slot.bundle
                ),
                max_concurrency=self._concurrency(slot.role),
                runtime_env={"env_vars": environment},
            )
            .remote(**self._part(slot), store=self._store)
        )
        self._slot_of[slot.actor._actor_id.hex()] = slot

    def _part(self, slot: Slot) -> dict[str, Any]:
        if slot.role == "rollout":
            return rollout_part(self._config)
        if slot.role == "teacher":
            return teacher_part(self._config)
        return learner_part(self._config, rank=slot.index, total_updates=self._total_updates)

    def _concurrency(self, role: str) -> int:
        """A rollout worker takes orders while it serves. Two calls may race for a teacher's engine, so deterministic
        runs make one at a time."""
        if role == "rollout":
            return 4
        return 2 if role == "teacher" and not self._config.run.deterministic else 1
