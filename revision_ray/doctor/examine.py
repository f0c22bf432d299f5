"""The doctor job: run the checks on every node of a cluster, and print findings with remedies."""

import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from revision_ray.core import storage
from revision_ray.core.cluster import connect
from revision_ray.core.errors import ClusterError, ConfigError, DataError
from revision_ray.doctor import probe
from revision_ray.doctor.judge import (
    CLUSTER,
    Finding,
    NodeRequirements,
    ProbedNode,
    as_json,
    judge,
    not_checked,
    table,
)

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0
_STRANGER_TIMEOUT_S = 90.0
_CLOCK_TRIES = 3
_GROUP_LABEL = "ray.io/node-group"
_TOKEN_REMEDY = (
    "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or put the cluster's token at ~/.ray/auth_token)"
)

# A process without a token: where it comes in, everybody can.
_STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print("ENTERED", len(ray.nodes()))
"""
# What Ray says to it. Another failure is no proof that the cluster is guarded.
_REFUSED = re.compile(r"Unauthenticated|Unauthorized|AuthenticationError|InvalidAuthToken")


def reach() -> Finding:
    """This process is connected to the cluster, or the finding says why not."""
    address = os.environ.get("RAY_ADDRESS", "local")
    try:
        _knock(address)
        connect()
    except (ClusterError, ConnectionError, OSError, RuntimeError, ValueError, RayError) as found:
        error = (found.__cause__ if isinstance(found, ClusterError) else None) or found
        if isinstance(error, AuthenticationError):
            return _unreached(address, _first_line(error), _TOKEN_REMEDY)
        remedy = (
            "run it on the cluster (ray job submit ... -- python jobs/doctor.py ...), or set RAY_ADDRESS to "
            "HOST:6379 of a head that runs; look at security groups and at `ray status` there"
        )
        return _unreached(address, _first_line(error), remedy)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    where = "started in this process" if address == "local" else "reached"
    found = f"{where}: {len(nodes)} nodes, ray {ray.__version__}"
    return Finding(check="cluster", where=CLUSTER, status="ok", found=found)


def _unreached(address: str, found: str, remedy: str) -> Finding:
    return Finding(
        check="cluster", where=CLUSTER, status="failed", found=f"{address}: {found}", remedy=remedy
    )


def _knock(address: str) -> None:
    """Ray tries for minutes to connect to an address where nobody listens."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def started(needs: Mapping[str, Mapping[str, float]], wait_s: float) -> Iterator[None]:
    """A node of every kind that is needed is up, if the autoscaler finds one within `wait_s` seconds, and
    stays while this is entered.

    Kinds without GPUs come first, one at a time: a GPU node that is on its way has room for what they ask.
    """
    holders: list[Any] = []
    try:
        for resources in sorted(needs.values(), key=lambda resources: resources.get("GPU", 0)):
            rest = {
                name: amount for name, amount in resources.items() if name not in ("CPU", "GPU", "memory")
            }
            holder: Any = ray.remote(
                num_cpus=resources.get("CPU", 0),
                num_gpus=resources.get("GPU", 0),
                memory=resources.get("memory", 0),
                resources=rest,
            )(probe.ResourceHolder).remote()
            holders.append(holder)
            came, _ = ray.wait([holder.here.remote()], timeout=wait_s)
            if not came:
                ray.kill(holders.pop())
        yield
    finally:
        for holder in holders:
            ray.kill(holder)


def alive() -> list[ProbedNode]:
    """The nodes that run now."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            resources = node.get("Resources", {})
            kind = (node.get("Labels") or {}).get(_GROUP_LABEL) or _kind_of(resources)
            found.append(ProbedNode(id=node["NodeID"], kind=kind, resources=resources))
    return sorted(found, key=lambda node: (node.kind, node.id))


def _kind_of(resources: Mapping[str, float]) -> str:
    """Of a node that no autoscaler named."""
    if "node:__internal_head__" in resources:
        return "head"
    return "gpu" if resources.get("GPU", 0) else "cpu"


def ask(
    nodes: Sequence[ProbedNode], where: str | None, models: tuple[str, ...], timeout_s: float
) -> tuple[list[ProbedNode], Finding | None]:
    """The nodes with what each said, and what is wrong with the storage for the driver itself."""
    token = secrets.token_hex(16)
    folder = storage.join(storage.absolute(where), f".doctor-{token[:8]}") if where else None
    refused = _write_drivers_file(folder, token) if folder else None
    asked = probe.ProbeRequest(
        storage=None if refused else folder,
        token=token,
        models=models,
        scratch=ray.get_runtime_context().get_temp_dir(),
        num_gpus=0,
    )
    try:
        answered = [
            replace(node, **answer)
            for node, answer in zip(nodes, _answers(nodes, asked, timeout_s), strict=True)
        ]
        if folder and not refused:
            answered = [replace(node, seen=_seen(folder, node.id, token)) for node in answered]
    finally:
        if folder and not refused:
            _remove(folder)
    return [_timed(node) for node in answered], refused


def _write_drivers_file(folder: str, token: str) -> Finding | None:
    try:
        storage.write_bytes(storage.join(folder, probe.DRIVERS_FILE), token.encode())
    except DataError as error:
        remedy = "name a place that the driver may write to, and give its role or user leave to"
        return Finding(
            check="storage", where=CLUSTER, status="failed", found=f"the driver: {error}", remedy=remedy
        )
    return None


def _answers(
    nodes: Sequence[ProbedNode], asked: probe.ProbeRequest, timeout_s: float
) -> list[dict[str, Any]]:
    tasks = [
        _pinned(probe.facts, node).remote(replace(asked, num_gpus=node.resources.get("GPU", 0)), node.id)
        for node in nodes
    ]
    ready, _ = ray.wait(tasks, num_returns=len(tasks), timeout=timeout_s) if tasks else ([], [])
    answers: list[dict[str, Any]] = []
    for task in tasks:
        if task not in ready:
            ray.cancel(task, force=True)
            answers.append({"error": f"nothing within {timeout_s:.0f} s"})
            continue
        try:
            answers.append({"facts": ray.get(task)})
        except RayError as error:
            answers.append({"error": _first_line(getattr(error, "cause", None) or error)})
    return answers


def _pinned(function: Any, node: ProbedNode) -> Any:
    """`function` as a task that runs on that node or nowhere, also on one that offers no CPU."""
    there: Any = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(function)


def _seen(folder: str, node_id: str, token: str) -> bool:
    try:
        return storage.read_bytes(storage.join(folder, node_id)).decode() == token
    except (DataError, UnicodeDecodeError):
        return False


def _remove(folder: str) -> None:
    """The folder of this check, whose name nobody else has, is gone."""
    filesystem, path = storage.resolve(folder)
    try:
        filesystem.delete_dir(path)
    except OSError as error:
        log.warning("%s could not be removed (%s); remove it yourself", folder, error)


def _timed(node: ProbedNode) -> ProbedNode:
    """Its clock beside this one's: the reading whose way there and back was shortest is the best."""
    if node.facts is None:
        return node
    readings = []
    clock = _pinned(probe.now, node)
    try:
        for _ in range(_CLOCK_TRIES):
            before = time.time()
            theirs: Any = ray.get(clock.remote(), timeout=30)
            after = time.time()
            readings.append(((after - before) / 2, theirs - (before + after) / 2))
    except RayError:
        return node
    error, skew = min(readings)
    return replace(node, skew_s=skew, skew_error_s=error)


def authentication() -> Finding:
    """A process without the token is refused by the cluster."""
    address = ray.get_runtime_context().gcs_address
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    remedy = (
        "set RAY_AUTH_MODE=token and the token's path on every node before `ray start` (as cluster.yaml "
        "and raycluster.yaml do), and start the cluster anew: until then whoever reaches it runs code"
    )
    try:
        result = subprocess.run(
            [sys.executable, "-c", _STRANGER, address],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_STRANGER_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        why = f"a process without the token had no answer within {_STRANGER_TIMEOUT_S:.0f} s"
        return not_checked(
            "authentication", why, "run the doctor again; try `ray list nodes` without the token"
        )
    if "ENTERED" in result.stdout:
        said = "off: a process without the token was let in"
        return Finding(check="authentication", where=CLUSTER, status="failed", found=said, remedy=remedy)
    if _REFUSED.search(result.stderr):
        said = "on: a process without the token was refused"
        return Finding(check="authentication", where=CLUSTER, status="ok", found=said)
    lines = result.stderr.strip().splitlines() or ["no message"]
    return not_checked("authentication", f"a process without the token failed: {lines[-1]}", _TOKEN_REMEDY)


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


def run_doctor(job: DoctorJob) -> str:
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
    findings = [reach()]
    if findings[0].status != "ok":
        why = "the cluster was not reached"
        return findings + [not_checked(name, why, "mend that first") for name in _OF_NODES]
    findings.append(authentication())
    models = tuple(os.path.abspath(model) if os.path.exists(model) else model for model in job.models)
    with started(job.needs if job.start_nodes else {}, job.wait_s):
        nodes, refused = ask(alive(), job.storage, models, job.timeout_s)
    wanted = NodeRequirements(
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
