"""What the command line refuses, how it says so, and that a dry run loads nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from topd_ray.cli import Say, main, summary_table
from topd_ray.config.load import load_config

DEMO = "jobs/demo.yaml"


def refused(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The message of a run that is refused."""
    assert main(["run", DEMO, *overrides]) == 2
    printed = capsys.readouterr()
    assert "starting the workers" not in printed.out
    return printed.err


def test_dry_run_prints_the_config_that_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", DEMO, "--dry-run", "learner.learning_rate=1e-6", "run.name=dry"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert float(printed["learner"]["learning_rate"]) == 1e-6
    assert printed["run"]["name"] == "dry"
    assert printed["near_future"]["transport"] == "exact"


def test_dry_run_imports_no_engine() -> None:
    code = (
        "import sys; from topd_ray.cli import main; main(['run', 'jobs/demo.yaml', '--dry-run']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_all_bad_keys_are_named_at_once_with_the_nearest_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "learner.learning_rat=1e-3", "rolout.top_p=0.5", "run.steps=many")
    assert "learner.learning_rate" in message
    assert "rollout" in message
    assert "run.steps" in message


def test_a_micro_batch_too_small_for_a_trajectory_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "right would be at least 176" in refused(capsys, "learner.max_tokens_per_micro_batch=175")


def test_more_teacher_tokens_than_the_vocabulary_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "top_k" in refused(capsys, "teacher.top_k=5000")


def test_prometheus_without_ray_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "metrics.prometheus=true", "--inline")
    assert "metrics.prometheus: found true with --inline" in message and "right would be false" in message


def test_a_model_folder_without_weights_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "vocab_size": 64}')
    message = refused(capsys, f"student.model={tmp_path}")
    assert str(tmp_path) in message and "safetensors" in message


def test_malformed_data_is_refused_with_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+2"}\n{"prompt": \n')
    message = refused(capsys, f"data.train={prompts}", f"run.root={tmp_path}")
    assert f"{prompts}:2" in message or "line 2" in message
    assert not (tmp_path / "demo-topd").exists(), "a refused run leaves nothing behind"


def test_a_folder_of_another_config_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from topd_ray.config.load import dump_config

    folder = tmp_path / "used"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step-000001\n")
    (folder / "config.yaml").write_text(dump_config(load_config(Path(DEMO), ["run.name=used", "run.seed=5"])))
    assert "run.seed" in refused(capsys, f"run.root={tmp_path}", "run.name=used")


def test_a_missing_config_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "jobs/nothing.yaml"]) == 2
    assert "jobs/nothing.yaml" in capsys.readouterr().err


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", DEMO, "--inlin"])
    assert stopped.value.code == 2


def test_the_table_names_what_was_measured() -> None:
    config = load_config(Path(DEMO), ["run.name=shown"])
    table = summary_table(config, {"before": 0.25, "after": 0.5, "teacher": 0.99}, 10, 12_345, 61.0)
    assert table.splitlines() == [
        "pass@1 on held-out prompts        topd",
        "  student before                 25.0%",
        "  student after                  50.0%",
        "  teacher                        99.0%",
        "10 updates, 12,345 trained tokens, 61 s; runs/shown/",
    ]


def test_lines_of_progress_carry_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    Say()("working")
    assert capsys.readouterr().out == "[ 0:00] working\n"
