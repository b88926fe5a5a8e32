"""Paths and text files that a config is, or names."""

import os
from pathlib import Path

from topd_ray.errors import ConfigError


def expanded(path: str) -> str:
    """`path` with a leading ~ or ~user as that user's home folder; as it is where there is no such user."""
    try:
        return os.path.expanduser(path)
    except ValueError:  # of a name with a null byte
        return path


def read_text(path: Path) -> str:
    """The UTF-8 text of `path`. Raises ConfigError where there is no such file, or no such text in it."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: found no such file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: found bytes that are not UTF-8 text at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
