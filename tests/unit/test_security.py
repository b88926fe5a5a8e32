"""What docs/security.md says of the code and of the files we ship."""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from topd_ray.config.load import load_config
from topd_ray.config.schema import LearnerConfig, StudentConfig, TeacherConfig
from topd_ray.engines.student_model import load_student
from topd_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAIR = ROOT / "topd_ray" / "demo" / "pair" / "student"
SHIPPED = ("topd_ray", "cluster", "jobs", "requirements", "Dockerfile", "Makefile")
UNPICKLING = ("pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "torch.load")


def calls() -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of all calls in the package."""
    for path in sorted((ROOT / "topd_ray").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {one.arg: ast.unparse(one.value) for one in call.keywords}


def shipped_files() -> Iterator[tuple[Path, str]]:
    for name in SHIPPED:
        top = ROOT / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and path.suffix not in (".safetensors", ".pyc", ".nbc", ".nbi"):
                yield path, path.read_text()


def test_nothing_is_unpickled_but_tensors() -> None:
    found = [(name, keywords(call)) for name, call in calls() if name.endswith(UNPICKLING)]
    assert [name for name, given in found if given.get("weights_only") != "True"] == []


def test_code_from_models_is_off_unless_the_config_asks() -> None:
    assert StudentConfig(model="x").trust_remote_code is False
    assert TeacherConfig(model="x").trust_remote_code is False
    for path in sorted((ROOT / "jobs").glob("*.yaml")):
        config = load_config(path)
        assert not config.student.trust_remote_code and not config.teacher.trust_remote_code, path
    given = [value for _, call in calls() for key, value in keywords(call).items() if key == "trust_remote_code"]
    assert len(given) >= 4 and all(value.endswith(".trust_remote_code") for value in given)


def test_every_loader_of_weights_takes_safetensors_only() -> None:
    models = [keywords(call) for name, call in calls() if name == "AutoModelForCausalLM.from_pretrained"]
    assert len(models) >= 2 and all(given["use_safetensors"] == "True" for given in models)
    (engine,) = [keywords(call) for name, call in calls() if name == "EngineArgs"]
    assert engine["load_format"] == "'safetensors'"
    weights = [keywords(call)["allow_patterns"] for name, call in calls() if name == "snapshot_download"]
    assert weights and not any(".bin" in one or ".pt" in one for one in weights)


def test_pickled_weights_are_not_loaded_even_where_no_one_looked_at_the_folder(tmp_path: Path) -> None:
    """As a hub name might bring them; `topd run` refuses such a folder before that."""
    shutil.copy(PAIR / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    student = StudentConfig(model=str(tmp_path), dtype="float32")
    with pytest.raises(ConfigError, match="safetensors"):
        load_student(student, LearnerConfig(dtype="float32"), torch.device("cpu"))


def test_no_file_turns_tokens_off_or_opens_the_dashboard() -> None:
    for path, text in shipped_files():
        assert not re.search(r"""RAY_AUTH_MODE["']?\s*[=:,]\s*["']?(?!token)\w""", text), path
        assert "dashboard-host=0.0.0.0" not in text and "dashboard_host" not in text, path
        flat = re.sub(r"\\?\n\s*", " ", text)
        for start in re.findall(r"ray start [^;&]*--head[^;&]*", flat):
            assert "--dashboard-host=127.0.0.1" in start, path
        if "ray start" in text and path.parent.name == "cluster":
            assert "RAY_AUTH_MODE=token" in text or "authOptions: {mode: token}" in text, path


def test_rays_own_dashboard_is_not_started_by_a_run() -> None:
    (local,) = [keywords(call) for name, call in calls() if name == "ray.init" and "num_cpus" in keywords(call)]
    assert local["include_dashboard"] == "False"


def test_no_tracked_file_holds_a_secret() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    shapes = re.compile(
        r"\b(?:hf_[A-Za-z]{30,}|gh[pousr]_\w{36}|glpat-[\w-]{20}|AKIA[0-9A-Z]{16})\b|BEGIN \w* ?PRIVATE KEY"
    )
    own = {"topd_ray/redaction.py", "tests/unit/test_redaction.py", "tests/unit/test_security.py"}
    for name in set(listed.stdout.split()) - own:
        text = (ROOT / name).read_bytes().decode(errors="ignore") if (ROOT / name).is_file() else ""
        assert not shapes.search(text), name
