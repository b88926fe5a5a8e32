"""Grading of mathematics answers by math-verify, in a process of its own.

math-verify bounds its time with SIGALRM, which works only in the main thread of a process, and which cannot stop one
long operation on integers. So it runs in a child: that one ends itself when an answer takes too long, whatever it is
doing, and it ends with its parent, whose end closes the pipe.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path

from topd_ray.errors import ConfigError

_CHILD = Path(__file__).with_name("math_child.py")
_LAST_WORDS_SECONDS = 5.0
"""Time for a child that failed to end with a status of its own."""


class MathGrader:
    """Callable (response, answer) -> bool; several threads may call it. What cannot be parsed in time is wrong.

    A call raises ConfigError if the child cannot start: math-verify is missing or does not import.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def __call__(self, response: str, answer: str) -> bool:
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self.close()
                self._child = _start_child()
                self._end = weakref.finalize(self, _end_child, self._child)
            return self._ask(self._child, json.dumps([response, answer]))

    def close(self) -> None:
        """End the child; a later call starts another."""
        if self._child is not None:
            self._end()
            self._child = None

    def _ask(self, child: subprocess.Popen[str], question: str) -> bool:
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(question + "\n")
            child.stdin.flush()
            reply = child.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            self.close()
        return reply.strip() == "right"


def _start_child() -> subprocess.Popen[str]:
    """A child that has said it is ready. Raises ConfigError, with the last line it wrote, for one that has not."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        child = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
        )
        assert child.stdout is not None
        if child.stdout.readline().strip() == "ready":
            return child
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_LAST_WORDS_SECONDS)
        _end_child(child)
        complaints.seek(0)
        lines = complaints.read().split("\n")
    reason = next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {child.returncode}")
    raise ConfigError(
        f"evaluation.grader=math: the process that grades with math-verify does not start ({reason}); right would be "
        f"an environment whose {sys.executable} can import math_verify"
    )


def _end_child(child: subprocess.Popen[str]) -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    child.wait()
