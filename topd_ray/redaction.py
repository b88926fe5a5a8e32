"""Takes secrets out of text that leaves the process: post-mortem bundles, and jobs, which a dashboard shows."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

REDACTED = "[redacted]"
SECRET_NAME = re.compile(
    r"TOKEN(?!S|IZER)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|_KEY$", re.IGNORECASE
)
"""In the name of a variable that holds one."""
_SHORTEST = 6
"""Characters of a value worth looking for; shorter ones would be found everywhere."""
_KEYS = r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API[_-]?KEY|ACCESS[_-]?KEY|PRIVATE[_-]?KEY"
_NO_SECRET = r"""(?!\[redacted\]|-?[\d.]+(?:e[-+]?\d+)?(?:[\s,;"'}\])]|$))"""
_VALUE = r"""(?:(?<=")[^"\n]+|(?<=')[^'\n]+|[^\s"'\\,;&}\])]{6,})"""
_PATTERNS = (
    # NAME=value, "name": "value", name: value; a number behind `token:` is a count
    (rf"""(\b[\w.-]*(?:{_KEYS}|(?-i:[A-Z0-9]_KEY))\\?["']?\s*[:=]\s*\\?["']?){_NO_SECRET}{_VALUE}""", r"\1"),
    (rf"(--[\w-]*(?:{_KEYS})\s+)(?!\[redacted\])[^\s-]\S+", r"\1"),
    (r"(\bauthorization\\?[\"']?\s*[:=]\s*\\?[\"']?)\w+\s+[^\s\"'\\]+", r"\1"),
    (r"(\bbearer\s+)[\w.~+/=-]{8,}", r"\1"),
    (r"(://)[^/\s:@\"']*:[^/\s@\"']+(?=@)", r"\1"),
    # shapes of well-known services: Hugging Face, GitHub, GitLab, OpenAI and the like, AWS, JSON web tokens
    (r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-)[\w-]{16,}", ""),
    (r"\bAKIA[0-9A-Z]{16}\b", ""),
    (r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}", ""),
    # a private key, also one whose head or end was cut off
    (r"(?s)(?:\A|-----BEGIN [A-Z ]*PRIVATE KEY-----)(?:(?!-----BEGIN).)*?-----END [A-Z ]*PRIVATE KEY-----", ""),
    (r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*", ""),
)
_COMPILED = tuple((re.compile(pattern, re.IGNORECASE), kept + REDACTED) for pattern, kept in _PATTERNS)


class Redactor:
    """Knows the secrets of this process's environment, and what others look like."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._known = sorted(_secrets(environment), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """`text` with REDACTED in place of every secret."""
        for secret in self._known:
            text = text.replace(secret, REDACTED)
        for pattern, replacement in _COMPILED:
            text = pattern.sub(replacement, text)
        return text


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    """Values of variables whose names say so, and the tokens of Ray and of the model hub in their files."""
    home = Path(environment.get("HOME", "/nonexistent"))
    hub = Path(environment.get("HF_HOME", home / ".cache" / "huggingface"))
    for name, value in environment.items():
        if SECRET_NAME.search(name) and not name.endswith("_PATH") and len(value.strip()) >= _SHORTEST:
            yield value.strip()
    for path in (environment.get("RAY_AUTH_TOKEN_PATH"), home / ".ray" / "auth_token", hub / "token"):
        try:
            secret = Path(path).read_text().strip() if path else ""
        except (OSError, UnicodeDecodeError):
            continue
        if len(secret) >= _SHORTEST:
            yield secret
