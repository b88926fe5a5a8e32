"""A line of the doctor's report. Standard library only, as the machine's report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "missing", "wrong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line: what is `missing` or `wrong` has to be mended, a `note` may have to be."""

    subject: str
    found: str
    state: State = "ok"
    mend: str = ""
    """What to do about it: a command, or a short sentence."""


def show(findings: Sequence[Finding]) -> int:
    """Print the report; return 1 if anything is missing or wrong, else 0."""
    width = max([14, *(len(finding.subject) for finding in findings)]) + 1
    for finding in findings:
        print(f"{finding.state:<9}{finding.subject:<{width}}{finding.found}")
        if finding.mend:
            print(f"{'':<9}{'':<{width}}-> {finding.mend}")
    counts = {state: sum(finding.state == state for finding in findings) for state in ("missing", "wrong", "note")}
    print(
        f"\n{len(findings)} looked at, {counts['missing']} missing, {counts['wrong']} wrong, {counts['note']} to note"
    )
    return int(counts["missing"] + counts["wrong"] > 0)
