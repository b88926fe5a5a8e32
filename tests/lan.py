"""Several hosts on one machine: Linux namespaces with addresses of their own, joined by a bridge nobody else sees.

Each host has its own network, processes, /dev/shm, and the folders it is given as local disks; every other file is
shared, as on a cluster with a network file system. The bridge lives in a namespace of its own: the machine's own
network stays as it is. A host's processes all end with its first one, and that one with the test, however it ends.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

NETWORK = "10.77.0"
Done = subprocess.CompletedProcess[str]

SETPRIV = ("setpriv", "--pdeathsig", "KILL", "--")
START_SECONDS = 30.0


def missing() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Host("probe", local_disks=()) as one:
            one.check("ip", "link", "add", "probe", "type", "bridge")
    except (OSError, subprocess.SubprocessError, TimeoutError) as error:
        return f"no network namespaces here: {error} {getattr(error, 'stderr', '')}".strip()
    return None


class Host:
    """One host. Its first process sleeps; commands join its namespaces."""

    def __init__(self, name: str, *, local_disks: Sequence[Path], address: str = "") -> None:
        self.name = name
        self.address = address
        self._local_disks = local_disks

    def __enter__(self) -> "Host":
        flags = ("--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
        self._keeper = subprocess.Popen([*SETPRIV, "unshare", *flags, "sleep", "infinity"], stderr=subprocess.DEVNULL)
        self.pid = _first_child(self._keeper)
        for folder in ("/dev/shm", *self._local_disks):
            self.check("mount", "-t", "tmpfs", "tmpfs", str(folder))
        self.check("ip", "link", "set", "lo", "up")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        """Pull the plug: every process of the host ends at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        self._keeper.wait()

    def command(self, *arguments: str, cwd: Path = Path("/")) -> list[str]:
        """The command line that runs `arguments` on this host."""
        enter = ("nsenter", "-t", str(self.pid), "--net", "--mount", "--pid", f"--wdns={cwd}", "--")
        return [*SETPRIV, *enter, *arguments]

    def check(self, *arguments: str) -> None:
        subprocess.run(self.command(*arguments), check=True, capture_output=True, text=True)

    def run(self, *arguments: str, env: Mapping[str, str], cwd: Path, timeout: float) -> Done:
        """Run to the end, whatever the exit code; output and errors together."""
        return subprocess.run(
            self.command(*arguments, cwd=cwd),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=dict(env),
            timeout=timeout,
        )


@contextlib.contextmanager
def lan(names: Sequence[str], *, local_disks: Sequence[Path]) -> Iterator[dict[str, Host]]:
    """Hosts by name, at 10.77.0.1 and up, who reach each other and nothing else. Raises OSError if `missing()`."""
    if why_not := missing():
        raise OSError(why_not)
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(Host("switch", local_disks=()))
        switch.check("ip", "link", "add", "lan", "type", "bridge")
        switch.check("ip", "link", "set", "lan", "up")
        hosts = {}
        for number, name in enumerate(names, start=1):
            host = Host(name, local_disks=local_disks, address=f"{NETWORK}.{number}")
            stack.enter_context(host)
            plug(switch, host, number)
            hosts[name] = host
        yield hosts


def plug(switch: Host, host: Host, number: int) -> None:
    """A cable from `host` to the bridge."""
    port = f"port{number}"
    enter = ["nsenter", "-t", str(switch.pid), "--net", "ip", "link", "add", port]  # the host's pid as seen from here
    subprocess.run([*enter, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid)], check=True)
    switch.check("ip", "link", "set", port, "master", "lan", "up")
    host.check("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
    host.check("ip", "link", "set", "eth0", "up")


def _first_child(keeper: subprocess.Popen[bytes]) -> int:
    """Pid of the `sleep` that holds the namespaces, once unshare has set them up."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if keeper.poll() is not None:
            raise OSError(f"unshare ended with {keeper.returncode}")
        for child in psutil.Process(keeper.pid).children():
            if child.name() == "sleep":
                return int(child.pid)
        time.sleep(0.01)
    raise TimeoutError("unshare made no namespaces")
