"""Judge the facts that nodes report: what is wrong, and what to do about it. No Ray.

Every check gives at least one finding, also where there was nothing to look at. A check that could not be
done never counts as passed: it has a status and a reason of its own.
"""

import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from revision_ray.core.logs import without_secrets

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


_MOST_SKEW_S = 5.0
_GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class ProbedNode:
    """A node that is alive, and what its probe said: `facts` is None where it gave no answer."""

    id: str
    kind: str
    resources: Mapping[str, float]
    facts: Mapping[str, Any] | None = None
    error: str = ""
    """Why there are no facts."""
    skew_s: float | None = None
    """Its clock before the driver's, by at most `skew_error_s` wrong."""
    skew_error_s: float = 0.0
    seen: bool = True
    """Whether the driver sees the file that this node wrote."""

    @property
    def works(self) -> bool:
        """Whether tasks or actors run there; a head that offers nothing holds drivers alone."""
        return any(self.resources.get(name, 0) > 0 for name in ("CPU", "GPU"))


@dataclass(frozen=True, kw_only=True)
class NodeRequirements:
    """What the nodes must have."""

    storage: str | None = None
    models: tuple[str, ...] = ()
    min_free_gb: float = 20.0
    needs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    waited_s: float | None = None
    """How long nodes were waited for; None where none were asked for."""


def judge(nodes: Sequence[ProbedNode], wanted: NodeRequirements) -> list[Finding]:
    """All findings that rest on the nodes."""
    answered = [node for node in nodes if node.facts is not None]
    found = [*of_needs(nodes, wanted), *of_answers(nodes)]
    if not answered:
        names = ("versions", "clock", "disk", "storage", "gpus", "models")
        return found + [not_checked(name, "no node answered", "mend that first") for name in names]
    for check in (of_versions, of_clocks):
        found += check(answered)
    for check in (of_disks, of_storage, of_gpus, of_models):
        found += check(answered, wanted)
    return found


def not_checked(check: str, why: str, remedy: str) -> Finding:
    return Finding(check=check, where=CLUSTER, status="not checked", found=why, remedy=remedy)


def _of(node: ProbedNode, check: str, found: str, remedy: str = "") -> Finding:
    """Failed if there is a remedy, else ok."""
    status = "failed" if remedy else "ok"
    return Finding(check=check, where=node.id, kind=node.kind, status=status, found=found, remedy=remedy)


def of_needs(nodes: Sequence[ProbedNode], wanted: NodeRequirements) -> list[Finding]:
    """Of every kind of node that the jobs need there is one, or one could be had."""
    found = []
    for name, resources in wanted.needs.items():
        asked = ", ".join(f"{amount:g} {resource}" for resource, amount in resources.items())
        have = [node for node in nodes if all(node.resources.get(r, 0) >= n for r, n in resources.items())]
        if have:
            kinds = ", ".join(sorted({node.kind for node in have}))
            ok = f"{len(have)} with {asked} for {name} ({kinds})"
            found.append(Finding(check="nodes", where=CLUSTER, status="ok", found=ok))
        elif wanted.waited_s is None:
            why = f"no node with {asked} for {name} runs now"
            found.append(not_checked("nodes", why, "start_nodes=true has one started, and pays for it"))
        else:
            failed = f"no node with {asked} for {name} came within {wanted.waited_s:.0f} s"
            remedy = (
                "look at `ray status` for what the autoscaler says: the account's quota, the region's stock, "
                "or no node type with such resources (cluster.yaml, raycluster.yaml)"
            )
            found.append(Finding(check="nodes", where=CLUSTER, status="failed", found=failed, remedy=remedy))
    return found


def of_answers(nodes: Sequence[ProbedNode]) -> list[Finding]:
    """Every node that is alive runs a task."""
    remedy = (
        "look at that node's raylet log; end the node if it hangs (the autoscaler starts another), and "
        "submit with --working-dir, so that it has this code"
    )
    return [
        _of(node, "nodes", "runs tasks")
        if node.facts is not None
        else _of(node, "nodes", f"no answer: {node.error}", remedy)
        for node in nodes
    ]


def of_versions(nodes: Sequence[ProbedNode]) -> list[Finding]:
    """Python, the dependencies and this package's own code are the same everywhere."""

    def all_of(node: ProbedNode) -> dict[str, str]:
        assert node.facts
        return {"python": node.facts["python"], "this code": node.facts["code"], **node.facts["versions"]}

    each = [all_of(node) for node in nodes]
    usual = {name: Counter(one[name] for one in each).most_common(1)[0][0] for name in each[0]}
    found = []
    for node, one in zip(nodes, each, strict=True):
        missing = [name for name, version in one.items() if version == "none"]
        other = [f"{n} {one[n]} (others {usual[n]})" for n in one if one[n] != usual[n] and one[n] != "none"]
        wrong = [*other, *([f"missing: {', '.join(missing)}"] if missing else [])]
        said = "; ".join(wrong) or f"python {one['python']}, ray {one['ray']}, torch {one['torch']}, ..."
        remedy = (
            "start all nodes from one image, made from constraints.txt (Dockerfile), or run the set-up "
            "commands of cluster.yaml anew; let the code come with --working-dir alone"
        )
        found.append(_of(node, "versions", said, remedy if wrong else ""))
    if len(nodes) == 1:
        found.append(
            not_checked("versions", "one node alone is equal to itself", "start more nodes to compare")
        )
    return found


def of_clocks(nodes: Sequence[ProbedNode]) -> list[Finding]:
    """No clock is so far off that object stores refuse its signatures or leases seem to have ended."""
    found = []
    for node in nodes:
        if node.skew_s is None:
            found.append(
                Finding(
                    check="clock",
                    where=node.id,
                    kind=node.kind,
                    status="not checked",
                    found="the node gave no time",
                    remedy="run the doctor again",
                )
            )
            continue
        wrong = abs(node.skew_s) - node.skew_error_s > _MOST_SKEW_S
        said = f"{node.skew_s:+.1f} s beside the driver's (+- {node.skew_error_s:.1f} s)"
        remedy = "switch time synchronisation on (chrony, systemd-timesyncd)" if wrong else ""
        found.append(
            _of(node, "clock", said if wrong else f"within {_MOST_SKEW_S:g} s of the driver's", remedy)
        )
    return found


def of_disks(nodes: Sequence[ProbedNode], wanted: NodeRequirements) -> list[Finding]:
    """Room for objects that memory does not hold, logs, and checkpoints on their way."""
    found = []
    for node in nodes:
        assert node.facts
        disk = node.facts["disk"]
        free = disk["free"] / _GIGABYTE
        enough = free >= wanted.min_free_gb
        said = f"at least {wanted.min_free_gb:g} GB free" if enough else (
            f"{free:.1f} GB free at {disk['place']}, of {disk['total'] / _GIGABYTE:.0f} GB"
        )  # fmt: skip
        remedy = f"make room there, give nodes larger disks, or ask for less (min_free_gb={int(free)})"
        found.append(_of(node, "disk", said, "" if enough else remedy))
    return found


def of_storage(nodes: Sequence[ProbedNode], wanted: NodeRequirements) -> list[Finding]:
    """Every node reads what the driver wrote, writes, and the driver sees that."""
    if not wanted.storage:
        return [not_checked("storage", "no place was named", "give storage=URI, where outputs will go")]
    found = []
    for node in nodes:
        assert node.facts
        tried = node.facts["storage"]
        said, remedy = f"{wanted.storage}: read and written", ""
        if tried["read"]:
            said = f"cannot read what the driver wrote: {tried['read']}"
            remedy = (
                "give a URI that all nodes reach (s3://, gs://, a network file system mounted at one path), "
                "and its credentials to every node: a role, not a key"
            )
        elif tried["write"]:
            said = f"cannot write: {tried['write']}"
            remedy = "give the node's role or user leave to write there"
        elif not node.seen:
            said = "what it wrote is not seen by the driver"
            remedy = "the same path is another place on that node: mount one file system on all, or use s3://"
        found.append(_of(node, "storage", said, remedy))
    return found


def of_gpus(nodes: Sequence[ProbedNode], wanted: NodeRequirements) -> list[Finding]:
    """Where Ray offers devices, the driver lists as many and torch computes on each of them."""
    offering = [node for node in nodes if node.resources.get("GPU", 0) > 0]
    if not offering:
        return [
            not_checked("gpus", "no node that runs now offers a GPU", "start_nodes=true, if jobs need some")
        ]
    found = []
    for node in offering:
        assert node.facts
        gpus, offered = node.facts["gpus"], node.resources["GPU"]
        listed, computed = gpus["driver"], gpus["torch"] or {}
        count = computed.get("count", 0)
        said = f"torch (CUDA {computed.get('cuda')}) computes on {count:g}"
        if listed:
            first = listed[0]
            said = f"{len(listed)} x {first['name']}, driver {first['driver_version']}, {said}"
        remedy = ""
        if gpus["driver_error"] or not listed:
            said = f"Ray offers {offered:g}, the driver lists none: {gpus['driver_error'] or 'no device'}"
            remedy = (
                "use a machine image with the NVIDIA driver, and start containers with --gpus=all (Docker) "
                "or the device plugin (Kubernetes)"
            )
        elif gpus["torch_error"]:
            said = f"driver {listed[0]['driver_version']}; torch cannot compute: {gpus['torch_error']}"
            remedy = (
                "take a driver that is new enough for torch's CUDA, and a torch with CUDA; a device that "
                "another process filled is freed by ending that"
            )
        elif count < offered or len(listed) < offered:
            said = f"Ray offers {offered:g}, the driver lists {len(listed)}, torch sees {count}"
            remedy = "start Ray there with --num-gpus as many as there are, or mend the missing device"
        found.append(_of(node, "gpus", said, remedy))
    return found


def of_models(nodes: Sequence[ProbedNode], wanted: NodeRequirements) -> list[Finding]:
    """Every node that works can have every model."""
    if not wanted.models:
        return [not_checked("models", "none was named", "give models=[FOLDER or hub id, ...]")]
    working = [node for node in nodes if node.works]
    if not working:
        return [not_checked("models", "no node that runs now takes tasks", "start_nodes=true")]
    found = []
    for model in wanted.models:
        for node in working:
            assert node.facts
            error = node.facts["models"][model]
            remedy = (
                "put it where every node sees it, or name a hub id that nodes reach; for gated ones accept "
                "the terms and set HF_TOKEN on the nodes (a Secret, never a file of the repository)"
            )
            found.append(_of(node, "models", f"{model}: {error or 'there'}", remedy if error else ""))
    return found
