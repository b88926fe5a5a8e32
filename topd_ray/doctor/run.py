"""A run folder: is what a run has written there whole, and does it agree?"""

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from topd_ray.config.load import load_config
from topd_ray.config.schema import TopdConfig
from topd_ray.data.tokenizer import load_tokenizer
from topd_ray.doctor.finding import Finding
from topd_ray.engines.checkpoint import tensor_shapes
from topd_ray.engines.export import TOKENIZER_FILES
from topd_ray.errors import ConfigError, DataError
from topd_ray.metrics.step_lines import read_lines
from topd_ray.pipeline.checkpoint import Checkpoints, Examined, step_of
from topd_ray.pipeline.identity import run_identity
from topd_ray.pipeline.ledger import LedgerReport, read_ledger
from topd_ray.pipeline.manifest import Identity

REMAINS = {
    "failed_batch": "the batch of a loss that was not finite, or that the learner was lost with",
    "quarantine.jsonl": "inputs that made their workers fail",
    "post-mortem": "what was known when a session failed",
}
"""Folders and files that tell of trouble a run has had."""
WRITTEN_AGAIN = "the command that began the run writes it again"
AGAIN = "begin again under another run.name"


def report(folder: Path) -> list[Finding]:
    """Every finding about the run in `folder`; reads its checkpoints as a whole and changes nothing.

    Raises ConfigError where there is no run.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: found no config.yaml, right would be the folder of a run (run.root/run.name)")
    config, about_config = _config(folder)
    checkpoints, about_checkpoints = _checkpoints(folder, config)
    saved = next((step_of(one.name) for one in checkpoints if one.is_latest and one.fault is None), None)
    made, about_metrics = _metrics(folder)
    return [
        about_config,
        _lock(folder),
        *about_checkpoints,
        about_metrics,
        *_ledger(folder, config, made),
        *_agreement(folder, saved, made, checkpoints),
        *_result(folder, made),
        *_remains(folder),
    ]


def _config(folder: Path) -> tuple[TopdConfig | None, Finding]:
    try:
        config = load_config(folder / "config.yaml")
    except ConfigError as error:
        mend = f"use the version of topd_ray that began the run, or {AGAIN}"
        return None, Finding(subject="config", found=str(error), state="wrong", mend=mend)
    return config, Finding(subject="config", found=f"{config.objective.method}, run.seed {config.run.seed}")


def _lock(folder: Path) -> Finding:
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return Finding(subject="lock", found="never taken", state="note")
    except BlockingIOError:
        return Finding(
            subject="lock",
            found="a process trains here now, what follows may change under way",
            state="note",
            mend="ask again when it has ended",
        )
    return Finding(subject="lock", found="free, no process trains here")


def _identity(config: TopdConfig | None) -> tuple[Identity | None, str]:
    """What the checkpoints are compared with, and why not if they are not."""
    if config is None:
        return None, "the config cannot be read"
    try:
        return run_identity(config, load_tokenizer(config.student)), ""
    except (ConfigError, OSError) as error:
        return None, f"student.model={config.student.model} cannot be read here: {error}"


def _checkpoints(folder: Path, config: TopdConfig | None) -> tuple[list[Examined], list[Finding]]:
    """Newest first."""
    identity, why_not = _identity(config)
    store = Checkpoints(folder / "checkpoints", keep=1, identity=identity)
    examined = store.examine()
    if not examined:
        return [], [Finding(subject="checkpoints", found="none yet", state="note")]
    good = next((one.name for one in examined if one.fault is None), None)
    findings = [_checkpoint(store, one, good, folder) for one in examined]
    if not any(one.is_latest for one in examined):
        findings.append(
            Finding(
                subject="checkpoints",
                found="none of them is pointed at, the run would begin at its start",
                state="wrong",
                mend=store.command(good) if good else AGAIN,
            )
        )
    if why_not:
        findings.append(Finding(subject="checkpoints", found=f"not compared with the run: {why_not}", state="note"))
    return examined, findings


def _checkpoint(store: Checkpoints, one: Examined, good: str | None, folder: Path) -> Finding:
    role = "the latest" if one.is_latest else ""
    if one.fault is None:
        found = ", ".join(filter(None, ["whole", role, "the last good one" if one.name == good else ""]))
        return Finding(subject=one.name, found=found)
    if one.is_latest:
        mend = f"go on from the last good one: {store.command(good)}" if good else f"none is good: {AGAIN}"
    else:
        mend = f"delete it: rm -r {folder / 'checkpoints' / one.name}"
    return Finding(subject=one.name, found=", ".join(filter(None, [role, one.fault])), state="wrong", mend=mend)


def _metrics(folder: Path) -> tuple[int | None, Finding]:
    """The last update that metrics.jsonl tells of; None where it cannot be read."""
    path = folder / "metrics.jsonl"
    try:
        steps = [line["step"] for line in read_lines(path)]
    except FileNotFoundError:
        return 0, Finding(subject="metrics", found="none yet", state="note")
    except DataError as error:
        return None, Finding(subject="metrics", found=str(error), state="wrong", mend=f"mv {path} {path}.bad")
    made = max(steps, default=0)
    if steps != sorted(steps) or not {*range(1, made + 1)} <= {*steps}:
        absent = sorted({*range(1, made + 1)} - {*steps})
        found = f"updates {absent[:3]} are missing" if absent else "updates are out of order"
        mend = f"{path} is not as a run writes it: was it edited, or written by two runs?"
        return made, Finding(subject="metrics", found=found, state="wrong", mend=mend)
    return made, Finding(subject="metrics", found=f"{len(steps)} lines, up to update {made}")


def _ledger(folder: Path, config: TopdConfig | None, made: int | None) -> Iterator[Finding]:
    path = folder / "ledger.jsonl"
    try:
        ledger = read_ledger(path)
    except FileNotFoundError:
        if made:
            yield Finding(subject="ledger", found="there is none, and updates were made", state="wrong", mend=AGAIN)
        else:
            yield Finding(subject="ledger", found="none yet", state="note")
        return
    except DataError as error:
        yield Finding(subject="ledger", found=str(error), state="wrong", mend=AGAIN)
        return
    yield Finding(subject="ledger", found=_figures(ledger))
    if config is not None and config.rollout.samples_per_prompt != ledger.samples_per_prompt:
        yield Finding(
            subject="ledger",
            found=f"{ledger.samples_per_prompt} samples per prompt, {config.rollout.samples_per_prompt} in the config",
            state="wrong",
            mend=AGAIN,
        )
    for fault in ledger.faults:
        mend = f"the student has not seen what it should: {AGAIN}, and report this with {path}"
        yield Finding(subject="ledger", found=fault, state="wrong", mend=mend)
    if made is not None and abs(made - ledger.steps) > 1:  # a kill may come between the two files
        yield Finding(
            subject="ledger",
            found=f"{ledger.steps} updates, {made} in metrics.jsonl",
            state="wrong",
            mend="go on from a checkpoint that both reach",
        )


def _figures(ledger: LedgerReport) -> str:
    return (
        f"{ledger.steps} updates, {ledger.prompts} prompts drawn x {ledger.samples_per_prompt} samples, "
        f"{ledger.trained_once} trained on once, {ledger.lost} lost, {ledger.doubled} doubled, "
        f"{ledger.quarantined} quarantined, {ledger.dropped} dropped, {ledger.open} open, "
        f"staleness up to {ledger.largest_staleness}"
    )


def _agreement(folder: Path, saved: int | None, made: int | None, checkpoints: list[Examined]) -> Iterator[Finding]:
    """Between the latest checkpoint, if it is good, and what else tells how far the run is."""
    if saved is None or made is None:
        return
    if made < saved:
        earlier = [one.name for one in checkpoints if one.fault is None and step_of(one.name) <= made]
        command = Checkpoints(folder / "checkpoints", keep=1).command
        yield Finding(
            subject="progress",
            found=f"metrics.jsonl ends at update {made}, the latest checkpoint is of {saved}",
            state="wrong",
            mend=f"go on from an earlier one: {command(earlier[0])}" if earlier else AGAIN,
        )
        return
    state = _read(folder / "checkpoints" / _name(checkpoints) / "state.json")
    position = _position(folder / "ledger.jsonl", saved)
    if position is not None and position != state["schedule"].get("position", position):
        yield Finding(
            subject="progress",
            found=f"the ledger's cursor at update {saved} is {position}, the checkpoint's "
            f"{state['schedule']['position']}",
            state="wrong",
            mend=AGAIN,
        )
    ahead = f", {made - saved} later ones would be done again" if made > saved else ""
    yield Finding(subject="progress", found=f"update {saved} is safe{ahead}")


def _name(checkpoints: list[Examined]) -> str:
    return next(one.name for one in checkpoints if one.is_latest)


def _position(path: Path, step: int) -> int | None:
    """The cursor after an update, by the ledger."""
    try:
        return next((line["position"] for line in read_lines(path) if line["step"] == step > 0), None)
    except (OSError, DataError):
        return None  # `_ledger` has said so


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _result(folder: Path, made: int | None) -> Iterator[Finding]:
    """summary.json and the export, which a run writes at its end."""
    try:
        steps = _read(folder / "summary.json").get("steps")
    except FileNotFoundError:
        steps = None
    except (ValueError, AttributeError) as error:
        yield Finding(subject="summary", found=f"cannot be read: {error}", state="wrong", mend=WRITTEN_AGAIN)
        return
    if not (folder / "export").exists():
        if steps is None:
            yield Finding(subject="export", found="none yet, the run has not ended", state="note")
        else:
            yield Finding(subject="export", found="gone", state="wrong", mend=WRITTEN_AGAIN)
        return
    yield _export(folder / "export")
    if steps is not None and made is not None and steps != made:
        yield Finding(
            subject="export",
            found=f"of update {steps}, the run is at {made}",
            state="note",
            mend="the same command writes a new one at its end",
        )


def _export(folder: Path) -> Finding:
    """Headers and sizes of all files; a changed bit in a weight is not found."""
    try:
        num_tensors = len(tensor_shapes(folder))
        json.loads((folder / "config.json").read_text())
        if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
            raise ConfigError("no tokenizer")
    except (ConfigError, OSError, ValueError, SafetensorError) as error:
        return Finding(subject="export", found=f"torn: {error}", state="wrong", mend=WRITTEN_AGAIN)
    return Finding(subject="export", found=f"whole, {num_tensors} tensors")


def _remains(folder: Path) -> Iterator[Finding]:
    for name, what in REMAINS.items():
        files = [path for path in (folder / name, *(folder / name).rglob("*")) if path.is_file()]
        if files:
            mend = f"ls -l {folder / name}"
            yield Finding(subject=name, found=f"{len(files)} files: {what}", state="note", mend=mend)
