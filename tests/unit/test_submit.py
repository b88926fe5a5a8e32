"""What `topd submit` refuses before it asks a cluster, and what it sends."""

import json
from pathlib import Path

import pytest

from topd_ray.cli import main
from topd_ray.errors import ConfigError
from topd_ray.pipeline.submit import connect, job_environment, path_inside

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "jobs" / "demo.yaml")


def test_a_config_inside_the_working_directory_is_found_there(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    assert path_inside(tmp_path / "jobs" / "one.yaml", tmp_path) == Path("jobs/one.yaml")


@pytest.mark.parametrize(
    ("inside", "message"), [("../one.yaml", "lies outside"), ("runs/a/config.yaml", "not be sent")]
)
def test_a_config_the_job_would_not_have(tmp_path: Path, inside: str, message: str) -> None:
    working_dir = tmp_path / "work"
    working_dir.mkdir()
    with pytest.raises(ConfigError, match=message):
        path_inside(working_dir / inside, working_dir)


def test_the_runtime_environment_gets_the_working_directory_and_time_to_stop(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    variables = {"NCCL_DEBUG": "WARN", "TOKENIZERS_PARALLELISM": "false", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    file.write_text(json.dumps({"env_vars": variables, "excludes": ["data"]}))
    found = job_environment(tmp_path, file)
    assert found["env_vars"] == variables
    assert found["working_dir"] == str(tmp_path)
    assert {".venv", ".git", "runs", "data"} <= set(found["excludes"])
    assert job_environment(tmp_path, None)["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("env_vars: {HF_TOKEN: abc}", "HF_TOKEN, which the dashboard"),
        ("env_vars: {WANDB_API_KEY: abc}", "WANDB_API_KEY"),
        ("env_vars: {AWS_SECRET_ACCESS_KEY: abc}", "AWS_SECRET_ACCESS_KEY"),
        ("env_vars: {PIP_INDEX_URL: 'https://me:abcdefgh@host/simple'}", "a password in an address"),
        ("pip: ['--index-url https://me:abcdefgh@host/simple', x]", "a password in an address"),
        ("env_vars: {NOTE: hf_abcabcabcabcabcabcabcabc}", "looks like a secret"),
        ("env_vars: {N: 1}", "a mapping of text to text"),
        ("[env_vars]", "a list"),
    ],
)
def test_runtime_environments_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "env.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        job_environment(tmp_path, file)
    assert "abc" not in str(raised.value)


def test_an_override_with_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    secret = "student.model=https://me:abcdefgh@hub.example/model"
    assert main(["submit", DEMO, "--working-dir", str(ROOT), "run.root=/shared/runs", secret]) == 2
    said = capsys.readouterr().err
    assert "student.model: found what looks like a secret" in said and "abcdefgh" not in said


def test_a_relative_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", DEMO, "--working-dir", str(ROOT)]) == 2
    assert "run.root: found runs, which in a job would be" in capsys.readouterr().err


def test_a_bad_config_is_refused_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", DEMO, "run.stepz=3"]) == 2
    assert "run.stepz: unknown key, the nearest right one is run.steps" in capsys.readouterr().err


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ConfigError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:9.*ssh -L"):
        connect("http://127.0.0.1:9")
