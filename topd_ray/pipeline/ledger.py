"""Which trajectory was trained on when: ledger.jsonl in the run folder, so that nothing is lost or trained on twice.

    {"step": 0, "format": 1, "num_prompts": 64, "samples_per_prompt": 4}
    {"step": 1, "policy_version": 1, "position": 8, "num_open": 0, "dropped": 0,
     "trained": [[0, "p17", 0, 0], ...], "quarantined": []}

A line is on the disk before its update's checkpoint is, and a resumed run cuts off the lines after its checkpoint.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topd_ray.errors import DataError
from topd_ray.metrics.step_lines import StepLines, read_lines

FORMAT = 1

Trained = tuple[int, str, int, int]
"""(epoch, prompt_id, sample_index, version of the policy that wrote it)"""
Sample = tuple[int, str, int]
"""(epoch, prompt_id, sample_index)"""


class Ledger:
    """Writes the ledger of a run."""

    def __init__(self, lines: StepLines, last_step: int) -> None:
        self._lines = lines
        self._last_step = last_step

    @classmethod
    def open(cls, path: Path, resume_step: int, *, num_prompts: int, samples_per_prompt: int) -> "Ledger":
        """The ledger of a run that goes on after update `resume_step`; lines of later ones are cut off.

        Raises DataError if updates up to that one are missing, or the file is of other prompts or samples.
        """
        header = {"format": FORMAT, "num_prompts": num_prompts, "samples_per_prompt": samples_per_prompt}
        lines = StepLines(path, resume_step, synced=True)
        try:
            kept = read_lines(path)
            first = next(kept, None)
            if first is None and resume_step == 0:
                lines.write(0, header)
                return cls(lines, 0)
            _check_header(path, first or {}, header)
            last = max((line["step"] for line in kept), default=0)
            if last != resume_step:
                raise DataError(
                    f"{path}: found updates up to {last}, right would be up to {resume_step}, that of the checkpoint: "
                    "go on from an earlier checkpoint"
                )
        except DataError:
            lines.close()
            raise
        return cls(lines, resume_step)

    def write(
        self,
        step: int,
        *,
        policy_version: int,
        trained: Sequence[Trained],
        quarantined: Sequence[Sample] = (),
        dropped: int = 0,
        position: int,
        num_open: int,
    ) -> None:
        """Enter update `step`. `policy_version` is the one it made.

        `position` is the schedule's cursor: prompts drawn so far, of all epochs. `num_open` counts the trajectories of
        these that are neither trained on nor quarantined yet. `dropped` ones were too stale; drawn again, they are open
        again. Raises DataError for an update that does not follow the last one.
        """
        if step != self._last_step + 1:
            raise DataError(f"step: found {step} after {self._last_step} in the ledger, right would be the next one")
        self._lines.write(
            step,
            {
                "policy_version": policy_version,
                "position": position,
                "num_open": num_open,
                "dropped": dropped,
                "trained": [list(one) for one in trained],
                "quarantined": [list(one) for one in quarantined],
            },
        )
        self._last_step = step

    def close(self) -> None:
        self._lines.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerReport:
    """What a ledger adds up to."""

    steps: int
    """updates"""
    num_prompts: int
    """of an epoch"""
    samples_per_prompt: int
    prompts: int
    """drawn, over all epochs"""
    trained_once: int
    """of these: prompts whose samples were trained on, each exactly once"""
    trajectories: int
    """distinct ones trained on"""
    open: int
    """trajectories drawn and neither trained on nor quarantined, at the end"""
    lost: int
    """trajectories drawn, and neither trained on, quarantined nor open; negative: more than were drawn"""
    doubled: int
    """trajectories trained on more than once, or both trained on and quarantined"""
    quarantined: int
    dropped: int
    largest_staleness: int
    """updates between the policy that wrote a trajectory and the one that trained on it"""
    faults: tuple[str, ...]
    """what cannot be, one sentence each; empty if the ledger is in order"""


def read_ledger(path: Path) -> LedgerReport:
    """Add up a ledger. Raises DataError if it is none, or a line of it is malformed."""
    lines = read_lines(path)
    header = next(lines, {})
    if header.get("format") != FORMAT:
        raise DataError(f"{path}: found no ledger's first line, right would be one with format {FORMAT}")
    try:
        return _add_up(int(header["num_prompts"]), int(header["samples_per_prompt"]), list(lines))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: found a malformed line ({type(error).__name__}: {error})") from error


def _add_up(num_prompts: int, samples_per_prompt: int, lines: Sequence[dict[str, Any]]) -> LedgerReport:
    times: Counter[Sample] = Counter()
    quarantined: set[Sample] = set()
    staleness = [0]
    for line in lines:
        for epoch, prompt_id, sample, version in line["trained"]:
            times[epoch, prompt_id, sample] += 1
            staleness.append(line["policy_version"] - 1 - version)
        quarantined |= {(epoch, prompt_id, sample) for epoch, prompt_id, sample in line["quarantined"]}
    last = lines[-1] if lines else {"position": 0, "num_open": 0}
    position, num_open = last["position"], last["num_open"]
    doubled = {one for one, count in times.items() if count > 1} | (quarantined & times.keys())
    settled = times.keys() | quarantined
    lost = position * samples_per_prompt - len(settled) - num_open
    samples_once = Counter((epoch, prompt_id) for (epoch, prompt_id, _), count in times.items() if count == 1)
    return LedgerReport(
        steps=len(lines),
        num_prompts=num_prompts,
        samples_per_prompt=samples_per_prompt,
        prompts=position,
        trained_once=sum(count == samples_per_prompt for count in samples_once.values()),
        trajectories=len(times),
        open=num_open,
        lost=lost,
        doubled=len(doubled),
        quarantined=len(quarantined),
        dropped=sum(line["dropped"] for line in lines),
        largest_staleness=max(staleness),
        faults=(
            *_order_faults(lines),
            *_epoch_faults(settled, num_prompts, samples_per_prompt, position, num_open),
            *([f"{lost} trajectories are lost"] if lost > 0 else ()),
            *([f"{-lost} trajectories more than were drawn"] if lost < 0 else ()),
            *([f"{len(doubled)} trajectories were trained on twice: {_shown(doubled)}"] if doubled else ()),
            *(["a trajectory was trained on before its policy was made"] if min(staleness) < 0 else ()),
        ),
    )


def _order_faults(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Updates are 1, 2, ..., and the cursor never goes back."""
    steps = [line["step"] for line in lines]
    for place, step in enumerate(steps, start=1):
        if step != place:
            yield f"update {step} stands where {place} should"
            break
    positions = [line["position"] for line in lines]
    if positions != sorted(positions):
        yield "the cursor went back"


def _epoch_faults(
    settled: set[Sample], num_prompts: int, samples_per_prompt: int, position: int, num_open: int
) -> Iterator[str]:
    """Every epoch drawn to its end holds each prompt once per sample; what lacks there must be open."""
    samples: dict[int, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for epoch, prompt_id, sample in settled:
        samples[epoch][prompt_id].add(sample)
    num_complete, rest = divmod(position, num_prompts)
    num_missing = 0
    for epoch in sorted({*samples, *range(num_complete)}):
        drawn = num_prompts if epoch < num_complete else rest if epoch == num_complete else 0
        prompts = samples.get(epoch, {})
        if len(prompts) > drawn:
            yield f"epoch {epoch} holds {len(prompts)} prompts, and {drawn} were drawn of it"
        strangers = {one for found in prompts.values() for one in found} - set(range(samples_per_prompt))
        if strangers:
            yield f"epoch {epoch} holds samples {sorted(strangers)}, and a prompt has {samples_per_prompt}"
        if epoch < num_complete:
            num_missing += num_prompts * samples_per_prompt - sum(len(found) for found in prompts.values())
    if num_missing > num_open:
        yield f"{num_missing} samples of complete epochs are missing, and {num_open} are open"


def _shown(samples: set[Sample]) -> str:
    first = [f"{prompt_id} (epoch {epoch}, sample {sample})" for epoch, prompt_id, sample in sorted(samples)[:3]]
    return ", ".join(first) + (", ..." if len(samples) > len(first) else "")


def _check_header(path: Path, found: dict[str, Any], right: dict[str, Any]) -> None:
    wrong = [key for key in right if found.get(key) != right[key]]
    if wrong:
        raise DataError(
            f"{path}: found {', '.join(f'{key} {found.get(key)}' for key in wrong)}, right would be "
            f"{', '.join(f'{key} {right[key]}' for key in wrong)}: it is not the ledger of this run"
        )
