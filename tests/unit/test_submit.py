"""What `topd submit` refuses before it asks a cluster, what it sends, and how it follows a job."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from topd_ray.cli import main
from topd_ray.errors import ConfigError, TopdError
from topd_ray.pipeline import submit
from topd_ray.pipeline.submit import _follow, connect, job_environment, path_inside

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

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


class Dashboard:
    """A stand-in of Ray's: a job of three lines of output, whose first connection stops in some way after one."""

    def __init__(self) -> None:
        self.breaks = "clean"
        self.is_last = False
        """the job has ended when its first connection stops"""
        self.bad_answers = 0
        """of the questions how the job is"""
        self.hangs = False
        self._is_over = False
        self._num_connections = 0
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> "Dashboard":
        self._thread.start()
        assert self._is_up.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/jobs/j", self._job)
        app.router.add_get("/api/jobs/j/logs/tail", self._tail)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._is_up.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _version(self, _: web.Request) -> web.Response:
        said = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}
        return web.json_response(said)

    async def _job(self, _: web.Request) -> web.Response:
        if self.hangs:
            await self._stop.wait()
        if self.bad_answers:
            self.bad_answers -= 1
            return web.Response(status=502)
        end = {"status": "FAILED", "driver_exit_code": 3} if self._is_over else {"status": "RUNNING"}
        return web.json_response({"type": "SUBMISSION", "submission_id": "j", "entrypoint": "x", "message": "", **end})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        self._num_connections += 1
        is_first = self._num_connections == 1
        if is_first and self.breaks == "refused":
            return web.Response(status=502)
        connection = web.WebSocketResponse()
        await connection.prepare(request)
        await connection.send_str("one\n")
        if is_first:
            await asyncio.sleep(0.1)
            self._is_over = self.is_last
            if self.breaks == "silent":
                await self._stop.wait()
            if self.breaks == "abrupt":
                assert request.transport is not None
                request.transport.abort()
            return connection
        await connection.send_str("two\n")
        self._is_over = True
        await connection.send_str("three\n")
        return connection


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name, seconds in {"POLL": 0.2, "QUIET": 2.0, "REST": 4.0}.items():
        monkeypatch.setattr(submit, f"{name}_SECONDS", seconds)
    with Dashboard() as one:
        yield one


def client_of(dashboard: Dashboard) -> tuple["JobSubmissionClient", str, str]:
    client, address = connect(dashboard.address)
    return client, "j", address


@pytest.mark.parametrize("breaks", ["clean", "abrupt", "refused", "silent"])
def test_a_log_that_stops_while_the_job_goes_on(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str], breaks: str
) -> None:
    dashboard.breaks, dashboard.bad_answers = breaks, 2
    assert _follow(*client_of(dashboard)) == 3
    *lines, two, three = capsys.readouterr().out.splitlines()
    notice = "job j goes on, but its output does not come any more: connecting again"
    assert lines == ([notice, "one"] if breaks == "refused" else ["one", notice])
    assert (two, three) == ("two", "three")


@pytest.mark.parametrize("breaks", ["abrupt", "silent"])
def test_a_log_that_stops_as_the_job_ends(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str], breaks: str
) -> None:
    dashboard.breaks, dashboard.is_last = breaks, True
    assert _follow(*client_of(dashboard)) == 3
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


@pytest.mark.parametrize("hangs", [False, True])
def test_nobody_says_how_the_job_is(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    monkeypatch.setattr(submit, "ASK_SECONDS", 0.5)
    monkeypatch.setattr(submit, "SILENT_SECONDS", 1.0)
    followed = client_of(dashboard)
    dashboard.bad_answers, dashboard.hangs = 10**6, hangs
    with pytest.raises(TopdError, match=r"lost sight of job j, which may go on: .*ask `ray job status j`"):
        _follow(*followed)
