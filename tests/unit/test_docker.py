"""What `make docker` and `make docker-demo` hand to Docker and say when something is missing, and what the Dockerfile
and its .dockerignore promise. No engine is needed: cluster/image.sh meets a `docker` that notes its arguments."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from topd_ray import cli

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "awk bash cat cut df dirname git grep id mkdir realpath sed tail tee timeout"
DOCKER = """#!/bin/bash
printf '%s\\n' "$*" >> "$NOTES"
case "$1 $2" in
    "version --format") [[ -z ${VERSION_FAILS:-} ]] || { echo "$VERSION_FAILS" >&2; exit 1; } ;;
    "info --format") echo / ;;
    "image inspect") exit "${NO_IMAGE:-0}" ;;
    "build "*) echo "${BUILD_SAYS:-}"; [[ -z ${BUILD_SAYS:-} ]] ;;
    "run "*) [[ $* != *"--entrypoint test"* || -z ${PROBE:-} ]] || { echo -n "${PROBE#0}" >&2; exit 125; } ;;
esac
"""

Image = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS.split():
        found = shutil.which(name)
        assert found, f"{name} is missing on this machine"
        (folder / name).symlink_to(found)
    put(folder, "docker", DOCKER)
    return folder


@pytest.fixture
def image(tools: Path, tmp_path: Path) -> Image:
    script = tmp_path / "a clone" / "cluster" / "image.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "cluster" / "image.sh", script)

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(tools), "NOTES": str(tmp_path / "notes"), "DEVICE": "cpu", **variables}
        command = ["bash", str(script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return run


def put(folder: Path, name: str, text: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def stopped(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("docker stopped: ")
    return done.stderr


def asked(tmp_path: Path, command: str) -> str:
    """The last command line of this kind that docker was given."""
    return [line for line in (tmp_path / "notes").read_text().splitlines() if line.startswith(command)][-1]


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["dmeo"], {}, "dmeo is no task"),
        (["build"], {"DEVICE": "tpu"}, "DEVICE=tpu is unknown"),
        (["build"], {"VERSION_FAILS": "Got permission denied while trying to connect"}, "may not use Docker"),
        (["build"], {"VERSION_FAILS": "Cannot connect to the Docker daemon"}, "no Docker daemon answers: Cannot"),
        (["demo", "topd"], {"NO_IMAGE": "1"}, "there is no image topd-ray:cpu"),
        (["demo", "topd"], {"RUNS": "/dev/null/runs"}, "cannot write to /dev/null/runs"),
        (["demo", "topd"], {"PROBE": "0"}, "from inside a container"),
        (
            ["demo", "topd"],
            {"DEVICE": "gpu", "PROBE": 'docker: could not select device driver "" with [[gpu]].\ntime=now'},
            "Docker cannot hand GPUs on: docker: could not select",
        ),
        (["demo", "topd"], {"PROBE": "docker: shim died"}, "no container starts: docker: shim died"),
        (["build"], {"BUILD_SAYS": "#7 9.1 write /x: no space left on device"}, "the disk is full"),
        (["build"], {"BUILD_SAYS": "#9 1.2 set-up stopped: the package index lacks six."}, "index lacks six."),
        (["build"], {"BUILD_SAYS": "ERROR: the buildx component is missing or broken"}, "docker has no BuildKit"),
        (["build"], {"BUILD_SAYS": "ERROR: failed to do request: dial tcp"}, "cannot be fetched: ERROR: failed to do"),
    ],
)
def test_what_is_missing_is_named(image: Image, arguments: list[str], variables: dict[str, str], said: str) -> None:
    first = stopped(image(*arguments, **variables)).splitlines()[0]
    assert said in first


def test_no_docker(image: Image, tools: Path) -> None:
    (tools / "docker").unlink()
    assert "docker is not installed" in stopped(image("build"))


@pytest.mark.parametrize(("device", "least"), [("cpu", 6000), ("gpu", 20_000)])
def test_too_little_disk(image: Image, tools: Path, device: str, least: int) -> None:
    put(tools, "df", "#!/bin/sh\necho Free\necho disk 9 9 5999 99% /\n")
    message = stopped(image("build", DEVICE=device, NO_IMAGE="1"))
    assert "has 5999 MiB free" in message
    assert int(message.partition("needs about ")[2].split()[0]) > least
    assert image("build", DEVICE=device, NO_IMAGE="0").returncode == 0


def test_the_build_gets_the_base_and_the_secrets(image: Image, tmp_path: Path) -> None:
    config, certificates = tmp_path / "pip.conf", tmp_path / "ca.pem"
    config.write_text("[global]\nindex-url = https://user:word@packages.example/simple\n")
    certificates.write_text("-----BEGIN CERTIFICATE-----\n")
    done = image(
        "build", "--pull", DEVICE="gpu", BASE="other:1", PIP_CONFIG_FILE=str(config), PIP_CERT=str(certificates)
    )
    assert done.returncode == 0, done.stderr
    line = asked(tmp_path, "build ")
    assert "--build-arg DEVICE=gpu" in line
    assert "--build-arg GPU_BASE=other:1" in line
    assert f"--secret id=pip.conf,src={config}" in line
    assert f"--secret id=ca,src={certificates}" in line
    assert line.endswith("--tag topd-ray:gpu --pull .")
    assert "user:word" not in line


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_demo_runs_as_the_caller_without_a_network(image: Image, tmp_path: Path, device: str) -> None:
    runs = tmp_path / "new" / "runs"
    done = image("demo", "opd", "run.steps=3", DEVICE=device, RUNS=str(runs))
    assert done.returncode == 0, done.stderr
    options, _, command = asked(tmp_path, "run ").partition(f" topd-ray:{device} ")
    assert command == "run jobs/demo.yaml run.name=docker-opd objective.method=opd run.steps=3"
    assert f"--user {os.getuid()}:{os.getgid()} " in options
    assert "--network none" in options
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2048
    shm = re.search(r"--shm-size (\d+)k", options)
    assert shm and abs(int(shm[1]) - half) <= 1
    assert f"--volume {runs}:{workdir()}/runs" in options
    assert ("--gpus all" in options) == (device == "gpu")
    assert runs.is_dir()


def instructions() -> list[tuple[str, str]]:
    """(NAME, rest) of every instruction of the Dockerfile."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(name, re.sub(r"\s+", " ", rest)) for name, rest in lines]


def workdir() -> str:
    return [rest for name, rest in instructions() if name == "WORKDIR"][-1]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of every stage, its FROM first."""
    found: list[list[tuple[str, str]]] = [[]]
    for instruction in instructions():
        if instruction[0] == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found[1:]


def copied(stage: list[tuple[str, str]]) -> list[str]:
    """What the stage's COPY instructions read from the build's folder."""
    copies = [rest.split() for name, rest in stage if name == "COPY" and "--from=" not in rest]
    return [word for words in copies for word in words[:-1] if not word.startswith("--")]


def test_every_base_is_pinned_by_its_digest() -> None:
    arguments = dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG" and "=" in rest)
    named = {"base-cpu", "base-gpu"}
    for stage in stages():
        image, *alias = stage[0][1].split(" AS ")
        base = re.sub(r"\$\{(\w+)}", lambda match: arguments[match[1]], image)
        assert base in named or re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", base), base
        named |= set(alias)


def test_packages_come_before_code_and_only_from_the_lock() -> None:
    packages = next(stage for stage in stages() if stage[0][1].endswith("AS packages"))
    assert copied(packages) == [f"requirements/{name}" for name in ("setup.sh", "installed.py", "${DEVICE}.txt")]
    for stage in stages():
        order = [name for name, rest in stage if name == "COPY"]
        installs = [rest for name, rest in stage if name == "RUN" and re.search(r"pip install|setup\.sh", rest)]
        assert all("setup.sh packages" in rest or "--no-deps --no-index" in rest for rest in installs)
        assert not any(name == "ADD" for name, rest in stage), order
    final = [rest for name, rest in stages()[-1] if name == "COPY"]
    assert "--from=packages" in final[0] and final[1].endswith(" . .")


def test_the_set_up_of_the_image_needs_nothing_else(tools: Path, tmp_path: Path) -> None:
    """With the files of the package layer alone the set-up gets as far as the disk, which is too small here."""
    python = shutil.which("python3.11") or shutil.which("python3.12")
    if python is None:
        pytest.skip("no Python 3.11 or 3.12 on PATH")
    layer = tmp_path / "layer"
    packages = next(stage for stage in stages() if stage[0][1].endswith("AS packages"))
    for name in copied(packages):
        file = name.replace("${DEVICE}", "cpu")
        (layer / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, layer / file)
    put(tools, "df", "#!/bin/sh\necho Free\necho disk 9 9 3 99% /\n")
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "DEVICE": "cpu", "PYTHON": python}
    command = ["bash", "requirements/setup.sh", "packages"]
    done = subprocess.run(command, cwd=layer, env=environment, capture_output=True, text=True, timeout=60)
    assert "too little disk" in done.stderr, done.stdout + done.stderr


def test_the_image_runs_topd_as_nobody_in_particular() -> None:
    final = stages()[-1]
    last = dict(final)
    user, _, group = last["USER"].partition(":")
    assert int(user) > 0 and int(group) > 0  # numbers: Kubernetes' runAsNonRoot judges no names
    assert [name for name, _ in final].index("USER") > max(i for i, (name, _) in enumerate(final) if name == "RUN")
    entrypoint, default = json.loads(last["ENTRYPOINT"]), json.loads(last["CMD"])
    assert entrypoint[-1] == "topd"
    health = json.loads(last["HEALTHCHECK"].partition(" CMD ")[2])
    assert health[0] == "topd"
    for arguments in (default, health[1:]):
        assert callable(cli._arguments(arguments).command)


def reaches_the_build(path: str) -> bool:
    """Docker's rule: the last pattern that fits the path or a folder above it decides."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    reaches = True
    for line in (ROOT / ".dockerignore").read_text().split("\n"):
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        bare = pattern.removeprefix("!")
        if bare.startswith("**/"):
            fits = any(fnmatch.fnmatch(part, bare[3:]) for part in parts)
        else:
            same_depth = [prefix for prefix in prefixes if prefix.count("/") == bare.count("/")]
            fits = any(fnmatch.fnmatch(prefix, bare) for prefix in same_depth)
        if fits:
            reaches = pattern.startswith("!")
    return reaches


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        "runs/demo-topd/checkpoints/x",
        "build/setup.log",
        ".env",
        "pip.conf",
        "id_rsa",
        "topd_ray/.env",
        "topd_ray/data/__pycache__/rows.cpython-311.pyc",
        "tests/unit/test_docker.py",
    ],
)
def test_what_must_stay_outside_the_build(path: str) -> None:
    assert not reaches_the_build(path)


def test_what_the_image_needs_reaches_the_build() -> None:
    needed = [path for folder in ("topd_ray", "jobs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = [str(path.relative_to(ROOT)) for path in needed if "__pycache__" not in path.parts]
    files = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE", "requirements/base.in"]
    packages = next(stage for stage in stages() if stage[0][1].endswith("AS packages"))
    files += [name.replace("${DEVICE}", device) for name in copied(packages) for device in ("cpu", "gpu")]
    for name in [*names, *files]:
        assert (ROOT / name).is_file(), name
        assert reaches_the_build(name), name
