"""The arms of the ablation and the sweep: each is a run that its config allows, and no two are the same."""

from pathlib import Path

import pytest

from topd_ray.config.load import dump_config, load_config, overridden
from topd_ray.config.schema import TopdConfig
from topd_ray.config.study_schema import ArmsConfig
from topd_ray.errors import ConfigError
from topd_ray.studies.comparison.arms import ABLATION, OPD, PAPER, START, TOPD, Arm, chosen, sweep
from topd_ray.studies.comparison.runs import StudyRun, plan_runs
from topd_ray.studies.comparison.study import compare_arms

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "jobs" / "demo.yaml"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> TopdConfig:
    monkeypatch.chdir(ROOT)
    return load_config(DEMO)


def planned(config: TopdConfig, arms: tuple[Arm, ...], folder: Path) -> dict[str, StudyRun]:
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    return {run.name: run for run in plan_runs(path, config, arms, folder / "runs")}


@pytest.mark.parametrize("study", ["ablation", "sweep"])
def test_every_arm_is_a_run_of_its_own(demo: TopdConfig, tmp_path: Path, study: str) -> None:
    arms = ABLATION if study == "ablation" else sweep(demo)
    runs = planned(demo, arms, tmp_path)
    assert len(runs) == len(arms) * 5
    different = {"run": demo.run, "evaluation": demo.evaluation}
    configs = [run.config.model_copy(update=different) for run in runs.values() if run.seed == 0]
    assert len({dump_config(config) for config in configs}) == len(arms)
    assert [(run.config.run.seed, run.config.evaluation.teacher) for run in runs.values() if run.arm.name == OPD] == [
        (seed, True) for seed in range(5)
    ]
    assert sum(run.config.evaluation.teacher for run in runs.values()) == 5


def test_all_arms_train_on_and_answer_the_same_prompts(demo: TopdConfig, tmp_path: Path) -> None:
    runs = planned(demo, ABLATION, tmp_path).values()
    assert len({run.config.data.model_dump_json() for run in runs}) == 1
    assert len({run.config.rollout.model_dump_json() for run in runs}) == 1
    evaluations = {run.config.evaluation.model_copy(update={"teacher": False}).model_dump_json() for run in runs}
    assert len(evaluations) == 1
    first = next(iter(runs)).config
    assert (first.evaluation.every, first.evaluation.sampled_runs, first.run.steps) == (20, 1, 200)


def test_the_papers_arms(demo: TopdConfig, tmp_path: Path) -> None:
    assert [*PAPER] == [START, *(arm.name for arm in ABLATION if arm.name in PAPER)]
    found = {
        name: (run.config.objective.method, run.config.objective.cap)
        for name, run in planned(demo, ABLATION, tmp_path).items()
        if run.seed == 0
    }
    assert found == {
        "opd-seed0": ("opd", "none"),
        "opd-low-cap-seed0": ("opd", "low_ot"),
        "opd-high-cap-seed0": ("opd", "matched_high_ot"),
        "topd-seed0": ("topd", "none"),
        "topd-low-cap-seed0": ("topd", "low_ot"),
        "topd-high-cap-seed0": ("topd", "matched_high_ot"),
    }


def test_the_sweep_is_relative_to_the_config(demo: TopdConfig) -> None:
    names = {arm.name for arm in sweep(demo)}
    assert {"lambda-0.03", "lambda-0.1", "lambda-1", "window-4", "window-16", "window-32"} <= names
    assert {"candidates-0.05", "candidates-0.2", "candidates-0.4"} <= names
    assert {"identity-plan", "identity-window-4", "identity-window-16"} <= names
    (more,) = [arm for arm in sweep(demo) if arm.name == "opd-more-rollouts"]
    assert "rollout.prompts_per_step=115" in more.overrides, "64 x (1 + 0.1 x 8)"


def test_multiples_that_are_the_same_number_are_one_arm(demo: TopdConfig) -> None:
    names = [arm.name for arm in sweep(overridden(demo, ["near_future.candidate_fraction=0.5"]))]
    assert len(set(names)) == len(names) and "candidates-1" in names


def test_a_refused_study_leaves_its_folder_to_the_next(demo: TopdConfig, tmp_path: Path) -> None:
    out = tmp_path / "ablation"
    demo = overridden(demo, ["studies.arms={seeds: [0], only: [topd]}"])
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "1 + 1"}\n')
    for wrong, message in {
        "run.steps=null": "run.steps",
        "data.train=nowhere.jsonl": "data.train",
        "teacher.model=topd_ray/demo/worded_pair/teacher": "vocabular",
        f"data.heldout={tmp_path}/heldout.jsonl": "prompt 1 has the answer None",
    }.items():
        with pytest.raises(ConfigError, match=message):
            compare_arms("ablation", overridden(demo, [wrong]), out, print, command="")
        assert not out.exists()


def test_only_and_more(demo: TopdConfig) -> None:
    mine = {"wide": ("near_future.window=12",)}
    arms = chosen(ABLATION, ArmsConfig(only=(TOPD, "wide"), more=mine))
    assert [arm.name for arm in arms] == [OPD, TOPD, "wide"], "all are compared with OPD"
    assert len(chosen(ABLATION, ArmsConfig(more=mine))) == len(ABLATION) + 1
    with pytest.raises(ConfigError, match=r"studies\.arms\.only: found topdd, right would be some of start, opd"):
        chosen(ABLATION, ArmsConfig(only=("topdd",)))
    with pytest.raises(ConfigError, match=r"studies\.arms\.more: found opd, start, right would be names other"):
        chosen(ABLATION, ArmsConfig(more={OPD: (), START: ()}))


def test_what_no_run_could_be_made_of_is_refused_before_any_runs(demo: TopdConfig, tmp_path: Path) -> None:
    endless = demo.model_copy(update={"run": demo.run.model_copy(update={"steps": None})})
    with pytest.raises(ConfigError, match=r"run\.steps: found none"):
        planned(endless, ABLATION, tmp_path)
    twice = demo.studies.arms.model_copy(update={"seeds": (0, 1, 0)})
    with pytest.raises(ConfigError, match=r"studies\.arms\.seeds: found \[0, 1, 0\], right would be every seed once"):
        planned(
            demo.model_copy(update={"studies": demo.studies.model_copy(update={"arms": twice})}), ABLATION, tmp_path
        )
    bad = Arm(name="bad", text="", overrides=("near_future.windo=3",))
    with pytest.raises(ConfigError, match=r"arm bad: (?s:.)*near_future\.window"):
        planned(demo, (bad,), tmp_path)


def test_several_at_once_run_inline_with_a_thread_each(demo: TopdConfig, tmp_path: Path) -> None:
    arms = demo.studies.arms.model_copy(update={"runs_at_once": 2})
    config = demo.model_copy(update={"studies": demo.studies.model_copy(update={"arms": arms})})
    run = planned(config, ABLATION, tmp_path)["opd-seed0"]
    assert run.command[-1] == "--inline" and run.config.resources.threads_per_learner == 1
    run = planned(demo, ABLATION, tmp_path)["opd-seed0"]
    assert "--inline" not in run.command and run.config.resources.threads_per_learner == 2


def test_an_arm_must_not_set_what_the_study_sets() -> None:
    config = load_config(DEMO, ["studies.arms.more={x: [run.seed=9, near_future.window=4]}"])
    with pytest.raises(ConfigError, match=r"studies\.arms\.more\.x: found run\.seed, which the study sets itself"):
        chosen(ABLATION, config.studies.arms)
