"""Names each package of a lock file that this Python lacks: `python installed.py LOCK [--files] [--remove]`.

Prints `name reason` per package and exits 1 if there is any. Needs nothing but the standard library, so that it can
judge a half-done environment. With `--files` every file of every package is looked for, otherwise only each package's
list of files, which pip writes last. With `--remove` the records of broken packages are deleted, so that pip installs
them anew.
"""

import argparse
import csv
import re
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from sysconfig import get_path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("lock", type=Path)
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--remove", action="store_true")
    args = parser.parse_args()
    site = Path(get_path("purelib"))
    records = {normal(folder.name.split("-")[0]): folder for folder in site.glob("*.dist-info")}
    shared = shared_files(records.values()) if args.files else frozenset()
    num_wrong = 0
    for name, version in pins(args.lock):
        folder = records.get(name)
        reason = "is missing" if folder is None else fault(folder, version, args.files, shared)
        if reason is None:
            continue
        num_wrong += 1
        print(f"{name} {reason}")
        if args.remove and folder is not None and not reason.startswith("is version"):
            shutil.rmtree(folder)
    return int(num_wrong > 0)


def pins(lock: Path) -> Iterator[tuple[str, str]]:
    """(normal name, version) of each `name==version` line; the locks hold no other kind."""
    for line in lock.read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line):
            yield normal(match[1]), match[2]


def fault(folder: Path, version: str, look_at_files: bool, shared: Collection[str] = ()) -> str | None:
    """What is wrong with the package whose record is `folder`, or None. `shared`: see `shared_files`."""
    found = folder.name.removesuffix(".dist-info").partition("-")[2]
    if found != version:
        return f"is version {found}, not {version}"
    if not (folder / "RECORD").is_file():
        return "is half installed"
    return missing_file(folder, shared) if look_at_files else None


def missing_file(folder: Path, shared: Collection[str]) -> str | None:
    """The first file of the package's list that is not there, or shorter than listed; bytecode does not count.

    Longer ones are whole: there are wheels whose own list has the sizes of an earlier build.
    """
    for path, size in listed(folder):
        file = folder.parent / path
        if not file.is_file() or (path not in shared and file.stat().st_size < size):
            return f"lacks {path} or a part of it"
    return None


def shared_files(folders: Iterable[Path]) -> frozenset[str]:
    """Files that more than one package lists: one is there, of the package that was installed last."""
    counts = Counter(path for folder in folders if (folder / "RECORD").is_file() for path, _ in listed(folder))
    return frozenset(path for path, count in counts.items() if count > 1)


def listed(folder: Path) -> Iterator[tuple[str, int]]:
    """(path, size) of each file of a package, 0 where the list does not say."""
    with (folder / "RECORD").open(newline="") as record:
        for path, _, size in csv.reader(record):
            if not path.endswith(".pyc"):
                yield path, int(size or 0)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
