"""Which tensors make up a policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from topd_ray.errors import WeightSyncError

TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedTensors:
    """Names and shapes of a checkpoint."""

    shapes: Mapping[str, tuple[int, ...]]
    tied_head: bool
    """The config says that the head is the input embedding: it need not come along"""

    def check(self, named: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """The tensors, if they are all there and fit; WeightSyncError says which are not.

        A tied head that comes along is left out, unless the checkpoint has it as well: it may be another one there,
        which transformers and vLLM then both keep, whatever the config says.
        """
        found = {name: tuple(tensor.shape) for name, tensor in named}
        spare = {TIED_HEAD} if self.tied_head else set()
        missing = sorted(set(self.shapes) - spare - set(found))
        unknown = sorted(set(found) - spare - set(self.shapes))
        misshapen = [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in self.shapes.items()
            if name in found and found[name] != shape
        ]
        problems = [
            f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            for what, names in (("missing", missing), ("unknown", unknown), ("wrong shape", misshapen))
            if names
        ]
        if len(found) != len(named):
            problems.append(f"{len(named) - len(found)} names came twice")
        if problems:
            raise WeightSyncError(
                f"the weights do not make up the student of {len(self.shapes)} tensors ({'; '.join(problems)}): "
                "send every tensor of its checkpoint once, under its Hugging Face name"
            )
        return [(name, tensor) for name, tensor in named if name not in spare or name in self.shapes]
