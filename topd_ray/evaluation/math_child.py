"""The child process of MathGrader: writes `ready`, then reads [response, answer] and writes `right` or `wrong` a line.

Until it is ready its standard error goes to the parent, which shows it if the child dies.
"""

import faulthandler
import json
import os
import re
import signal
import sys

from math_verify import parse, verify

_PATIENT_SECONDS = 3
"""Time for each of three stages: parsing the answer, parsing the response, comparing."""
_LAST_SECONDS = 12
"""After this the process ends, even within one long operation on integers."""
_MARKED = re.compile(r"(?<!\\)(?:\$|\\\[|\\boxed)")
"""Marks of mathematics, and not \\$, which is money, or \\\\[4pt], which ends a row."""


def is_right(response: str, answer: str) -> bool:
    """Whether math-verify finds the value of `answer` in `response`; False for what it cannot parse in time."""
    if not answer.strip():
        return False
    expected = answer if _MARKED.search(answer) else f"${answer}$"
    return bool(
        verify(
            parse(expected, parsing_timeout=_PATIENT_SECONDS),
            parse(response, parsing_timeout=_PATIENT_SECONDS),
            timeout_seconds=_PATIENT_SECONDS,
        )
    )


def main() -> None:
    """Answer until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr
    print("ready", file=replies, flush=True)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    for line in sys.stdin:
        faulthandler.dump_traceback_later(_LAST_SECONDS, exit=True)
        response, answer = json.loads(line)
        right = is_right(response, answer)
        faulthandler.cancel_dump_traceback_later()
        print("right" if right else "wrong", file=replies, flush=True)


if __name__ == "__main__":
    main()
