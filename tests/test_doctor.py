"""The doctor: every fault has its finding and remedy; what was not looked at never counts as sound."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import tomllib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from revision_ray.core import storage
from revision_ray.core.config import load
from revision_ray.core.errors import ClusterError, ConfigError
from revision_ray.doctor import examine, probe
from revision_ray.doctor.examine import DoctorJob, examined, run_doctor
from revision_ray.doctor.judge import Finding, NodeRequirements, ProbedNode, as_json, judge, table

ROOT = Path(__file__).parents[1]
CHECKS = {"nodes", "versions", "clock", "disk", "storage", "gpus", "models"}
VERSIONS = dict.fromkeys(probe.PACKAGES, "1.0")
DEVICE = {"name": "NVIDIA L40S", "driver_version": "570.1", "memory.total": "46068 MiB"}
SOUND = {
    "python": "3.11.9",
    "versions": VERSIONS,
    "code": "abc",
    "disk": {"place": "/tmp/ray", "free": 100e9, "total": 250e9},
    "storage": {"read": "", "write": ""},
    "gpus": {"driver": [], "driver_error": "no nvidia-smi on this machine", "torch": None, "torch_error": ""},
    "models": {"org/model": ""},
}
GPUS = {
    "driver": [DEVICE] * 4,
    "driver_error": "",
    "torch": {"count": 4, "cuda": "12.8", "built": True},
    "torch_error": "",
}
WANTED = NodeRequirements(
    storage="s3://bucket/runs", models=("org/model",), needs={"cpu": {"CPU": 1}, "gpu": {"GPU": 1}}
)


def node(name: str, kind: str = "cpu", **changes) -> ProbedNode:
    gpus = 4.0 if kind == "gpu" else 0.0
    resources = {"CPU": 0.0 if kind == "head" else 32.0, "GPU": gpus}
    facts = {**SOUND, "gpus": GPUS} if gpus else SOUND
    return ProbedNode(id=name, kind=kind, resources=resources, **{"facts": facts, "skew_s": 0.1, **changes})


def with_facts(name: str, kind: str = "cpu", **changes) -> ProbedNode:
    sound = node(name, kind)
    return replace(sound, facts={**sound.facts, **changes})


NODES = [node("a", "head"), node("b"), node("c"), node("d", "gpu")]


def of(findings: list[Finding], check: str, status: str | None = None) -> list[Finding]:
    return [each for each in findings if each.check == check and status in (None, each.status)]


def test_a_sound_cluster_passes_every_check():
    findings = judge(NODES, WANTED)
    assert {each.check for each in findings} == CHECKS
    assert {each.status for each in findings} == {"ok"}


FAULTS = {
    "no answer": (node("e", facts=None, error="ModuleNotFoundError"), "nodes", "ModuleNotFoundError"),
    "another torch": (
        with_facts("e", versions={**VERSIONS, "torch": "2.0"}),
        "versions",
        r"torch 2\.0 \(others 1\.0\)",
    ),
    "no peft": (with_facts("e", versions={**VERSIONS, "peft": "none"}), "versions", "missing: peft"),
    "another python": (with_facts("e", python="3.12.1"), "versions", r"python 3\.12\.1"),
    "another code": (with_facts("e", code="def"), "versions", "this code def"),
    "a slow clock": (node("e", skew_s=-60.0), "clock", r"-60\.0 s"),
    "a full disk": (
        with_facts("e", disk={"place": "/tmp/ray", "free": 3e9, "total": 250e9}),
        "disk",
        r"3\.0 GB free at /tmp/ray",
    ),
    "nothing to read": (
        with_facts("e", storage={"read": "no such file", "write": ""}),
        "storage",
        "cannot read .* no such file",
    ),
    "read only": (
        with_facts("e", storage={"read": "", "write": "access denied"}),
        "storage",
        "cannot write: access denied",
    ),
    "another place": (node("e", seen=False), "storage", "not seen by the driver"),
    "no driver": (with_facts("e", "gpu", gpus=SOUND["gpus"]), "gpus", "driver lists none: no nvidia-smi"),
    "an old driver": (
        with_facts("e", "gpu", gpus={**GPUS, "torch": None, "torch_error": "driver too old"}),
        "gpus",
        "cannot compute: driver too old",
    ),
    "a lost device": (
        with_facts("e", "gpu", gpus={**GPUS, "driver": [DEVICE] * 3, "torch": {"count": 3, "cuda": "12"}}),
        "gpus",
        "Ray offers 4, the driver lists 3",
    ),
    "no model": (with_facts("e", models={"org/model": "no such directory"}), "models", "no such directory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_its_check_on_its_node_alone_with_a_remedy(fault):
    broken, check, message = FAULTS[fault]
    findings = judge([*NODES, broken], WANTED)
    (failed,) = [each for each in findings if each.status == "failed"]
    assert (failed.check, failed.where, failed.kind) == (check, "e", broken.kind)
    assert re.search(message, failed.found)
    assert failed.remedy


def test_a_clock_is_not_blamed_for_a_slow_way():
    late = node("e", skew_s=7.0, skew_error_s=6.0)
    assert not of(judge([*NODES, late], WANTED), "clock", "failed")


def test_models_are_not_looked_for_where_nothing_runs():
    head = replace(NODES[0], facts={**SOUND, "models": {"org/model": "no such directory"}})
    assert not of(judge([head, *NODES[1:]], WANTED), "models", "failed")


@pytest.mark.parametrize(
    ("nodes", "wanted", "check"),
    [
        (NODES[:3], WANTED, "nodes"),  # of the gpu kind
        (NODES[:3], WANTED, "gpus"),
        (NODES, replace(WANTED, storage=None), "storage"),
        (NODES, replace(WANTED, models=()), "models"),
        (NODES[:1], WANTED, "models"),
        (NODES[:1], WANTED, "versions"),
        ([*NODES, node("e", skew_s=None)], WANTED, "clock"),
    ],
)
def test_what_could_not_be_looked_at_is_said_and_did_not_pass(nodes, wanted, check):
    findings = judge(nodes, wanted)
    (unknown,) = of(findings, check, "not checked")
    assert unknown.remedy


def test_without_any_answer_no_check_passes():
    silent = [replace(each, facts=None, error="nothing within 180 s") for each in NODES]
    findings = judge(silent, replace(WANTED, needs={}))
    assert {each.check for each in findings} == CHECKS
    assert {each.status for each in findings} == {"failed", "not checked"}


def test_a_node_that_was_waited_for_in_vain_is_a_failure():
    findings = judge(NODES[:3], replace(WANTED, waited_s=900.0))
    (failed,) = of(findings, "nodes", "failed")
    assert "1 GPU for gpu" in failed.found
    assert "quota" in failed.remedy


# --- how it is shown --------------------------------------------------------------------------------------


def test_equal_findings_of_many_nodes_are_one_line_and_failures_keep_their_node():
    many = [node(f"{number:056d}") for number in range(100)]
    broken = with_facts("f" * 56, storage={"read": "", "write": "access denied"})
    text = table(judge([*many, broken], replace(WANTED, needs={})))
    assert len(text.splitlines()) < 30
    assert "(on 100 x cpu)" in text
    assert "(on cpu ffffffffffff)" in text
    assert "-> give the node's role or user leave to write there" in text
    assert max(map(len, text.splitlines())) <= 100


def test_json_holds_every_finding_and_the_verdict():
    findings = judge([*NODES, FAULTS["read only"][0]], WANTED)
    document = json.loads(as_json(findings))
    assert document["ok"] is False
    assert document["counts"]["failed"] == 1
    assert len(document["findings"]) == len(findings)
    assert json.loads(as_json(judge(NODES, WANTED)))["ok"] is True


def test_no_finding_holds_a_secret():
    secret = "c0ffee" * 6
    found = Finding(check="storage", where="a", status="failed", found=f"s3://k:{secret}@b", remedy="mend")
    assert secret not in table([found]) + as_json([found])


# --- one machine ------------------------------------------------------------------------------------------


def test_the_packages_are_the_projects_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(probe.PACKAGES) == {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}


def asked(folder: Path | str, **changes) -> probe.ProbeRequest:
    defaults = {"storage": str(folder), "token": "t", "models": (), "scratch": None, "num_gpus": 0.0}
    return probe.ProbeRequest(**{**defaults, **changes})


def test_storage_is_read_and_written(tmp_path):
    (tmp_path / probe.DRIVERS_FILE).write_text("t")
    assert probe.try_storage(asked(tmp_path), "node") == {"read": "", "write": ""}
    assert (tmp_path / "node").read_text() == "t"


def test_storage_that_is_another_one_is_told(tmp_path):
    found = probe.try_storage(asked(tmp_path), "node")
    assert "no such file" in found["read"]
    (tmp_path / probe.DRIVERS_FILE).write_text("another")
    assert "another content" in probe.try_storage(asked(tmp_path), "node")["read"]


def test_storage_that_refuses_a_write_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    found = probe.try_storage(asked(tmp_path / "file" / "below"), "node")
    assert found["read"]
    assert "failed" in found["write"]


def test_an_object_store_is_tried_and_left_as_it_was(bucket, s3_options):
    storage.write_bytes(bucket("runs/kept"), b"")
    folder = bucket("runs/.doctor-1")
    assert examine._write_drivers_file(folder, "t") is None
    assert not examine._seen(folder, "node", "t")
    assert probe.try_storage(asked(folder), "node") == {"read": "", "write": ""}
    assert examine._seen(folder, "node", "t")
    examine._remove(folder)
    left = [storage.name_of(uri) for uri, _ in storage.list_files(bucket("runs"), recursive=True)]
    assert left == ["kept"]
    refused = examine._write_drivers_file(f"s3://nowhere/runs?{s3_options}", "t")
    assert refused
    assert (refused.check, refused.status) == ("storage", "failed")


def test_a_folder_is_a_model_with_configuration_and_weights(tmp_path):
    assert probe.model_error(str(tmp_path / "none")) == "no such directory on this node"
    assert probe.model_error(str(tmp_path)) == "no config.json there"
    (tmp_path / "config.json").write_text("{}")
    assert probe.model_error(str(tmp_path)) == "no weights there"
    (tmp_path / "model.safetensors").write_text("")
    assert probe.model_error(str(tmp_path)) == ""
    assert probe.model_error(f"file://{tmp_path}") == ""
    assert probe.model_error(f"file://{tmp_path}/none") == "no config.json there"


def test_an_encoder_of_ours_is_a_model_in_folders_and_at_uris(tmp_path):
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert probe.model_error(str(tmp_path)) == probe.model_error(f"file://{tmp_path}") == ""
    (tmp_path / "open_clip_model.safetensors").unlink()
    assert probe.model_error(f"file://{tmp_path}") == "no weights there"


class Hub(BaseHTTPRequestHandler):
    """Tells everybody of every model, and gives files of open/ ones only, as the hub does with gated ones."""

    def do_GET(self) -> None:
        refused = self.path.endswith("/auth-check") and "/open/" not in self.path
        body = json.dumps({"id": "org/model", "siblings": []}).encode()
        self.send_response(403 if refused else 200)
        if refused:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def no_cache(tmp_path, monkeypatch) -> Path:
    """Where the hub's files would lie on this node: nowhere yet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_gated_model_that_the_hub_only_tells_of_is_not_there(no_cache, monkeypatch):
    from huggingface_hub import constants

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert "accepted its terms" in probe.model_error("gated/model")
        assert probe.model_error("open/model") == ""
        server.shutdown()


def test_a_hub_id_that_nobody_can_reach_is_not_taken_for_granted(no_cache, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached (" in probe.model_error("org/model")
    snapshot = no_cache / "models--org--model/snapshots/0"
    snapshot.mkdir(parents=True)
    (no_cache / "models--org--model/refs").mkdir()
    (no_cache / "models--org--model/refs/main").write_text("0")
    (snapshot / "config.json").write_text("{}")
    assert "the hub cannot be reached (" in probe.model_error("org/model"), "a configuration is no model"
    (snapshot / "model.safetensors").write_text("")
    assert probe.model_error("org/model") == ""
    assert probe.model_error("not a model") == "neither a directory nor a public repository of the hub"


def test_a_device_that_does_not_answer_is_an_error_not_a_crash(monkeypatch):
    monkeypatch.setattr(probe, "_COMPUTE", "raise SystemExit('no CUDA device here')")
    found = probe.gpus(1.0)
    assert (found["torch"], found["torch_error"]) == (None, "no CUDA device here")
    monkeypatch.setattr(probe, "_COMPUTE", "import time; time.sleep(60)")
    monkeypatch.setattr(probe, "_GPU_TIMEOUT_S", 0.2)
    assert probe.gpus(1.0)["torch_error"] == "no answer within 0.2 s"


def test_devices_are_read_from_the_drivers_tool(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L40S, 570.1, 46068 MiB'\necho 'NVIDIA L40S, 570.1, 46068 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert probe.gpus(0.0)["driver"] == [DEVICE, DEVICE]
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert probe.gpus(0.0)["driver_error"] == "NVIDIA-SMI has failed"


# --- the job ----------------------------------------------------------------------------------------------


def test_needs_come_from_the_command_line():
    job = load(DoctorJob, [str(ROOT / "configs/doctor.yaml"), "needs.gpu.GPU=4", "needs.big.memory=1e11"])
    assert job.needs == {"cpu": {"CPU": 1.0}, "gpu": {"GPU": 4.0}, "big": {"memory": 1e11}}
    with pytest.raises(ConfigError, match="names no resource"):
        load(DoctorJob, ["needs.gpu={}"])


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "jobs/doctor.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_a_cluster_that_is_not_there_fails_the_job_and_passes_nothing():
    result = doctor("format=json", RAY_ADDRESS="127.0.0.1:1")  # nobody listens on that port
    assert result.returncode == 2
    document = json.loads(result.stdout)
    assert document["counts"] == {"ok": 0, "failed": 1, "not checked": 8}
    assert "Connection refused" in document["findings"][0]["found"]
    assert "ClusterError: 1 checks failed: cluster" in result.stderr


def test_a_cluster_is_examined(cluster, tmp_path):
    job = DoctorJob(storage=str(tmp_path), needs={"cpu": {"CPU": 1}, "gpu": {"GPU": 1}}, min_free_gb=0.001)
    findings = examined(job)
    assert not [each for each in findings if each.status == "failed"]
    (guarded,) = of(findings, "authentication")
    assert (guarded.status, guarded.found) == ("ok", "on: a process without the token was refused")
    assert {each.check for each in findings if each.status == "not checked"} == {
        *("nodes", "versions", "gpus", "models")
    }
    assert {
        each.check for each in of(findings, "clock") + of(findings, "storage") + of(findings, "disk")
    } == {*("clock", "storage", "disk")}
    assert list(tmp_path.iterdir()) == [], "what it wrote is gone"


@pytest.mark.slow
def test_a_failure_is_printed_with_its_remedy_and_fails_the_job(cluster, tmp_path, capsys):
    """A failed check of the doctor is printed with its remedy and fails the job."""
    (tmp_path / "file").write_text("")
    job = DoctorJob(storage=str(tmp_path / "file"), min_free_gb=1e9)
    with pytest.raises(ClusterError, match="2 checks failed: disk, storage"):
        run_doctor(job)
    shown = capsys.readouterr().out
    assert "(min_free_gb=" in shown
    assert "-> name a place that the driver may write to" in shown
    assert storage.list_files(str(tmp_path))[0][0].endswith("file")


@pytest.mark.slow
def test_strictness_fails_what_was_not_checked(cluster, tmp_path):
    """A strict doctor fails where checks could not be done."""
    with pytest.raises(ClusterError, match="0 checks failed, 3 could not be done: versions, gpus, models"):
        run_doctor(DoctorJob(storage=str(tmp_path), min_free_gb=0.001, strict=True))


SEVERAL = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from revision_ray.doctor.judge import as_json
from revision_ray.doctor.examine import DoctorJob, examined

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
for kind in ("cpu", "gpu"):
    cluster.add_node(num_cpus=1, num_gpus=1 if kind == "gpu" else 0)
ray.init(address=cluster.address, logging_level="ERROR")
job = DoctorJob(storage=sys.argv[1], min_free_gb=0.001, needs={"gpu": {"GPU": 1}}, models=[sys.argv[2]])
print(as_json(examined(job)))
"""


@pytest.mark.slow
def test_every_node_of_a_cluster_is_asked_itself(tmp_path):
    """The doctor asks each node of a cluster itself.

    A head that takes no task, and two kinds of nodes, one of which claims a device that is not there."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("")
    # A short path: Ray's Unix sockets below it may have 107 bytes in all.
    with tempfile.TemporaryDirectory(prefix="rv", dir="/tmp") as temporary:
        Path(temporary, "ray").mkdir()
        result = subprocess.run(
            [sys.executable, "-c", SEVERAL, str(tmp_path), str(model)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": temporary},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout[result.stdout.index("{") :])["findings"]
    kinds = {check: sorted(each["kind"] for each in found if each["check"] == check) for check in CHECKS}
    for check in ("versions", "clock", "disk", "storage"):
        assert kinds[check] == ["cpu", "gpu", "head"], "each node was asked"
    assert kinds["models"] == ["cpu", "gpu"], "the head takes no task"
    failed = {(each["check"], each["kind"]) for each in found if each["status"] == "failed"}
    assert failed == {("gpus", "gpu")}
