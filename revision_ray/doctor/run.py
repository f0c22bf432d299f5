"""The doctor job: every check, every remedy, before money is spent."""

import os
import sys
from dataclasses import dataclass, field
from typing import Literal

from revision_ray.doctor import examine
from revision_ray.doctor.findings import Finding, as_json, table
from revision_ray.doctor.judge import Wanted, judge, not_checked
from revision_ray.errors import ClusterError, ConfigError

_OF_NODES = ("authentication", "nodes", "versions", "clock", "disk", "storage", "gpus", "models")


@dataclass(frozen=True, kw_only=True)
class DoctorJob:
    """Check the cluster before money is spent: reachable, guarded, its nodes alike, with disk, GPUs, shared
    storage and models. Fails, with a remedy for each finding, where something is wrong; what could not be
    checked is said. Changes nothing: what it writes to the storage, it removes."""

    storage: str | None = None
    """Where outputs will go: a URI that every node must read and write."""
    models: list[str] = field(default_factory=list)
    """Folders, URIs or hub ids that every node must be able to load."""
    needs: dict[str, dict[str, float]] = field(default_factory=dict)
    """Resources that one node of each kind must offer, such as needs.gpu.GPU=1."""
    start_nodes: bool = False
    """Have the autoscaler start a node of each kind in `needs` that does not run, and check it, too."""
    wait_s: float = 900.0
    """How long to wait for nodes that are started."""
    timeout_s: float = 180.0
    """How long a node may take to answer."""
    min_free_gb: float = 20.0
    """Disk that each node must have left where Ray spills objects."""
    format: Literal["table", "json"] = "table"
    """How the findings are printed."""
    strict: bool = False
    """Fail where something could not be checked, too."""

    def __post_init__(self) -> None:
        for name in ("wait_s", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected more than 0 seconds")
        for name, resources in self.needs.items():
            if not resources:
                raise ConfigError(f"needs.{name} names no resource; give one, as in needs.{name}.CPU=1")


def run(job: DoctorJob) -> str:
    """The findings, as `job.format` says.

    Raises:
        ClusterError: something is wrong, or (strict) could not be checked; the findings were printed.
    """
    findings = examined(job)
    text = as_json(findings) if job.format == "json" else table(findings)
    failed = [each for each in findings if each.status == "failed"]
    unknown = [each for each in findings if each.status == "not checked"] if job.strict else []
    if not failed and not unknown:
        return text
    sys.stdout.write(text + "\n")
    names = ", ".join(dict.fromkeys(each.check for each in failed + unknown))
    count = f"{len(failed)} checks failed" + (f", {len(unknown)} could not be done" if unknown else "")
    raise ClusterError(f"{count}: {names}; the findings above say what to do")


def examined(job: DoctorJob) -> list[Finding]:
    """Everything that was found, in the order in which it is to be mended."""
    findings = [examine.reach()]
    if findings[0].status != "ok":
        why = "the cluster was not reached"
        return findings + [not_checked(name, why, "mend that first") for name in _OF_NODES]
    findings.append(examine.authentication())
    models = tuple(os.path.abspath(model) if os.path.exists(model) else model for model in job.models)
    with examine.started(job.needs if job.start_nodes else {}, job.wait_s):
        nodes, refused = examine.ask(examine.alive(), job.storage, models, job.timeout_s)
    wanted = Wanted(
        storage=None if refused else job.storage,
        models=models,
        min_free_gb=job.min_free_gb,
        needs=job.needs,
        waited_s=job.wait_s if job.start_nodes else None,
    )
    judged = judge(nodes, wanted)
    if refused:  # said of the driver; the nodes were not asked
        judged = [refused if each.check == "storage" else each for each in judged]
    return findings + judged
