"""`topd submit`: a run as a Ray job, from any machine that reaches the cluster's dashboard."""

import asyncio
import os
import secrets
import shlex
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topd_ray.config import yaml12
from topd_ray.config.schema import TopdConfig
from topd_ray.config.text import read_text
from topd_ray.config.validate import shown
from topd_ray.errors import ConfigError, TopdError
from topd_ray.pipeline.plan import Say
from topd_ray.redaction import SECRET_NAME, Redactor

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
NOT_SENT = (".venv", ".git", "runs", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
"""Left out of the upload, besides what .gitignore names. Patterns as in .gitignore."""
STOP_SECONDS = "600"
"""How long `ray job stop` waits for the update in progress and the checkpoint before it kills; Ray's own is 3 s."""
POLL_SECONDS = 2.0
ASK_SECONDS = 30.0
"""How long one question to the dashboard may take."""
SILENT_SECONDS = 300.0
"""How long the dashboard may not say how a job is."""
QUIET_SECONDS = 300.0
"""After which a connection that brings no output is taken for dead and made anew."""
REST_SECONDS = 30.0
"""For the rest of the output, once the job has ended."""


def submit(
    path: Path,
    overrides: Sequence[str],
    config: TopdConfig,
    *,
    address: str | None,
    working_dir: Path,
    runtime_env: Path | None,
    job_id: str | None,
    follow: bool,
    say: Say,
) -> int:
    """Send `working_dir` to the cluster and run `topd run PATH OVERRIDES` there; return the run's own exit code.

    With `follow` its output is printed until it ends; without, 0 is returned once the cluster has the job. `config` is
    what path and overrides give. Raises ConfigError for a job that could not work, or a cluster that does not take it.
    """
    inside = path_inside(path, working_dir)
    if not Path(config.run.root).is_absolute():
        raise ConfigError(
            f"run.root: found {config.run.root}, which in a job would be inside Ray's temporary copy of the working "
            "directory; right would be an absolute path on a disk that all nodes share, say run.root=/shared/runs"
        )
    refuse_secrets(overrides)
    environment = job_environment(working_dir, runtime_env)
    client, address = connect(address)
    try:
        job = client.submit_job(
            entrypoint="exec " + shlex.join(["python", "-m", "topd_ray", "run", str(inside), *overrides]),
            submission_id=job_id or f"{config.run.name}-{secrets.token_hex(4)}",
            runtime_env=environment,
            metadata={"run": config.run.name},
        )
    except (RuntimeError, ValueError, OSError) as error:  # an upload that is too large, an id that is taken, ...
        raise ConfigError(f"the cluster at {address} does not take the job: {error}") from error
    say(f"job {job} at {address}; `ray job stop --address {address} {job}` stops it with a checkpoint")
    return _follow(client, job, address) if follow else 0


def path_inside(path: Path, working_dir: Path) -> Path:
    """`path` as the job will see it. Raises ConfigError where the job would not have it."""
    if not path.resolve().is_relative_to(working_dir.resolve()):
        raise ConfigError(
            f"{path} lies outside --working-dir {working_dir}, and the job gets nothing else; right would be a config "
            "in that folder, or another --working-dir"
        )
    inside = path.resolve().relative_to(working_dir.resolve())
    if any(part in NOT_SENT for part in inside.parts):
        raise ConfigError(f"{path} would not be sent to the cluster ({', '.join(NOT_SENT)} are not); copy it to jobs/")
    return inside


def refuse_secrets(overrides: Sequence[str]) -> None:
    """Raise ConfigError for a secret in an override: it would be part of the command that the dashboard shows."""
    redact = Redactor()
    for override in overrides:
        if redact(override) != override:
            raise ConfigError(
                f"{override.partition('=')[0]}: found what looks like a secret, which the dashboard would show; right "
                "would be to set it in the environment of the nodes (docs/clusters.md)"
            )


def job_environment(working_dir: Path, file: Path | None) -> dict[str, Any]:
    """Ray's runtime environment of the job: what `file` says, the working directory, and time to stop in.

    Raises ConfigError for secrets: Ray shows a job's runtime environment to everybody who may look at the cluster.
    """
    asked = {} if file is None else yaml12.parse(read_text(file), str(file))
    if not isinstance(asked, dict):
        raise ConfigError(f"{file}: found {shown(asked)}, right would be a mapping, say env_vars: {{NAME: value}}")
    variables = asked.get("env_vars") or {}
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        raise ConfigError(f"{file}: env_vars: found {shown(variables)}, right would be a mapping of text to text")
    if secret := sorted(name for name in variables if SECRET_NAME.search(name)):
        raise ConfigError(
            f"{file}: env_vars: found {', '.join(secret)}, which the dashboard and the logs would show; right would be "
            "to set it in the environment of the nodes (docs/clusters.md)"
        )
    if file is not None and Redactor()(text := read_text(file)) != text:
        raise ConfigError(
            f"{file}: found what looks like a secret (a token, or a password in an address), which the dashboard would "
            "show; right would be to set it in the environment of the nodes (docs/clusters.md)"
        )
    return {
        **asked,
        "working_dir": str(working_dir),
        "excludes": [*NOT_SENT, *(asked.get("excludes") or ())],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": STOP_SECONDS, **variables},
    }


def connect(address: str | None) -> tuple["JobSubmissionClient", str]:
    """A client of the dashboard at `address` (unset: the environment's RAY_API_SERVER_ADDRESS, or this machine's own).

    Sends a token unless RAY_AUTH_MODE says otherwise. Raises ConfigError if nobody answers, or the token is wrong.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    from topd_ray.actors.cluster import TOKEN_ADVICE

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    try:
        return JobSubmissionClient(address), address
    except AuthenticationError as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"the cluster at {address} does not take the token: {first}; {TOKEN_ADVICE}") from error
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray dashboard answers at {address}: {error}; right would be --address with that of the head node, "
            f"where it listens on the loopback: run this there, or first `ssh -L 8265:127.0.0.1:8265 HEAD`"
        ) from error


def _follow(client: "JobSubmissionClient", job: str, address: str) -> int:
    """Print the job's output until it ends; its exit code (128 + SIGTERM for one that was stopped)."""
    from ray.job_submission import JobStatus

    try:
        info = asyncio.run(_watch(client, job))
    except KeyboardInterrupt:
        print(f"\njob {job} goes on; to see it again: ray job logs --follow --address {address} {job}")
        return 128 + signal.SIGINT
    if info.status == JobStatus.STOPPED:
        return 128 + signal.SIGTERM
    if info.status == JobStatus.FAILED and info.driver_exit_code is None:
        raise TopdError(f"job {job} did not run: {info.message}")
    code = info.driver_exit_code or 0
    if code < 0:
        ended_by = signal.Signals(-code).name
        print(f"job {job}: the driver was ended by {ended_by}; the same command goes on from the last checkpoint")
    return 128 - code if code < 0 else code


async def _watch(client: "JobSubmissionClient", job: str) -> "JobDetails":
    """Print the job's output until the cluster says that it has ended; what it says then.

    The end of a log connection says nothing of the job. Raises TopdError where nobody has said for SILENT_SECONDS how
    the job is.
    """
    from ray.exceptions import AuthenticationError

    client._do_request = partial(client._do_request, timeout=ASK_SECONDS)  # Ray's own waits for ever
    log = _Log(client, job)
    answered_at = time.monotonic()
    while True:
        await asyncio.sleep(POLL_SECONDS)
        try:
            info = await asyncio.to_thread(client.get_job_info, job)
        except (RuntimeError, OSError, AuthenticationError) as error:
            if time.monotonic() > answered_at + SILENT_SECONDS:
                raise TopdError(
                    f"lost sight of job {job}, which may go on: {error}; ask `ray job status {job}`"
                ) from error
        else:
            answered_at = time.monotonic()
            if info.status.is_terminal():
                await log.end()
                return info
            log.go_on()


class _Log:
    """A job's output, printed as it comes. Each connection gets it from its start."""

    def __init__(self, client: "JobSubmissionClient", job: str) -> None:
        self._client = client
        self._job = job
        self._num_printed = 0
        self._has_stopped = False
        self._reading = asyncio.create_task(self._print())

    def go_on(self) -> None:
        """Connect again if need be."""
        if self._reading.done():
            if not self._has_stopped:
                print(f"job {self._job} goes on, but its output does not come any more: connecting again", flush=True)
            self._has_stopped = True
            self._reading = asyncio.create_task(self._print())

    async def end(self) -> None:
        """Print the rest of a job that has ended."""
        if await self._is_whole():
            return
        self._reading.cancel()
        self._reading = asyncio.create_task(self._print())
        if not await self._is_whole():
            print(f"the end of the output is missing: `ray job logs {self._job}`", flush=True)

    async def _is_whole(self) -> bool:
        """Whether all has come within REST_SECONDS."""
        await asyncio.wait([self._reading], timeout=REST_SECONDS)
        return self._reading.done() and self._reading.result()

    async def _print(self) -> bool:
        """Until the connection closes, or nothing has come for QUIET_SECONDS; whether it closed in order."""
        import aiohttp

        now = asyncio.get_running_loop().time
        num_read = 0
        try:
            async with asyncio.timeout(QUIET_SECONDS) as limit:
                async for text in self._client.tail_job_logs(self._job):
                    limit.reschedule(now() + QUIET_SECONDS)
                    print(text[max(0, self._num_printed - num_read) :], end="", flush=True)
                    num_read += len(text)
                    self._num_printed = max(self._num_printed, num_read)
        except (aiohttp.ClientError, RuntimeError, OSError):  # TimeoutError is one
            return False
        return True
