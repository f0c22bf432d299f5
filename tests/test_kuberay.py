"""The Kubernetes manifests and the container file.

The manifests were validated against the CRDs of KubeRay 1.6.2 and 1.7.0, every unknown key refused. The
schema below is of the fields that they use: it keeps later changes to fields and values that those CRDs have.
"""

import copy
import fnmatch
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

from revision_ray.encode.pipeline import Resources
from revision_ray.evaluate.evaluation import EvaluateJob
from revision_ray.train.settings import Workers

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "cluster" / "kuberay"
KINDS = {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob", "rayservice.yaml": "RayService"}


def closed(properties: dict, required: list[str] | None = None) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": required or [],
        "additionalProperties": False,
    }


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
STRINGS = {"type": "object", "additionalProperties": TEXT}
ANY = {"type": "object"}
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$"},
}
CONTAINER = closed(
    {
        "name": TEXT,
        "image": TEXT,
        "env": {"type": "array", "items": closed({"name": TEXT, "value": TEXT, "valueFrom": ANY}, ["name"])},
        "securityContext": closed(
            {
                "allowPrivilegeEscalation": FLAG,
                "capabilities": ANY,
                "runAsNonRoot": FLAG,
                "seccompProfile": ANY,
            }
        ),
        "resources": closed({"limits": QUANTITIES, "requests": QUANTITIES}),
        "volumeMounts": {
            "type": "array",
            "items": closed({"name": TEXT, "mountPath": TEXT, "readOnly": FLAG}, ["name", "mountPath"]),
        },
    },
    ["name", "image", "resources"],
)
POD = closed(
    {
        "metadata": closed({"labels": STRINGS}),
        "spec": closed(
            {
                "serviceAccountName": TEXT,
                "automountServiceAccountToken": FLAG,
                "tolerations": {
                    "type": "array",
                    "items": closed({"key": TEXT, "operator": TEXT, "effect": TEXT}),
                },
                "topologySpreadConstraints": {"type": "array", "items": ANY},
                "terminationGracePeriodSeconds": COUNT,
                "containers": {"type": "array", "minItems": 1, "items": CONTAINER},
                "volumes": {
                    "type": "array",
                    "items": closed(
                        {"name": TEXT, "emptyDir": QUANTITIES, "persistentVolumeClaim": ANY}, ["name"]
                    ),
                },
            },
            ["containers"],
        ),
    },
    ["spec"],
)
CLUSTER = closed(
    {
        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "authOptions": closed({"mode": {"enum": ["disabled", "token"]}, "secretName": TEXT}),
        "enableInTreeAutoscaling": FLAG,
        "autoscalerOptions": closed(
            {
                "version": {"enum": ["v1", "v2"]},
                "idleTimeoutSeconds": COUNT,
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
            }
        ),
        "headGroupSpec": closed({"rayStartParams": STRINGS, "template": POD}, ["template"]),
        "workerGroupSpecs": {
            "type": "array",
            "items": closed(
                {
                    "groupName": TEXT,
                    "minReplicas": COUNT,
                    "replicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": STRINGS,
                    "template": POD,
                },
                ["groupName", "maxReplicas", "minReplicas", "template"],
            ),
        },
    },
    ["headGroupSpec"],
)
SPECS = {
    "RayCluster": CLUSTER,
    "RayJob": closed(
        {
            "entrypoint": TEXT,
            "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
            "backoffLimit": COUNT,
            "activeDeadlineSeconds": COUNT,
            "preRunningDeadlineSeconds": COUNT,
            "shutdownAfterJobFinishes": FLAG,
            "ttlSecondsAfterFinished": COUNT,
            "rayClusterSpec": CLUSTER,
        }
    ),
    "RayService": closed({"serveConfigV2": TEXT, "rayClusterConfig": CLUSTER}),
}


def manifest(name: str) -> dict:
    return next(yaml.safe_load_all((FOLDER / name).read_text()))


def cluster_in(name: str) -> dict:
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(cluster: dict) -> dict[str, dict]:
    """Pod template of the head and of every group."""
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


def container(template: dict) -> dict:
    (only,) = template["spec"]["containers"]
    return only


@pytest.mark.parametrize("name", KINDS)
def test_the_operator_knows_every_field(name):
    document = manifest(name)
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", KINDS[name])
    jsonschema.validate(document["spec"], SPECS[KINDS[name]])


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["workerGroupSpecs"][0].update(minReplica=0),
        lambda spec: spec["authOptions"].update(mode="tokens"),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: container(pods(spec)["gpu"])["resources"]["limits"].update(memory=64),
    ],
)
def test_the_schema_refuses_what_the_operator_would(change):
    spec = copy.deepcopy(manifest("raycluster.yaml")["spec"])
    change(spec)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spec, CLUSTER)


def test_all_files_are_tested():
    assert {path.name for path in FOLDER.iterdir()} == {*KINDS, "network.yaml"}


@pytest.mark.parametrize("name", KINDS)
def test_the_operators_own_checks_pass(name):
    """Those that its admission code makes beyond the CRD: of authentication, resources and the autoscaler."""
    cluster = cluster_in(name)
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert "labels" not in group["rayStartParams"]
        assert "restartPolicy" not in group["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", KINDS)
def test_nobody_enters_without_the_secrets_token(name):
    cluster = cluster_in(name)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "revision-ray-token"}
    for template in pods(cluster).values():
        given = {each["name"]: each for each in container(template)["env"]}
        # The operator leaves alone what a pod sets itself.
        assert not given.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
        context = container(template)["securityContext"]
        assert (context["allowPrivilegeEscalation"], context["runAsNonRoot"]) == (False, True)
    text = (FOLDER / name).read_text()
    assert not re.search(r"[0-9a-f]{32}|AKIA[A-Z0-9]{16}", text)
    assert "--from-literal=auth_token=$(openssl rand -hex 32)" in text or name == "rayjob.yaml"


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_everything_but_the_head_returns_to_zero(name):
    cluster = cluster_in(name)
    assert cluster["enableInTreeAutoscaling"] is True
    assert 0 < cluster["autoscalerOptions"]["idleTimeoutSeconds"] <= 900
    assert {(group["minReplicas"], group["replicas"]) for group in cluster["workerGroupSpecs"]} == {(0, 0)}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_the_job_has_the_cluster_of_the_other_file_and_takes_it_away():
    spec = manifest("rayjob.yaml")["spec"]
    assert spec["rayClusterSpec"] == manifest("raycluster.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0


def test_the_jobs_command_survives_the_operators_shell_script():
    """It is pasted there as it is, behind `ray job submit ... --`."""
    entrypoint = manifest("rayjob.yaml")["spec"]["entrypoint"]
    words = shlex.split(entrypoint, posix=True)
    assert not re.search(r"[;&|<>$`\n\"']", entrypoint)
    assert words[:3] == ["env", "--chdir=/home/ray/project", "python"]
    assert f"WORKDIR {words[1].partition('=')[2]}\n" in (ROOT / "Dockerfile").read_text()
    for path in words[3:5]:
        assert (ROOT / path).is_file()


def test_every_stage_fits_a_group():
    """What stages ask for where the cluster has GPUs: one device and its CPUs an actor or worker."""
    sizes = {name: container(pod)["resources"] for name, pod in pods(cluster_in("raycluster.yaml")).items()}
    assert all(size["limits"] == size["requests"] for size in sizes.values()), "the autoscaler reads limits"
    devices = int(sizes["gpu"]["limits"]["nvidia.com/gpu"])
    assert "nvidia.com/gpu" not in sizes["cpu"]["limits"]
    cpus = float(sizes["gpu"]["limits"]["cpu"])
    evaluate = EvaluateJob.__dataclass_fields__["cpus_per_actor"].default
    for per_device in (Resources().cpus_per_actor, Workers().cpus_per_worker, evaluate):
        # The rest is for the tasks that read, decode and tokenise beside them.
        assert devices * per_device <= cpus / 2
    assert Resources().cpus_per_task <= float(sizes["cpu"]["limits"]["cpu"])


def test_who_reaches_the_pods_is_named():
    policy = manifest("network.yaml")
    label = policy["spec"]["podSelector"]["matchLabels"]
    for name in ("raycluster.yaml", "rayjob.yaml"):
        for template in pods(cluster_in(name)).values():
            assert label.items() <= template["metadata"]["labels"].items()
    open_to_all = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert open_to_all == []
    # What submits a RayJob's command is a pod of its own, with the operator's label.
    assert "ray.io/originated-from-crd: RayJob" in (FOLDER / "network.yaml").read_text()


# --- the container file -----------------------------------------------------------------------------------


def instructions() -> list[str]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_image_holds_the_pinned_ray_and_the_pinned_packages():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    (base,) = [line for line in instructions() if line.startswith("FROM ")]
    assert base == f"FROM rayproject/ray:{pins['ray']}-py311-${{FLAVOUR}}"
    assert cluster_in("raycluster.yaml")["rayVersion"] == pins["ray"]
    installs = [line for line in instructions() if "pip install" in line]
    assert len(installs) == 2
    assert "--constraint constraints.txt --requirement /tmp/requirements.txt" in installs[0]
    assert "--no-deps" in installs[1]


def test_the_image_names_no_index_and_keeps_no_secret():
    text = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"https?://|index-url|TOKEN=|PASSWORD", text)
    assert "ENV RAY_AUTH_MODE=token" in text
    assert instructions()[-1] == "USER 1000"


def test_the_image_leaves_out_what_git_does():
    """And tests besides; an old run or environment would make the image gigabytes larger."""
    ignored = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split("\n")[1:]]
    for pattern in (ROOT / ".gitignore").read_text().split():
        assert any(fnmatch.fnmatch(pattern.rstrip("/"), line) for line in ignored), pattern
    assert not {"revision_ray", "jobs", "configs", "pyproject.toml", "constraints.txt"} & set(ignored)
