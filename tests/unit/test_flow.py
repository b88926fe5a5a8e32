"""What the driver decides, in virtual time: overlap, ages, order, back-pressure, and what failures take along."""

from collections import Counter
from typing import Any

import pytest

from tests.scripted_fleet import Run, Script, make_config
from topd_ray.errors import RunInterrupted, TopdError

SECONDS = {"write": 3.0, "queue": 0.0, "guide": 2.0, "learn": 4.0, "publish": 1.0, "replace": 5.0, "die": 1.0}


def script(*, slow: dict[tuple[str, str], float] | None = None, **fields: Any) -> Script:
    """Everything takes its `SECONDS`, but what `slow` has for (kind, trajectory id)."""
    return Script(seconds=lambda kind, key: (slow or {}).get((kind, key), SECONDS[kind]), **fields)


def ids(run: Run) -> list[list[str]]:
    return [[task.trajectory_id for task in update.tasks] for update in run.updates]


def batch(*prompts: int) -> list[str]:
    return [f"p{prompt}/0/{sample}" for prompt in prompts for sample in range(2)]


def test_a_synchronous_run_does_one_thing_after_the_other() -> None:
    run = Run(make_config(), script(), 3).play()
    run.check()
    assert ids(run) == [batch(0, 1), batch(2, 3), batch(4, 5)]
    assert run.fleet.now == 3 * (3.0 + 2.0 + 4.0 + 1.0)
    assert run.fleet.ages == [0] * 12
    assert all(worker.version == 3 for worker in run.fleet.workers["rollout"])


def test_an_asynchronous_run_is_as_fast_as_its_slowest_stage() -> None:
    run = Run(make_config(pipeline={"max_staleness": 2}), script(), 10).play()
    run.check()
    assert run.fleet.now == 3.0 + 2.0 + 10 * 4.0
    assert max(run.fleet.ages) == 2
    assert not run.tasks.num_drops


def test_figures_of_an_update() -> None:
    run = Run(make_config(pipeline={"max_staleness": 1}), script(), 1).play()
    figures = {metric.key: metric.sum for metric in run.updates[0].metrics}
    assert {key: figures[key] for key in figures if not key.startswith(("seconds/", "waiting/"))} == {
        "staleness/mean": 0,
        "staleness/max": 0,
        "staleness/dropped": 0,
        "faults/quarantined": 0,
        "faults/payloads_lost": 0,
        "faults/restarts_rollout": 0,
        "faults/restarts_teacher": 0,
        "queue/rollout": 0,
        "queue/writing": 0,
        "queue/teacher": 0,
        "queue/buffer": 0,
        "queue/bytes": 0,
        "rollout/tokens": 12,
        "teacher/tokens": 12,
    }
    assert {key for key in figures if key.startswith("waiting/")} == {
        "waiting/rollout",
        "waiting/teacher",
        "waiting/learner",
    }


def test_the_learner_waits_for_what_takes_long_rather_than_drop_it() -> None:
    slow = {("write", "p0/0/0"): 40.0}
    run = Run(make_config(pipeline={"max_staleness": 1}), script(slow=slow), 8).play()
    run.check()
    assert not run.tasks.num_drops
    (number,) = [index for index, update in enumerate(ids(run)) if "p0/0/0" in update]
    assert number == 1, "others went before it, as far as its age allows"
    (age,) = [
        update.policy_version - 1 - item.policy_version
        for update in run.updates
        for item in update.items
        if item.trajectory_id == "p0/0/0"
    ]
    assert age == 1


def test_the_learner_does_not_wait_while_the_buffer_is_full() -> None:
    """What it would wait for cannot get in."""
    slow = {("write", "p0/0/0"): 40.0}
    config = make_config(pipeline={"max_staleness": 1}, buffer={"max_bytes": 40})
    run = Run(config, script(slow=slow, num_bytes=lambda one: 10), 8).play()
    run.check()
    assert run.tasks.num_drops["p0/0/0"] >= 1


def test_samples_of_a_prompt_go_to_one_worker_while_others_finish() -> None:
    slow = {
        ("write", f"p{prompt}/0/{sample}"): 1.0 + sample + prompt % 3 for prompt in range(60) for sample in range(4)
    }
    sections: dict[str, Any] = {
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "num_workers": 3, "max_num_seqs": 4},
        "pipeline": {"max_staleness": 2},
    }
    run = Run(make_config(**sections), script(slow=slow), 8).play()
    run.check()
    seen: set[str] = set()
    for _, written in run.fleet.writes:
        prompts = Counter(one.rpartition("/")[0] for one in written)
        assert {number for prompt, number in prompts.items() if prompt not in seen} <= {4}
        seen |= set(prompts)
    assert {worker for worker, _ in run.fleet.writes} == {0, 1, 2}


def test_nothing_is_begun_that_will_be_too_old() -> None:
    """With S = 1, what a policy writes while the next update is learnt has to be the newest policy's."""
    slow = {("publish", "1"): 30.0}
    sections: dict[str, Any] = {"rollout": {"num_workers": 2, "max_num_seqs": 2}, "pipeline": {"max_staleness": 1}}
    run = Run(make_config(**sections), script(slow=slow), 6).play()
    run.check()
    assert not run.tasks.num_drops


def test_an_interrupt_comes_between_two_updates() -> None:
    signals = {"raised": False}

    def check_interrupt() -> None:
        assert not run.fleet.is_learning
        if signals["raised"]:
            raise RunInterrupted("stopped by SIGTERM")

    run = Run(make_config(), script(), 3)
    run.flow = run.start(run.fleet, (), 3, check_interrupt=check_interrupt)
    begin = run.fleet.learn

    def learn(items: Any) -> None:
        begin(items)
        signals["raised"] = len(run.fleet.batches) == 1

    run.fleet.learn = learn  # type: ignore[method-assign]
    run.updates = [run.flow.update(), run.flow.update()]
    assert ids(run) == [batch(0, 1), batch(2, 3)], "the update under way came to its end"
    with pytest.raises(RunInterrupted):
        run.flow.update()
    assert not run.fleet.is_learning and len(run.fleet.batches) == 2


def test_drain_leaves_the_engines_idle_and_up_to_date() -> None:
    slow = {("write", "p3/0/1"): 25.0}
    config = make_config(rollout={"num_workers": 2}, pipeline={"max_staleness": 2})
    run = Run(config, script(slow=slow, deaths=[(7, "rollout", 1)]), 6)
    while len(run.updates) < 6:
        run.updates.append(run.flow.update())
        run.flow.drain()
        assert not any(worker.has for workers in run.fleet.workers.values() for worker in workers)
        assert {worker.version for worker in run.fleet.workers["rollout"] if worker.is_up} == {run.fleet.version}
    run.check()


def test_a_deterministic_run_writes_a_lost_share_again_as_it_was() -> None:
    sections: dict[str, Any] = {
        "run": {"deterministic": True},
        "rollout": {"prompts_per_step": 7, "num_workers": 5, "max_num_seqs": 1},
        "teacher": {"num_workers": 2},
        "faults": {"max_attempts": 9},
    }
    slow = {("write", "p0/0/0"): 9.0, ("guide", "p0/0/0"): 9.0}
    calm = Run(make_config(**sections), script(slow=slow), 3).play()
    calm.check()
    shares = [tuple(batch(0, 5)), tuple(batch(2)), tuple(batch(4))]
    assert [guided for teacher, guided in calm.fleet.guides if teacher == 0][:3] == shares, "in order, however late"
    assert [written for worker, written in calm.fleet.writes[:5] if worker == 0] == [tuple(batch(0, 5))]
    deaths = [(1, "rollout", 0), (4, "teacher", 1), (20, "rollout", 3), (21.5, "teacher", 0), (50, "rollout", 2)]
    lost = iter([False] * 2 + [True] + [False] * 100)
    run = Run(
        make_config(**sections),
        script(slow=slow, deaths=deaths, loses_payload=lambda kind: kind == "learn" and next(lost)),
        3,
    ).play()
    run.check()
    assert ids(run) == ids(calm)
    assert set(run.fleet.writes) == set(calm.fleet.writes) and len(run.fleet.writes) > len(calm.fleet.writes)
    assert set(run.fleet.guides) == set(calm.fleet.guides)


def test_a_poison_input_does_not_wait_for_the_end_of_the_run() -> None:
    """Workers that always get something new have to become idle for what is tried alone."""
    for role in ("rollout", "teacher"):
        sections: dict[str, Any] = {"rollout": {"max_num_seqs": 2}, "pipeline": {"max_staleness": 3}}
        slow = {("learn", f"p{prompt}/0/{sample}"): 1.0 for prompt in range(60) for sample in range(2)}
        run = Run(make_config(**sections), script(poison={(role, "p1/0/1")}, slow=slow), 20).play()
        run.check()
        assert run.quarantined == ["p1/0/1"]
        (number,) = [index for index, update in enumerate(run.updates) if update.quarantined]
        assert number < 6
        ((task, reason),) = run.updates[number].quarantined
        assert (task.num_failures, reason) == (4, "poisoned")


def test_what_quarantine_leaves_of_the_last_batch_is_a_smaller_one() -> None:
    run = Run(make_config(), script(poison={("rollout", "p3/0/0")}), 2).play()
    run.check()
    assert ids(run) == [batch(0, 1), ["p2/0/0", "p2/0/1", "p3/0/1"]]


def test_a_batch_of_nothing_but_poison_is_followed_by_the_next() -> None:
    run = Run(make_config(), script(poison={("rollout", one) for one in batch(0, 1)}), 1).play()
    run.check()
    assert ids(run) == [batch(2, 3)]
    assert sorted(run.quarantined) == batch(0, 1)


def test_a_teacher_lost_after_its_trajectories_were_learnt_takes_none_along() -> None:
    run = Run(make_config(), script(deaths=[(9.5, "teacher", 0)]), 2).play()  # learnt at 9, published at 10
    run.check()
    assert len(run.fleet.writes) == 2
    assert max(run.metric("faults/restarts_teacher")) == 1


def test_a_teacher_lost_takes_along_what_only_it_held() -> None:
    slow = {("guide", "p1/0/0"): 20.0}
    sections: dict[str, Any] = {"rollout": {"num_workers": 2}, "teacher": {"num_workers": 2}}
    run = Run(make_config(**sections), script(slow=slow, deaths=[(6, "teacher", 0), (12, "teacher", 1)]), 1).play()
    run.check()
    guides = Counter(one for _, guided in run.fleet.guides for one in guided)
    assert guides == {"p0/0/0": 3, "p0/0/1": 3, "p1/0/0": 2, "p1/0/1": 2}, "p0 was guided, and then asked for beside p1"
    writes = Counter(one for _, written in run.fleet.writes for one in written)
    assert writes == {"p0/0/0": 2, "p0/0/1": 2, "p1/0/0": 1, "p1/0/1": 1}, "asked again while it was guided"


def test_a_rollout_worker_lost_takes_along_what_no_teacher_has_read() -> None:
    slow = {("guide", "p0/0/0"): 9.0, ("guide", "p2/0/0"): 9.0} | {
        ("write", f"p{n}/0/{s}"): 3.0 + n for n in range(4) for s in (0, 1)
    }
    config = make_config(rollout={"prompts_per_step": 4, "max_num_seqs": 16})
    run = Run(config, script(slow=slow, deaths=[(7, "rollout", 0)]), 1).play()
    run.check()
    writes = Counter(one for _, written in run.fleet.writes for one in written)
    assert {one for one, number in writes.items() if number == 2} >= set(batch(3))
    assert set(run.fleet.failures) <= set(batch(3)), "only what it was writing counts as its failure"


def test_a_batch_that_cannot_be_read_is_written_again() -> None:
    lost = iter([True, False])
    lines: list[str] = []
    run = Run(make_config(), script(loses_payload=lambda kind: kind == "learn" and next(lost)), 1)
    run.flow = run.start(run.fleet, (), 1, say=lines.append)
    run.play()
    run.check()
    assert lines == ["the learner could not fetch trajectories (4, written again): gone"]
    assert run.metric("faults/payloads_lost") == [4]
    assert Counter(one for _, written in run.fleet.writes for one in written) == dict.fromkeys(batch(0, 1), 2)
    assert not run.fleet.failures


def test_writing_and_guiding_stop_while_the_buffer_is_full() -> None:
    sections: dict[str, Any] = {
        "rollout": {"max_num_seqs": 2},
        "pipeline": {"max_staleness": 3},
        "buffer": {"max_bytes": 45},
    }
    waiting: list[int] = []
    run = Run(make_config(**sections), script(num_bytes=lambda one: 10, slow={("learn", "p0/0/0"): 100.0}), 6)
    finish = run.fleet.wait

    def wait() -> Any:
        waiting.append(len(run.fleet.writes))
        return finish()

    run.fleet.wait = wait  # type: ignore[method-assign]
    run.play().check()
    assert max(run.metric("queue/bytes")) <= 45
    assert sum(len(written) for _, written in run.fleet.writes) == 24


def test_a_buffer_too_small_for_a_batch_is_an_error() -> None:
    run = Run(make_config(buffer={"max_bytes": 39}), script(num_bytes=lambda one: 10), 1)
    with pytest.raises(TopdError, match=r"buffer.max_bytes is too small for the trajectories of one update"):
        run.play()


def test_what_it_says_of_failures() -> None:
    lines: list[str] = []
    run = Run(make_config(), script(poison={("teacher", "p0/0/1")}), 1)
    run.flow = run.start(run.fleet, (), 1, say=lines.append)
    run.play()
    assert lines[0] == "teacher worker 0 is lost and made anew: poisoned"
    assert lines[-1] == "trajectory p0/0/1 is given up: a worker fails whenever it has it: poisoned"
    assert len(lines) == 5
