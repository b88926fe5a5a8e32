"""Configs from YAML and overrides: what is read, and what every kind of mistake is told."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topd_ray.config.load import dump_config, load_config
from topd_ray.config.schema import MIN_OBJECT_STORE_BYTES, StudentConfig, TeacherConfig, TopdConfig
from topd_ray.errors import ConfigError

MINIMAL = "student: {model: org/student}\nteacher: {model: org/teacher}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return written(tmp_path, MINIMAL)


def written(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, the head line checked and left out."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    head, *lines = str(caught.value).split("\n  ")
    assert head == f"{path}: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return lines


def test_file_and_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "learner:\n  learning_rate: 1e-6\n  betas: [0.8, 0.9]\nbuffer:\n")
    config = load_config(path, ["run.steps=7", "rollout.temperature=1e0", "data.heldout=", "run.steps=8"])
    assert config.learner.learning_rate == 1e-6
    assert config.learner.betas == (0.8, 0.9)
    assert config.run.steps == 8
    assert config.rollout.temperature == 1.0
    assert config.data.heldout is None
    assert config.buffer.max_bytes == 2 * 1024**3


def test_override_of_a_nested_section_and_of_free_keys(minimal: Path) -> None:
    config = load_config(minimal, ["data.arithmetic.difficulty=3", "data.chat_template_kwargs.enable_thinking=false"])
    assert config.data.arithmetic.difficulty == 3
    assert config.data.chat_template_kwargs == {"enable_thinking": False}


def test_yaml_is_read_as_yaml_1_2(minimal: Path) -> None:
    config = load_config(minimal, ["data.system_prompt=yes", "run.name=2026-01-02", "run.seed=010"])
    assert (config.data.system_prompt, config.run.name, config.run.seed) == ("yes", "2026-01-02", 10)


def test_override_values_may_hold_equals_signs(minimal: Path) -> None:
    assert load_config(minimal, ["data.system_prompt=a=b"]).data.system_prompt == "a=b"


def test_all_problems_at_once(minimal: Path) -> None:
    lines = problems(
        minimal,
        "learner.learning_rte=1e-6",
        "rollout.temperature=0",
        "near_future.window=true",
        "run.seed=1.5",
        "objective.method=ppo",
        "evaluation.num_runs=3",
        "foo",
    )
    assert lines == [
        "override 'foo': found no dotted key and value, right would be, for instance, run.steps=10",
        "run.seed: found 1.5 (a number), right would be integer >= 0",
        "rollout.temperature: found 0 (an integer), right would be number > 0.0",
        "near_future.window: found true, right would be integer >= 1",
        'objective.method: found "ppo" (text), right would be topd | opd',
        "learner.learning_rte: unknown key, the nearest right one is learner.learning_rate",
        "evaluation.num_runs, evaluation.temperature: found 3 greedy answers per prompt, which are all the same; "
        "right would be temperature > 0, or num_runs 1",
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("learnr={learning_rate: 1}", "learnr: unknown key, the nearest right one is learner"),
        (
            "rollout.learning_rate=1",
            "rollout.learning_rate: unknown key, the nearest right one is learner.learning_rate",
        ),
        ("data.arithmetic.dificulty=1", "the nearest right one is data.arithmetic.difficulty"),
        ("xyz=1", "xyz: unknown key, right would be one of run, data, student, teacher"),
        ("learner.betas=[0.9]", "learner.betas: found [0.9] (a list), right would be list of 2, each: number >= 0.0"),
        ("learner.betas=[0.9, 1.0]", "learner.betas: found [0.9, 1.0] (a list)"),
        ("learner.learning_rate=.inf", "learner.learning_rate: found Infinity (a number), right would be number > 0.0"),
        ("learner.learning_rate=.nan", "learner.learning_rate: found NaN (a number), right would be number > 0.0"),
        ("learner.learning_rate='1e-6'", 'learner.learning_rate: found "1e-6" (text), right would be number > 0.0'),
        ("teacher.top_k=0", "teacher.top_k: found 0 (an integer), right would be integer >= 1, or full"),
        ("teacher.top_k=all", 'teacher.top_k: found "all" (text), right would be integer >= 1, or full'),
        ("run.name=5", "run.name: found 5 (an integer), right would be text matching"),
        ("run.deterministic=yes", 'run.deterministic: found "yes" (text), right would be true or false'),
        ("data.arithmetic.difficulty=9", "found 9 (an integer), right would be integer >= 1 and <= 8"),
        ("run=5", "run: found 5 (an integer), right would be a section with some of run.name, run.root"),
        ("student=", "student.model: missing, right would be text: Local folder"),
        ("teacher={top_k: 3}", "teacher.model: missing, right would be text"),
        ("run.steps=[1,", "override 'run.steps=[1,':1:4: expected"),
        ("run.=1", "override 'run.=1': found no dotted key"),
        ("data.train.x=1", "override 'data.train.x=1': data.train is no section, it holds"),
    ],
)
def test_one_problem(minimal: Path, override: str, line: str) -> None:
    found = problems(minimal, "data.train=a.jsonl", override)
    assert len(found) == 1
    assert line in found[0]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["rollout.prompts_per_step=3", "rollout.samples_per_prompt=1", "learner.num_ranks=4"],
            "found a batch of 3 x 1 = 3 trajectories for 4 ranks; right would be at least one each",
        ),
        (
            ["learner.max_tokens_per_micro_batch=8799"],
            "found 8799 tokens of one forward pass for trajectories of up to 800 + 8000; right would be at least 8800",
        ),
        (
            ["learner.max_tokens_per_micro_batch=0"],
            "learner.max_tokens_per_micro_batch: found 0 (an integer), right would be ",
        ),
        (["objective.divergence=sampled_pg", "objective.cap=low_ot"], "right would be cap none, or a divergence"),
        (["objective.divergence=sampled_pg", "rollout.top_p=0.9"], "right would be top_p 1"),
        (
            ["objective.kl_discount=0.5"],
            "objective.kl_discount, objective.divergence: found kl_discount 0.5 with the divergence reverse;",
        ),
        (
            ["objective.kl_discount=0.5", "objective.divergence=sampled_pg", "pipeline.max_staleness=2"],
            "objective.kl_discount, pipeline.max_staleness: found kl_discount 0.5 with max_staleness 2; right would be",
        ),
        (
            ["near_future.guidance_context=teacher", "learner.max_tokens_per_micro_batch=8849"],
            "found 8849 tokens of one forward pass for prefixes of up to 8800 with windows of 50 of their own; right "
            "would be at least 8850, or one_trajectory",
        ),
        (
            ["near_future.guidance_context=teacher", "pipeline.max_staleness=1"],
            "near_future.guidance_context, pipeline.max_staleness, objective.importance_horizon: found teacher with",
        ),
        (
            ["near_future.student_window=resample", "run.deterministic=true", "teacher.num_workers=2"],
            "teacher.num_workers, rollout.num_workers: found resample with 2 teachers for 1 rollout workers",
        ),
        (
            ["near_future.student_window=resample", "pipeline.max_staleness=1"],
            "near_future.student_window, pipeline.max_staleness: found resample with max_staleness 1, where the policy",
        ),
        (["learner.offload_optimizer=true", "learner.zero_stage=0"], "right would be zero_stage 1, 2 or 3"),
        (
            ["learner.loss_kernel=triton", "resources.gpus_per_learner=0"],
            "learner.loss_kernel, resources.gpus_per_learner: found triton, whose kernels run on a GPU, for a learner",
        ),
        (["evaluation.every=5", "data.heldout="], "right would be every 0, or data.heldout set"),
        (
            ["rollout.max_num_seqs=64", "rollout.max_batched_tokens=63"],
            "rollout.max_batched_tokens, rollout.max_num_seqs: found 63 tokens of one forward pass for 64 sequences",
        ),
        (["teacher.max_batched_tokens=255"], "teacher.max_batched_tokens, teacher.max_num_seqs: found 255 tokens"),
        (
            ["resources.gpus_per_rollout=1.5", "rollout.tensor_parallel_size=2"],
            "resources.gpus_per_rollout: found 1.5; right would be a whole number, or at most 1",
        ),
        (["resources.gpus_per_learner=2.5"], "resources.gpus_per_learner: found 2.5; right would be a whole number"),
        (
            ["resources.gpus_per_teacher=1", "teacher.tensor_parallel_size=2"],
            "resources.gpus_per_teacher, teacher.tensor_parallel_size: found 1 GPUs for an engine spread over 2; "
            "right would be 2, unset, or 0",
        ),
        (
            ["resources.object_store_bytes=78643199"],
            "resources.object_store_bytes: found 78643199 (an integer), right would be integer >= 78643200",
        ),
    ],
)
def test_contradictions(minimal: Path, overrides: list[str], line: str) -> None:
    found = problems(minimal, *overrides)
    assert len(found) == 1
    assert line in found[0]


def test_what_just_fits_is_taken(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "rollout.max_batched_tokens=256",
            "rollout.kv_cache_bytes=1",
            "teacher.tensor_parallel_size=2",
            "resources={gpus_per_rollout: 0.5, gpus_per_teacher: 2.0, object_store_bytes: 78643200}",
        ],
    )
    assert config.resources.gpus_per_teacher == 2.0
    load_config(minimal, ["rollout.tensor_parallel_size=2", "resources.gpus_per_rollout=0"])
    beside = ["near_future.guidance_context=teacher", "learner.max_tokens_per_micro_batch=8850"]
    load_config(minimal, [*beside, "pipeline.max_staleness=1", "objective.importance_horizon=0"])


def test_the_smallest_object_store_is_rays() -> None:
    constants = Path(find_spec("ray").origin).parent / "_private" / "ray_constants.py"
    assert f"\nOBJECT_STORE_MINIMUM_MEMORY_BYTES = {MIN_OBJECT_STORE_BYTES // 1024**2} * 1024 * 1024" in (
        constants.read_text()
    )


def test_a_tilde_is_the_home_folder(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["student.model=~/s", "teacher.model=~/t", "data.train=~/a.jsonl", "data.heldout=~/b", "run.root=~/runs"]
    config = load_config(minimal, paths)
    assert (config.student.model, config.teacher.model) == ("/home/me/s", "/home/me/t")
    assert (config.data.train, config.data.heldout) == ("/home/me/a.jsonl", "/home/me/b")
    assert config.run.folder == Path("/home/me/runs/run")
    assert load_config(minimal, ["student.model=~no_such_user/s"]).student.model == "~no_such_user/s"


def test_no_contradiction_is_made_up_from_a_bad_value(minimal: Path) -> None:
    assert problems(minimal, "learner.num_ranks=four", "rollout.prompts_per_step=7") == [
        'learner.num_ranks: found "four" (text), right would be integer >= 1'
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run:\n  seed: 1\n  seed: 2\n", ":3:3: found the key 'seed' a second time; keep one of them"),
        ("run: {seed: [}\n", ":1:14: expected the node content, but found '}'"),
        ("1: x\n", ":1:1: found a key that is not text; quote it"),
        ("run: !!python/name:os.system\n", ":1:6: could not determine a constructor"),
        ("- a\n", 'found ["a"] (a list), right would be a mapping of the sections run, data'),
        ("learner.learning_rate: 1.0\n", "found a dotted key in the file, right would be the key learning_rate inside"),
        ("run: &a\n  name: *a\n", "found values that refer to themselves"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text))
    assert message in str(caught.value)
    assert str(tmp_path / "job.yaml") in str(caught.value)


def test_empty_file_names_what_is_required(tmp_path: Path) -> None:
    lines = problems(written(tmp_path, ""))
    assert [line.partition(":")[0] for line in lines] == ["student.model", "teacher.model"]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: found no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: \xe9")
    with pytest.raises(ConfigError, match="bytes that are not UTF-8 text at byte 5"):
        load_config(tmp_path / "latin.yaml")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    [
        "1e-6",
        "yes",
        "no",
        "null",
        "~",
        "",
        "0x1f",
        "1_000",
        "2026-01-01",
        ".inf",
        "<<",
        "a: b",
        "010",
        "1:30",
        " x ",
        "\x85",
    ]
)


@settings(deadline=None, max_examples=50)
@given(system=TEXT, kwarg=TEXT, seed=st.integers(0, 2**70), rate=st.floats(1e-300, 1e300), flag=st.booleans())
def test_dump_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, system: str, kwarg: str, seed: int, rate: float, flag: bool
) -> None:
    base = TopdConfig(student=StudentConfig(model=system), teacher=TeacherConfig(model="b", top_k="full"))
    config = base.model_copy(
        update={
            "run": base.run.model_copy(update={"seed": seed, "deterministic": flag}),
            "data": base.data.model_copy(
                update={"system_prompt": system, "chat_template_kwargs": {"k": kwarg, "f": flag}}
            ),
            "learner": base.learner.model_copy(update={"learning_rate": rate, "betas": (0.5, 0.25)}),
        }
    )
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(path) == config


def test_config_loads_without_the_heavy_libraries() -> None:
    program = (
        "import sys, topd_ray.config.load, topd_ray.config.reference\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
