"""The learner's state in a form that no number of ranks and no ZeRO stage is part of.

Whatever the stage, every element of a parameter has a float32 master copy and two AdamW moments on some rank, in flat
tensors that DeepSpeed lays out. Each rank writes the runs of elements it holds (of replicated ones a share), under
the parameter's name and the first element's index:

    learner.json                            version, ranks, and the shape of every parameter
    rank-00000-part-00000.safetensors       "weight:0:model.lm_head.weight", "exp_avg:4096:...", "exp_avg_sq:..."
    rank-00000-random.safetensors           states of the random generators

and each rank reads the runs it holds, from whichever files they lie in: no collective, at most a part in memory.
Nothing is unpickled. Weights in the learner's own dtype are the rounded master copy, and are made from it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from topd_ray.errors import CheckpointError

FORMAT = 1
INDEX_FILE = "learner.json"
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
PART_BYTES = 256 * 1024**2
"""Size of a file; twice as much is held while it is written."""
ELEMENT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Elements [start, start + length) of a parameter, as this rank's optimiser holds them."""

    name: str
    start: int
    length: int
    flat: torch.Tensor
    """what the optimiser updates: float32, of this parameter or of many"""
    offset: int
    """of the run in `flat`"""

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The run's elements, a view of `flat` or of a moment laid out like it."""
        return flat.detach().view(-1).narrow(0, self.offset, self.length)

    def share(self, rank: int, num_ranks: int) -> "Run":
        """This rank's part of a run that all ranks hold."""
        first, last = (self.length * place // num_ranks for place in (rank, rank + 1))
        return Run(
            name=self.name,
            start=self.start + first,
            length=last - first,
            flat=self.flat,
            offset=self.offset + first,
        )


class OptimizerState:
    """Where a DeepSpeed engine keeps the master weights and moments: one view for all of its optimisers."""

    def __init__(self, engine: Any, rank: int, num_ranks: int) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._rank, self._num_ranks = rank, num_ranks
        self._names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self._stage = engine.zero_optimization_stage()
        self._adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
        """what computes the update: torch's AdamW, or DeepSpeed's for the CPU"""

    def shapes(self) -> dict[str, list[int]]:
        """Of every parameter, by name."""
        return {
            name: list(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self._engine.module.named_parameters()
            if parameter.requires_grad
        }

    def runs(self) -> list[Run]:
        """All that this rank holds."""
        if self._stage == 3:
            return list(self._runs_of_stage_3())
        if self._stage > 0:
            return list(self._runs_of_stage_1_and_2())
        return [self._whole(parameter, master) for parameter, master in self._masters()]

    def own_runs(self) -> list[Run]:
        """Those of them that this rank writes: over all ranks, every element once."""
        if self._stage > 0:
            return self.runs()
        return [run.share(self._rank, self._num_ranks) for run in self.runs()]

    def moments(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The moments of `flat` by name; none before the first update."""
        state = self._adam.state.get(flat, {})
        return {name: state[name] for name in MOMENTS if name in state}

    def check_steps(self, version: int) -> None:
        """Raise CheckpointError unless AdamW has counted `version` updates of everything."""
        counts = {int(self._adam.state[flat]["step"]) for flat in self._flats() if flat in self._adam.state}
        if counts != ({version} if version else set()):
            raise CheckpointError(f"AdamW has counted {sorted(counts)} updates, the learner {version}")

    def make_moments(self, version: int) -> None:
        """Empty moments for everything, as after `version` updates."""
        for flat in self._flats():
            zeros = {name: torch.zeros_like(flat.detach()) for name in MOMENTS}
            count = torch.tensor(float(version), device=flat.device)
            self._adam.state[flat] = {"step": count if self._is_torch else version, **zeros}
        if not self._is_torch:
            self._replay_bias_corrections(version)

    @torch.no_grad()
    def round_masters(self) -> None:
        """Make the weights in the learner's dtype from the master copies (collective)."""
        if self._stage == 3:
            self._optimizer.checkpoint_event_prologue()
            for group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self._optimizer.checkpoint_event_epilogue()
        elif self._stage > 0:
            self._optimizer.update_lp_params()
        else:
            for parameter, master in self._masters():
                parameter.copy_(master)

    @property
    def _is_torch(self) -> bool:
        return isinstance(self._adam, torch.optim.AdamW)

    def _flats(self) -> list[torch.Tensor]:
        if self._stage == 3:  # whose parameter groups are filled for a step only
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self._adam.param_groups for flat in group["params"]]

    def _masters(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each parameter and its master copy, without ZeRO; in float32 the parameter is its own."""
        low_precision = getattr(self._optimizer, "fp16_groups", None)  # DeepSpeed's name, also of bfloat16
        for index, group in enumerate(self._adam.param_groups):
            yield from zip(low_precision[index] if low_precision else group["params"], group["params"], strict=True)

    def _whole(self, parameter: torch.Tensor, master: torch.Tensor) -> Run:
        return Run(name=self._names[id(parameter)], start=0, length=master.numel(), flat=master, offset=0)

    def _runs_of_stage_1_and_2(self) -> Iterator[Run]:
        """One flat tensor a group, cut into equal partitions: a parameter may lie on several ranks."""
        for parameter in self._parameters():
            mapping = parameter._hp_mapping
            if mapping is not None:
                (flat,) = self._adam.param_groups[mapping.param_group_index]["params"]
                yield Run(
                    name=self._names[id(parameter)],
                    start=mapping.lp_fragment_address.start,
                    length=mapping.lp_fragment_address.numel,
                    flat=flat,
                    offset=mapping.hp_fragment_address.start,
                )

    def _runs_of_stage_3(self) -> Iterator[Run]:
        """Each parameter cut into equal parts, the last one padded."""
        for parameter in self._parameters():
            group, offset, part = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            start = self._rank * part
            if start < parameter.ds_numel:
                yield Run(
                    name=self._names[id(parameter)],
                    start=start,
                    length=min(part, parameter.ds_numel - start),
                    flat=self._optimizer.fp32_partitioned_groups_flat[group],
                    offset=offset,
                )

    def _parameters(self) -> Iterator[Any]:
        return (parameter for parameter in self._engine.module.parameters() if parameter.requires_grad)

    def _replay_bias_corrections(self, version: int) -> None:
        """DeepSpeed's AdamW multiplies beta^t up from one update to the next, and rounds: the same factors again."""
        group = self._adam.param_groups[0]
        betas, unused = group["betas"], [torch.zeros(1) for _ in range(4)]
        for step in range(1, version + 1):
            self._adam.ds_opt_adam.adam_update(
                *(self._adam.opt_id, step, 0.0, *betas, group["eps"], 0.0, group["bias_correction"], *unused)
            )


def save_state(state: OptimizerState, folder: Path, *, rank: int, num_ranks: int, version: int) -> None:
    """Write this rank's share into `folder`, which held no checkpoint; rank 0 writes the index as well."""
    state.check_steps(version)
    for number, part in enumerate(_parts(_pieces(state))):
        save_file(part, folder / f"rank-{rank:05d}-part-{number:05d}.safetensors")
    save_file(_random_states(), folder / _random_file(rank))
    if rank == 0:
        index = {"format": FORMAT, "policy_version": version, "num_ranks": num_ranks, "parameters": state.shapes()}
        (folder / INDEX_FILE).write_text(json.dumps(index) + "\n")


def load_state(state: OptimizerState, folder: Path, *, rank: int, num_ranks: int) -> int:
    """Put back what `save_state` wrote, also for other ranks; return the version (collective).

    The random generators go on only with as many ranks as there were; with others they stay as they are. Raises
    CheckpointError if there is no whole checkpoint, or it is of another model.
    """
    try:
        index = json.loads((folder / INDEX_FILE).read_text())
        if index["format"] != FORMAT:
            raise CheckpointError(
                f"{folder / INDEX_FILE} has the format {index['format']}, this topd_ray reads {FORMAT}"
            )
        _check_shapes(index["parameters"], state.shapes(), folder)
        version = int(index["policy_version"])
        with _Pieces(folder) as pieces:
            _fill(state, pieces, version)
        if index["num_ranks"] == num_ranks:
            _set_random_states(load_file(folder / _random_file(rank)))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no whole learner checkpoint: {error}") from error
    state.round_masters()
    return version


def _fill(state: OptimizerState, pieces: "_Pieces", version: int) -> None:
    if version > 0:
        state.make_moments(version)
    for run in state.runs():
        for slot, flat in ((WEIGHT, run.flat), *state.moments(run.flat).items()):
            pieces.read(slot, run.name, run.start, into=run.of(flat))


def _check_shapes(saved: dict[str, list[int]], own: dict[str, list[int]], folder: Path) -> None:
    for name in sorted({*saved, *own}):
        there, here = saved.get(name, "absent"), own.get(name, "absent")
        if there != here:
            raise CheckpointError(
                f"the checkpoint in {folder} is of another model: {name} is {there} there, {here} in this student"
            )


def _pieces(state: OptimizerState) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's share, cut to the size of a file."""
    most = PART_BYTES // ELEMENT_BYTES
    for run in state.own_runs():
        for slot, flat in ((WEIGHT, run.flat), *state.moments(run.flat).items()):
            elements = run.of(flat)
            for first in range(0, run.length, most):
                yield f"{slot}:{run.start + first}:{run.name}", elements[first : first + most]


def _parts(pieces: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Pieces for a file each time, copied to the CPU."""
    part: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for key, piece in pieces:
        size = piece.numel() * ELEMENT_BYTES
        if part and num_bytes + size > PART_BYTES:
            yield part
            part, num_bytes = {}, 0
        part[key] = piece.to("cpu", copy=True)
        num_bytes += size
    if part:
        yield part


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    start: int
    elements: Any
    """a slice of a safetensors file, read when it is indexed"""

    @property
    def end(self) -> int:
        return self.start + int(self.elements.get_shape()[0])


class _Pieces:
    """All pieces of a checkpoint, of all ranks that wrote it."""

    def __init__(self, folder: Path) -> None:
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}
        self._files: list[Any] = [safe_open(path, "pt") for path in sorted(folder.glob("rank-*-part-*.safetensors"))]
        for file in self._files:
            for key in file.keys():  # noqa: SIM118
                slot, start, name = key.split(":", 2)
                piece = _Piece(start=int(start), elements=file.get_slice(key))
                self._pieces.setdefault((slot, name), []).append(piece)

    def __enter__(self) -> "_Pieces":
        return self

    def __exit__(self, *_: object) -> None:
        self._pieces.clear()
        self._files.clear()

    def read(self, slot: str, name: str, start: int, *, into: torch.Tensor) -> None:
        """Fill the flat tensor `into` with the parameter's elements from `start` on.

        Raises CheckpointError if no file has one of them.
        """
        place, end = start, start + into.numel()
        for piece in sorted(self._pieces.get((slot, name), ()), key=lambda piece: piece.start):
            if piece.start <= place < min(piece.end, end):
                last = min(piece.end, end)
                into[place - start : last - start].copy_(piece.elements[place - piece.start : last - piece.start])
                place = last
        if place < end:
            raise CheckpointError(f"the checkpoint lacks the elements {place} to {end} of {slot} of {name}")


def _random_file(rank: int) -> str:
    return f"rank-{rank:05d}-random.safetensors"


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
