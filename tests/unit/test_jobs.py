"""Every job config is accepted as it is."""

from pathlib import Path

import pytest

from topd_ray.cli import main
from topd_ray.config.load import load_config

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_dry_run(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", str(path), "--dry-run"]) == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    assert load_config(resolved) == load_config(path)


def test_run_names_are_the_files() -> None:
    names = {path.stem: load_config(path).run.name for path in JOBS}
    assert set(names) == {"debug", "demo", "one-node", "qwen3-4b", "several-nodes", "worded"}
    assert all(name in (stem, f"{stem}-topd") for stem, name in names.items())


def test_the_papers_numbers() -> None:
    config = load_config(JOBS[0].parent / "qwen3-4b.yaml")
    rollout, learner, near_future = config.rollout, config.learner, config.near_future
    assert (config.batch_size, rollout.samples_per_prompt) == (4, 4)
    assert (config.data.max_prompt_tokens, rollout.max_new_tokens) == (800, 8000)
    assert (rollout.temperature, rollout.top_p, config.objective.divergence) == (1.0, 1.0, "reverse")
    assert (learner.learning_rate, learner.warmup_fraction, learner.gradient_clipping) == (2e-6, 0.05, 1.0)
    assert (near_future.window, near_future.candidate_fraction) == (50, 0.0225)
    assert rollout.num_workers + config.teacher.num_workers + learner.num_ranks == 4, "GPUs"
