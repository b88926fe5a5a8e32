"""One data-parallel rank of the DeepSpeed learner.

An update is one optimiser step on one batch, however the batch is split over ranks and micro-batches: each share of the
loss is divided by the totals of the whole batch, and DeepSpeed's own averaging over ranks is undone.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from datetime import timedelta
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from topd_ray.config.schema import LearnerConfig, ObjectiveConfig, StudentConfig
from topd_ray.data.tokenizer import read_vocabulary
from topd_ray.engines.collate import (
    MicroBatch,
    branch_rows,
    collate,
    collate_tokens,
    num_positions,
    stand_in,
)
from topd_ray.engines.export import copy_tokenizer, write_student
from topd_ray.engines.learner_checkpoint import OptimizerState, load_state, save_state
from topd_ray.engines.learner_group import meet, own_device
from topd_ray.engines.learner_metrics import Tally
from topd_ray.engines.optimisation import adamw, deepspeed_config, learning_rate, parameter_groups
from topd_ray.engines.packing import pack
from topd_ray.engines.student_model import (
    BatchTotals,
    StudentWithLoss,
    layers_of,
    load_student,
    loss_spec,
    prepare_to_learn,
    to_hub_names,
)
from topd_ray.errors import LearnerError, NonFiniteLossError
from topd_ray.types import Float32, GuidedTrajectory, Metric, Trajectory


class LearnerEngine:
    """Trains the student. Methods marked collective must be called on every rank, in the same order."""

    default_group: ClassVar[Any] = None
    """the process group that DeepSpeed has been set up with in this process"""

    def __init__(
        self,
        student: StudentConfig,
        learner: LearnerConfig,
        objective: ObjectiveConfig,
        *,
        temperature: float,
        total_updates: int,
        rank: int = 0,
        world_size: int = 1,
        init_method: str | None = None,
        timeout_seconds: float = 1800.0,
        threads: int = 1,
        seed: int = 0,
        deterministic: bool = False,
    ) -> None:
        """Load the student and, with several ranks, meet the others at `init_method` (tcp://host:port) (collective).

        Ranks wait at most `timeout_seconds` for each other. `total_updates` is what the learning-rate schedule ends at.
        `deterministic` makes PyTorch refuse every operation without a reproducible implementation, in the whole
        process. Raises ConfigError if the student cannot be loaded or has an unsupported head or attention,
        LearnerError if the ranks cannot meet.
        """
        self._deepspeed = _import_deepspeed()
        torch.set_num_threads(threads)
        torch.manual_seed(seed + rank)
        self._deterministic = deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
            torch.use_deterministic_algorithms(True)
        self._device = own_device()
        meet(self._device, rank, world_size, init_method, timeout_seconds)
        _follow_default_group(self._deepspeed, timeout_seconds)

        self._student, self._learner = student, learner
        self._rank, self._world_size = rank, world_size
        self._total_updates = total_updates
        self._policy_version = 0
        self._failure: str | None = None
        self._model = load_student(student, learner, self._device)
        module = StudentWithLoss(
            self._model,
            loss_spec(self._model, objective, learner, temperature),
            num_tokens=read_vocabulary(student).size,
            importance_horizon=objective.importance_horizon,
        )
        self._engine = self._wrap(module)

    @property
    def policy_version(self) -> int:
        """Updates applied so far."""
        return self._policy_version

    @property
    def attention(self) -> str:
        """Name of the attention implementation that was chosen (see `attention.choose_attention`)."""
        return str(self._model.config._attn_implementation)

    def learn(
        self,
        trajectories: Sequence[GuidedTrajectory],
        *,
        num_tokens: float,
        num_guided: float,
        num_trajectories: int,
    ) -> list[Metric]:
        """Apply one update; `trajectories` is this rank's share, the totals are those of all ranks (collective).

        Without dropout, whatever the student's config says: the policy that learns is the one that wrote.

        Returns this rank's part of the metrics (`learner_metrics.METRIC_KEYS`). Raises NonFiniteLossError on every
        rank, with the weights as they were, if the loss of a micro-batch or the gradient norm is NaN or infinite;
        LearnerError if no rank has anything to learn from; DataError for malformed trajectories. After an error that
        leaves a gradient in DeepSpeed's buffers the engine refuses to learn (LearnerError).
        """
        if self._failure is not None:
            raise LearnerError(f"this learner has failed ({self._failure}): build a new one, and load a checkpoint")
        totals = BatchTotals(num_tokens=num_tokens, num_guided=num_guided, num_trajectories=num_trajectories)
        rate = learning_rate(self._learner, self._policy_version, self._total_updates)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        prepare_to_learn(self._model)
        makers = self._micro_batches(trajectories)
        if not makers:
            raise LearnerError("no rank has a trajectory to learn from")
        tally = Tally(self._world_size)
        for index, make in enumerate(makers):
            micro_batch = make()
            self._engine.set_gradient_accumulation_boundary(index == len(makers) - 1)
            loss, metrics = self._engine(micro_batch, totals)
            self._failure = f"update {self._policy_version + 1} broke off"
            self._engine.backward(loss * (self._world_size * micro_batch.weight), scale_wrt_gas=False)
            tally.add(micro_batch, loss.detach(), metrics)
        self._refuse_non_finite_loss(tally)
        grad_norm = self._step()
        self._failure = None
        self._policy_version += 1
        return [
            *tally.metrics(),
            Metric(key="learner/grad_norm", sum=grad_norm),
            Metric(key="learner/learning_rate", sum=rate),
        ]

    def loss(
        self,
        trajectories: Sequence[GuidedTrajectory],
        *,
        num_tokens: float,
        num_guided: float,
        num_trajectories: int,
    ) -> float:
        """The loss that `learn` would lower, summed over all ranks, without an update (collective)."""
        totals = BatchTotals(num_tokens=num_tokens, num_guided=num_guided, num_trajectories=num_trajectories)
        self._engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        with torch.no_grad():
            for make in self._micro_batches(trajectories):
                micro_batch = make()
                loss, _ = self._engine(micro_batch, totals)
                total += loss.double() * micro_batch.weight
        if self._world_size > 1:
            dist.all_reduce(total)
        return float(total)

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[Float32]:
        """log p_S of the sampled tokens at the rollout's temperature (nats), one [T] array each (collective)."""
        self._engine.eval()
        found: dict[int, Float32] = {}
        with torch.no_grad():
            for part in self._parts(trajectories):
                rows = [trajectories[index] for index in part] or [stand_in().trajectory]
                tokens = collate_tokens(rows, self._device)
                logprobs_N, _ = self._engine(tokens)
                pieces = logprobs_N.float().cpu().split(tokens.num_response_tokens)
                found.update((index, piece.numpy()) for index, piece in zip(part, pieces, strict=False))
        return [found[index] for index in range(len(trajectories))]

    def state_tensors(
        self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Full weights under their Hugging Face names, copied to `dtype` (unset: the learner's) and `device`.

        Collective: every rank must exhaust the iterator, and only rank 0 gets anything. A tied head is left out, as in
        the model's files. At most one layer is held at a time.
        """
        for layer in layers_of(self._model):
            tensors: dict[str, torch.Tensor] = {}
            with self._gathered([tensor for _, tensor in layer]):
                if self._rank == 0:
                    tensors = {name: _copy(tensor, dtype, device) for name, tensor in layer}
            if self._rank == 0:
                yield from to_hub_names(self._model, tensors).items()

    def export(self, folder: Path | str, tokenizer_source: str | None = None) -> None:
        """Write the student in the Hugging Face layout, in the learner's dtype (collective).

        The tokenizer's files come from `tokenizer_source`, a folder or hub name; unset, from where the student came.
        """
        tensors = dict(self.state_tensors())
        if self._rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_student(self._model, tensors, self._student, Path(folder))
            copy_tokenizer(tokenizer_source or self._student.model, self._student.revision, Path(folder))
        self._barrier()

    def save(self, folder: Path | str) -> None:
        """Write what `load` needs to go on bitwise into `folder`, each rank its share (collective)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_state(self._state(), folder, rank=self._rank, num_ranks=self._world_size, version=self._policy_version)
        self._barrier()

    def load(self, folder: Path | str) -> None:
        """Go on from what `save` wrote, in an engine that has not learnt anything yet (collective).

        On as many ranks of the same ZeRO stage, bitwise; on others from the same weights and moments, with sums over
        ranks in another order. Raises CheckpointError if there is no whole checkpoint, or it is of another model;
        LearnerError if this engine has learnt already.
        """
        if self._failure is not None or self._policy_version > 0:
            raise LearnerError(f"a checkpoint needs a new learner, this one is at version {self._policy_version}")
        self._policy_version = load_state(self._state(), Path(folder), rank=self._rank, num_ranks=self._world_size)

    def shutdown(self) -> None:
        """Free the model. The process group stays: other engines of this process may be using it."""
        if hasattr(self, "_engine"):
            self._engine.destroy()
            del self._engine, self._model
            if self._deterministic:
                torch.use_deterministic_algorithms(False)

    def _wrap(self, module: StudentWithLoss) -> Any:
        """DeepSpeed's engine around the student."""
        learner = self._learner
        groups = parameter_groups(module, learner)
        # Its ZeRO-1 optimiser for bfloat16 prints the memory in use ten times; the logger is not silenced by this.
        with redirect_stdout(StringIO()):
            engine, optimizer, *_ = self._deepspeed.initialize(
                model=module,
                optimizer=None if learner.offload_optimizer else adamw(groups, learner),
                model_parameters=groups if learner.offload_optimizer else None,
                config=deepspeed_config(learner, sum(parameter.numel() for parameter in module.parameters())),
            )
        if learner.dtype == "bfloat16" and learner.zero_stage == 0:
            # Its optimiser has made a step on zero gradients, which would count in Adam's bias correction.
            optimizer.optimizer.state.clear()
        return engine

    def _parts(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        """Indices of each micro-batch; ranks with fewer get empty ones, since every pass is collective."""
        return self._parts_of([trajectories])[0]

    def _parts_of(self, groups: Sequence[Sequence[Trajectory]]) -> list[list[list[int]]]:
        """`_parts` of several groups that are not to be mixed."""
        parts = [self._pack(group) for group in groups]
        most = torch.tensor([len(part) for part in parts], device=self._device)
        if self._world_size > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return [part + [[] for _ in range(count - len(part))] for part, count in zip(parts, most.tolist(), strict=True)]

    def _pack(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        return pack([num_positions(one) for one in trajectories], self._learner.micro_batch_budget)

    def _micro_batches(self, trajectories: Sequence[GuidedTrajectory]) -> list[Callable[[], MicroBatch]]:
        """What makes each micro-batch of an update: those of the trajectories, then those of their branches."""
        branches = [row for one in trajectories for row in branch_rows(one)]
        parts, branch_parts = self._parts_of([[one.trajectory for one in group] for group in (trajectories, branches)])
        return [
            *(partial(self._collate, trajectories, part) for part in parts),
            *(partial(self._collate, branches, part, is_of_branches=True) for part in branch_parts),
        ]

    def _collate(
        self, trajectories: Sequence[GuidedTrajectory], part: Sequence[int], *, is_of_branches: bool = False
    ) -> MicroBatch:
        if not part:
            return collate([stand_in()], self._device, weight=0.0)
        return collate(
            [trajectories[index] for index in part],
            self._device,
            policy_version=self._policy_version,
            is_of_branches=is_of_branches,
        )

    def _refuse_non_finite_loss(self, tally: "Tally") -> None:
        losses = torch.stack(tally.losses)
        num_bad = (~torch.isfinite(losses)).sum()
        if self._world_size > 1:
            dist.all_reduce(num_bad)
        if int(num_bad) == 0:
            return
        where = [
            f"{value} over the trajectories {', '.join(ids)}"
            for value, ids in zip(losses.tolist(), tally.trajectory_ids, strict=True)
            if not math.isfinite(value)
        ]
        self._fail(f"the loss is {'; '.join(where) or 'not finite on another rank'}")

    def _step(self) -> float:
        """Apply the accumulated gradient unless its norm is not finite; return the norm before clipping."""
        if self._engine.zero_optimization() or self._engine.bfloat16_enabled():
            self._engine.step()
            grad_norm = float(self._engine.get_global_grad_norm())
            is_applied = self._engine.was_step_applied()
        else:
            gradients = [one.grad for one in self._engine.module.parameters() if one.grad is not None]
            grad_norm = float(torch.nn.utils.get_total_norm(gradients))
            is_applied = math.isfinite(grad_norm)
            if is_applied:
                self._engine.step()
        if not is_applied:
            self._fail("the loss is finite, the gradient norm is not")
        return grad_norm

    def _fail(self, finding: str) -> None:
        self._failure = f"update {self._policy_version + 1}: {finding}"
        raise NonFiniteLossError(f"{self._failure}; the weights are those of version {self._policy_version}")

    def _gathered(self, tensors: Sequence[torch.Tensor]) -> AbstractContextManager[Any]:
        partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
        if not partitioned:
            return nullcontext()
        context: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(partitioned)
        return context

    def _state(self) -> OptimizerState:
        return OptimizerState(self._engine, self._rank, self._world_size)

    def all_ranks(self, condition: bool) -> bool:
        """Whether `condition` holds on every rank (collective)."""
        flag = torch.tensor(int(condition), device=self._device)
        if self._world_size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def _barrier(self) -> None:
        if self._world_size > 1:
            dist.barrier()


def _import_deepspeed() -> Any:
    """DeepSpeed, set up for this machine; imported late, so that naming this module costs nothing.

    On CPUs it would compile a shared-memory collective when the ranks meet (two minutes): gloo is used instead.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def _follow_default_group(deepspeed: Any, timeout_seconds: float) -> None:
    """Make DeepSpeed use the default process group, also if it knows an earlier one of this process.

    Another engine may have taken that one down, and DeepSpeed keeps a copy of it for good. The copy is made here: in
    DeepSpeed's own ranks wait for each other as long as torch's default says.
    """
    if LearnerEngine.default_group is not dist.group.WORLD:
        ranks, timeout = list(range(dist.get_world_size())), timedelta(seconds=timeout_seconds)
        deepspeed.utils.groups._WORLD_GROUP = dist.new_group(ranks, timeout=timeout)
        deepspeed.utils.groups._ALL_TO_ALL_GROUP = {}
        LearnerEngine.default_group = dist.group.WORLD
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _copy(tensor: torch.Tensor, dtype: torch.dtype | None, device: str | torch.device) -> torch.Tensor:
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(device=device, dtype=wanted, copy=True)
