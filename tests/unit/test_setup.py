"""What `make`'s set-up says when something is missing, and how it judges what is installed. Nothing is fetched here."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = """
awk bash cat cut df dirname du env flock g++ grep head mkdir mktemp readlink rm sed sha256sum sleep stat tail
timeout uname wc
"""
PYTHON = f'#!/bin/sh\nexec {sys._base_executable} "$@"\n'  # type: ignore[attr-defined]

SetUp = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH with what every Linux has, and no Python."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS.split():
        found = shutil.which(name)
        assert found, f"{name} is missing on this machine"
        (folder / name).symlink_to(found)
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What of a clone the set-up reads."""
    folder = tmp_path / "a clone"
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def set_up(tools: Path, checkout: Path) -> SetUp:
    def run(*, script: str = "bash requirements/setup.sh", **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(tools), "HOME": str(checkout), "PIP_CONFIG_FILE": "/dev/null", **variables}
        return subprocess.run(
            ["bash", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True, timeout=120
        )

    return run


def put(folder: Path, name: str, text: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def stopped(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    assert "set-up stopped: " in done.stderr
    return done.stderr


def test_no_python(set_up: SetUp) -> None:
    message = stopped(set_up())
    assert "Python 3.11 or 3.12 with the venv module is needed" in message
    assert "No Python was found on PATH" in message


def test_only_an_old_python(set_up: SetUp, tools: Path) -> None:
    put(tools, "python3", "#!/bin/sh\necho 3.9.2\n")
    message = stopped(set_up())
    assert "python3 is 3.9.2" in message
    assert "apt-get install python3.11-venv" in message


def test_python_without_venv(set_up: SetUp, tools: Path) -> None:
    put(tools, "python3.11", '#!/bin/sh\ncase "$*" in *platform*) echo 3.11.2;; *) exit 1;; esac\n')
    assert "python3.11 lacks the venv" in stopped(set_up())


def test_a_python_that_does_not_start_is_passed_over(set_up: SetUp, tools: Path) -> None:
    put(tools, "python3.11", "#!/bin/sh\nexit 127\n")
    put(tools, "python3.12", PYTHON)
    put(tools, "df", "#!/bin/sh\necho Free\necho disk 9 9 3 99% /\n")
    assert "too little disk" in stopped(set_up())


def test_unknown_device(set_up: SetUp) -> None:
    assert "DEVICE=tpu is unknown" in stopped(set_up(DEVICE="tpu"))


def test_another_system(set_up: SetUp, tools: Path) -> None:
    put(tools, "uname", "#!/bin/sh\n[ $1 = -s ] && echo Darwin || echo arm64\n")
    assert "this is Darwin on arm64" in stopped(set_up())


@pytest.mark.parametrize(("device", "least"), [("cpu", 3000), ("gpu", 10_000)])
def test_too_little_disk(set_up: SetUp, tools: Path, device: str, least: int) -> None:
    put(tools, "python3", PYTHON)
    put(tools, "df", "#!/bin/sh\necho Free\necho disk 9 9 2999 99% /\n")
    message = stopped(set_up(DEVICE=device))
    assert "has 2999 MiB free" in message
    assert int(message.partition("need about ")[2].split()[0]) > least


def test_no_libnuma(set_up: SetUp, tools: Path) -> None:
    put(tools, "python3", PYTHON.replace("exec", 'case "$*" in *libnuma*) exit 1;; esac\nexec'))
    assert "apt-get install libnuma1" in stopped(set_up(DEVICE="cpu"))


def test_no_compiler(set_up: SetUp, tools: Path) -> None:
    put(tools, "python3", PYTHON)
    (tools / "g++").unlink()
    assert "apt-get install g++" in stopped(set_up(DEVICE="cpu"))


def test_no_python_headers(set_up: SetUp, tools: Path) -> None:
    put(tools, "python3", PYTHON.replace("exec", 'case "$*" in *Python.h*) exit 1;; esac\nexec'))
    assert f"apt-get install python3.{sys.version_info.minor}-dev" in stopped(set_up(DEVICE="cpu"))


def test_a_gpu_is_noticed(set_up: SetUp, tools: Path) -> None:
    put(tools, "python3", PYTHON)
    put(tools, "nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    put(tools, "df", "#!/bin/sh\necho Free\necho disk 9 9 3 99% /\n")
    done = set_up()
    assert "gpu packages (nvidia-smi lists a GPU)" in done.stdout
    assert "the gpu packages need" in stopped(done)


def test_no_network_and_a_broken_venv(set_up: SetUp, tools: Path, checkout: Path) -> None:
    put(tools, "python3", PYTHON)
    (checkout / ".venv" / "bin").mkdir(parents=True)
    put(checkout / ".venv" / "bin", "python", "#!/bin/sh\nexit 1\n")
    done = set_up(DEVICE="cpu", PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert ".venv is not a working one" in done.stdout
    message = stopped(done)
    assert "the package index cannot be reached" in message
    assert "127.0.0.1" in (checkout / "build" / "setup.log").read_text()
    assert not (checkout / ".venv" / "topd-ready").exists()


@pytest.mark.parametrize(
    ("said", "explained"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "the package index lacks torch==2.13.0+cpu"),
        (
            "WARNING: Retrying after NewConnectionError\nERROR: No matching distribution found for six",
            "cannot be reached",
        ),
        ("SSLError(CERTIFICATE_VERIFY_FAILED)\nERROR: No matching distribution found for six", "is not trusted"),
        ("ERROR: something new", "ERROR: something new"),
    ],
)
def test_what_pip_says_is_explained(set_up: SetUp, checkout: Path, said: str, explained: str) -> None:
    (checkout / "build").mkdir()
    (checkout / "build" / "setup-step.log").write_text(said + "\n")
    done = set_up(script="source requirements/setup.sh && explain")
    assert explained in done.stdout
    assert done.stdout.count("\n") == 1


@pytest.fixture(scope="module")
def installed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("installed", ROOT / "requirements" / "installed.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with one file of four bytes, as pip leaves it."""
    record = tmp_path / "some_thing-1.2.dist-info"
    record.mkdir()
    (tmp_path / "thing.py").write_text("a=1\n")
    (record / "RECORD").write_text("thing.py,sha256=x,4\n__pycache__/thing.pyc,,\n")
    return record


def test_a_whole_package_passes(installed: ModuleType, package: Path) -> None:
    assert installed.fault(package, "1.2", True) is None


def test_another_version_is_named(installed: ModuleType, package: Path) -> None:
    assert installed.fault(package, "1.3", True) == "is version 1.2, not 1.3"


def test_a_lost_or_cut_file_is_found(installed: ModuleType, package: Path) -> None:
    (package.parent / "thing.py").write_text("a")
    assert installed.fault(package, "1.2", False) is None
    assert installed.fault(package, "1.2", True) == "lacks thing.py or a part of it"
    (package.parent / "thing.py").unlink()
    assert installed.fault(package, "1.2", True) == "lacks thing.py or a part of it"


def test_a_file_may_be_longer_than_listed_and_belong_to_another_package(installed: ModuleType, package: Path) -> None:
    (package.parent / "thing.py").write_text("a = 1\n")
    assert installed.fault(package, "1.2", True) is None
    (package.parent / "thing.py").write_text("a")
    other = package.parent / "other-1.dist-info"
    other.mkdir()
    (other / "RECORD").write_text("thing.py,sha256=y,1\nother.py,sha256=z,2\n")
    shared = installed.shared_files([package, other])
    assert shared == {"thing.py"}
    assert installed.fault(package, "1.2", True, shared) is None
    (package.parent / "thing.py").unlink()
    assert installed.fault(package, "1.2", True, shared) == "lacks thing.py or a part of it"


def test_an_interrupted_install_is_found(installed: ModuleType, package: Path) -> None:
    (package / "RECORD").unlink()
    assert installed.fault(package, "1.2", False) == "is half installed"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_locks_hold_every_direct_need(installed: ModuleType, device: str) -> None:
    folder = ROOT / "requirements"
    locked = dict(installed.pins(folder / f"{device}.txt"))
    num_lines = sum(line[:1] not in ("", "#") for line in (folder / f"{device}.txt").read_text().splitlines())
    assert len(locked) == num_lines
    for file in ("base.in", "test.in", f"{device}.in"):
        for line in (folder / file).read_text().splitlines():
            if line and not line.startswith("#"):
                name, _, version = line.replace("[default]", "").partition("==")
                name = installed.normal(name.split(">=")[0])
                assert locked[name] == (version or locked[name])
    assert ("torchvision" in locked) == (device == "gpu")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_tells_what_there_is() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "-C", str(ROOT)], env=environment, capture_output=True, text=True, check=True)
    for target in ("make demo", "make test", "make lock", "make clean"):
        assert target in done.stdout
