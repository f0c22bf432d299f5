"""What was found of each check, and how it is shown. No Ray.

A check that could not be done is never one that passed: it has a status and a reason of its own.
"""

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from revision_ray.logs import without_secrets

Status = Literal["ok", "failed", "not checked"]
CLUSTER = "cluster"
_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check in one place."""

    check: str
    """Of which there are: cluster, authentication, nodes, versions, clock, disk, storage, gpus, models."""
    where: str
    """A node's id, or `cluster`."""
    kind: str = ""
    """The node's kind, as the autoscaler calls it."""
    status: Status
    found: str
    """What was found, or why nothing could be."""
    remedy: str = ""
    """What to do; of every finding that is not ok."""

    def __post_init__(self) -> None:
        assert self.remedy or self.status == "ok", self
        for name in ("found", "remedy"):
            object.__setattr__(self, name, without_secrets(getattr(self, name)))


def table(findings: Sequence[Finding]) -> str:
    """The findings for a person: equal ones of several nodes as one, with the remedy below what failed."""
    together: dict[tuple[str, str, str, str], list[Finding]] = {}
    for each in findings:
        together.setdefault((each.check, each.status, each.found, each.remedy), []).append(each)
    width = max(len(check) for check, *_ in together) + 2
    lines = []
    for (check, status, found, remedy), same in together.items():
        lines += _wrapped(f"{check:<{width}}{status:<13}", f"{found}{_places(same)}")
        if remedy:
            lines += _wrapped(" " * (width + 13), f"-> {remedy}")
    counts = Counter(each.status for each in findings)
    said = ", ".join(f"{counts[status]} {status}" for status in ("ok", "failed", "not checked"))
    return "\n".join([*lines, "", f"{len(findings)} checks: {said}"])


def _wrapped(head: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, _WIDTH - len(head), break_long_words=False, break_on_hyphens=False) or [""]
    return [(head if number == 0 else " " * len(head)) + line for number, line in enumerate(lines)]


def _places(same: Sequence[Finding]) -> str:
    """On which nodes: their ids where they are few and not well, else how many of each kind."""
    nodes = [each for each in same if each.where != CLUSTER]
    if not nodes:
        return ""
    if same[0].status != "ok" and len(nodes) <= 3:
        return " (on " + ", ".join(f"{each.kind} {each.where[:12]}" for each in nodes) + ")"
    kinds = Counter(each.kind for each in nodes)
    return " (on " + ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())) + ")"


def as_json(findings: Sequence[Finding]) -> str:
    """The findings for a program."""
    counts = Counter(each.status for each in findings)
    document = {
        "ok": not counts["failed"],
        "counts": {status: counts[status] for status in ("ok", "failed", "not checked")},
        "findings": [asdict(each) for each in findings],
    }
    return json.dumps(document, indent=2)
