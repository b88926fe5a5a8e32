"""The ledger: what it counts, what it finds, and how it goes on after a resume."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topd_ray.data.schedule import PromptSchedule
from topd_ray.errors import DataError
from topd_ray.pipeline.ledger import Ledger, LedgerReport, read_ledger

PROMPTS = [f"p{index}" for index in range(6)]


def open_ledger(path: Path, resume_step: int = 0) -> Ledger:
    return Ledger.open(path, resume_step, num_prompts=6, samples_per_prompt=2)


def entries(epoch: int, *prompts: int, version: int = 0) -> list[tuple[int, str, int, int]]:
    return [(epoch, PROMPTS[prompt], sample, version) for prompt in prompts for sample in (0, 1)]


def write_updates(path: Path, updates: list[dict[str, Any]], resume_step: int = 0) -> LedgerReport:
    ledger = open_ledger(path, resume_step)
    for step, update in enumerate(updates, start=resume_step + 1):
        ledger.write(step, **{"policy_version": step, "num_open": 0, **update})
    ledger.close()
    return read_ledger(path)


def test_an_epoch_trained_once(tmp_path: Path) -> None:
    report = write_updates(
        tmp_path / "ledger.jsonl",
        [
            {"trained": entries(0, 0, 1, 2, 3, version=0), "position": 4},
            {"trained": entries(0, 4, 5, version=1) + entries(1, 0, 1, version=1), "position": 8},
        ],
    )
    assert report == LedgerReport(
        steps=2,
        num_prompts=6,
        samples_per_prompt=2,
        prompts=8,
        trained_once=8,
        trajectories=16,
        open=0,
        lost=0,
        doubled=0,
        quarantined=0,
        dropped=0,
        largest_staleness=0,
        faults=(),
    )


def test_open_quarantined_and_dropped_ones_are_not_lost(tmp_path: Path) -> None:
    report = write_updates(
        tmp_path / "ledger.jsonl",
        [
            {"trained": entries(0, 0, 1, 2), "position": 5, "num_open": 4, "dropped": 1},
            {
                "trained": entries(0, 3, 4, version=0),
                "quarantined": [(0, "p5", 0), (0, "p5", 1)],
                "position": 6,
                "dropped": 2,
            },
        ],
    )
    assert (report.lost, report.doubled, report.quarantined, report.dropped) == (0, 0, 2, 3)
    assert (report.prompts, report.trained_once, report.trajectories, report.largest_staleness) == (6, 5, 10, 1)
    assert report.faults == ()


@pytest.mark.parametrize(
    ("update", "figures", "fault"),
    [
        (
            {"trained": entries(0, 0, 1, 2, 3, 4), "position": 6},
            {"lost": 2},
            "2 samples of complete epochs are missing, and 0 are open",
        ),
        ({"trained": entries(0, 0, 1), "position": 3, "num_open": 1}, {"lost": 1}, "1 trajectories are lost"),
        (
            {"trained": entries(0, 0, 1) + entries(0, 1), "position": 2},
            {"lost": 0, "doubled": 2, "trained_once": 1},
            "2 trajectories were trained on twice: p1 (epoch 0, sample 0), p1 (epoch 0, sample 1)",
        ),
        (
            {"trained": entries(0, 0), "quarantined": [(0, "p0", 1)], "position": 1},
            {"doubled": 1},
            "1 trajectories were trained on twice: p0 (epoch 0, sample 1)",
        ),
        ({"trained": entries(0, 0, 1, 2), "position": 2}, {"lost": -2}, "2 trajectories more than were drawn"),
        ({"trained": entries(1, 0), "position": 1}, {"lost": 0}, "epoch 1 holds 1 prompts, and 0 were drawn of it"),
        (
            {"trained": [(0, "p0", 0, 0), (0, "p0", 2, 0)], "position": 1},
            {"lost": 0},
            "epoch 0 holds samples [2], and a prompt has 2",
        ),
        (
            {"trained": entries(0, 0, version=1), "position": 1},
            {"lost": 0},
            "a trajectory was trained on before its policy was made",
        ),
    ],
)
def test_what_cannot_be_is_found(tmp_path: Path, update: dict[str, Any], figures: dict[str, int], fault: str) -> None:
    report = write_updates(tmp_path / "ledger.jsonl", [update])
    assert {key: getattr(report, key) for key in figures} == figures
    assert fault in report.faults


def test_a_lost_prompt_of_an_early_epoch_is_found_behind_later_ones(tmp_path: Path) -> None:
    """The totals alone would call it open."""
    report = write_updates(
        tmp_path / "ledger.jsonl",
        [
            {"trained": entries(0, 0, 1, 2, 3, 4), "position": 6, "num_open": 2},
            {"trained": entries(1, 0, 1, 2, 3, 4, 5), "position": 12, "num_open": 2},
            {"trained": entries(2, 0), "position": 13, "num_open": 0},
        ],
    )
    assert report.lost == 2
    assert "2 samples of complete epochs are missing, and 0 are open" in report.faults


def test_a_resumed_run_cuts_off_what_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write_updates(path, [{"trained": entries(0, step), "position": step + 1} for step in range(5)])
    with path.open("a") as file:
        file.write('{"step": 6, "trai')
    before = path.read_text().splitlines()
    report = write_updates(path, [{"trained": entries(0, 5, 4), "position": 5}], resume_step=3)
    assert path.read_text().splitlines()[:4] == before[:4]
    assert (report.steps, report.prompts, report.trained_once) == (4, 5, 5)
    open_ledger(path, 0).close()
    assert path.read_text().splitlines() == before[:1]


def test_a_ledger_that_lacks_updates_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write_updates(path, [{"trained": entries(0, 0), "position": 1}])
    with pytest.raises(DataError, match="found updates up to 1, right would be up to 3, that of the checkpoint"):
        open_ledger(path, 3)
    with pytest.raises(DataError, match="found num_prompts 6, right would be num_prompts 7: it is not the ledger of"):
        Ledger.open(path, 1, num_prompts=7, samples_per_prompt=2)
    with pytest.raises(DataError, match="it is not the ledger of this run"):
        open_ledger(tmp_path / "none.jsonl", 2)
    ledger = open_ledger(path, 1)
    with pytest.raises(DataError, match="step: found 3 after 1 in the ledger, right would be the next one"):
        ledger.write(3, policy_version=3, trained=[], position=1, num_open=0)
    ledger.close()


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n')
    with pytest.raises(DataError, match="found no ledger's first line, right would be one with format 1"):
        read_ledger(path)
    open_ledger(tmp_path / "other.jsonl").close()
    with (tmp_path / "other.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "trained": [[0, "p0"]], "policy_version": 1}) + "\n")
    with pytest.raises(DataError, match="found a malformed line"):
        read_ledger(tmp_path / "other.jsonl")


@given(st.data())
def test_a_schedule_followed_in_any_order_is_in_order_and_any_change_to_it_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Samples are trained on in any order, some quarantined; then one entry is left out, or entered once more."""
    schedule = PromptSchedule(PROMPTS, prompts_per_step=4, seed=3, shuffle=True)
    waiting: list[tuple[int, str, int]] = []
    updates: list[dict[str, Any]] = []
    for step in range(1, data.draw(st.integers(2, 6)) + 1):
        waiting += [(epoch, PROMPTS[index], sample) for epoch, index in schedule.take() for sample in (0, 1)]
        waiting = data.draw(st.permutations(waiting))
        num_trained = data.draw(st.integers(1, len(waiting)))
        num_bad = data.draw(st.integers(0, min(1, num_trained - 1)))
        done, waiting = waiting[:num_trained], waiting[num_trained:]
        updates.append(
            {
                "trained": [(*one, step - 1) for one in done[num_bad:]],
                "quarantined": done[:num_bad],
                "position": schedule.state()["position"],
                "num_open": len(waiting),
            }
        )
    folder = tmp_path_factory.mktemp("ledger")
    report = write_updates(folder / "right.jsonl", updates)
    assert (report.lost, report.doubled, report.faults) == (0, 0, ())
    changed = data.draw(st.integers(0, len(updates) - 1))
    first, *others = updates[changed]["trained"]
    less = [*updates[:changed], {**updates[changed], "trained": others}, *updates[changed + 1 :]]
    assert write_updates(folder / "less.jsonl", less).lost == 1
    more = [*updates[:-1], {**updates[-1], "trained": [*updates[-1]["trained"], first]}]
    assert write_updates(folder / "more.jsonl", more).doubled == 1
