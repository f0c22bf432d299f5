"""cluster.yaml is what Ray and AWS accept; a job line does the same after `ray job submit`."""

import json
import os
import re
import secrets
import shutil
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import botocore.session
import botocore.validate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from heads import BIN, ROOT, Head, copy_of_checkout, running, short_folder
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config

from revision_ray.core import artifact

# --- cluster.yaml -----------------------------------------------------------------------------------------


def cluster_yaml() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def pins() -> dict[str, str]:
    return dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def test_ray_accepts_the_configuration():
    validate_config(prepare_config(cluster_yaml()))


def test_ray_refuses_a_misspelt_configuration():
    """The validation above can fail: Ray knows every key."""
    config = cluster_yaml()
    config["available_node_types"]["gpu"]["min_worker"] = 0
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("node_type", ["head", "cpu", "gpu"])
def test_aws_accepts_the_node(node_type):
    """Every key and type of `node_config` is one of EC2's RunInstances."""
    node_config = cluster_yaml()["available_node_types"][node_type]["node_config"]
    shape = (
        botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    )
    request = {**node_config, "MinCount": 1, "MaxCount": 1}
    report = botocore.validate.ParamValidator().validate(request, shape)
    assert not report.has_errors(), report.generate_report()


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """An address that answers as AWS does, with an account in which the header's commands were run."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE"):
            patch.delenv(name, raising=False)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "none")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        # Ray keeps the key pair that it makes in ~/.ssh.
        patch.setenv("HOME", str(home))
        iam = boto3.client("iam", region_name="us-west-2")
        iam.create_role(RoleName="revision-ray", AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName="revision-ray")
        iam.add_role_to_instance_profile(InstanceProfileName="revision-ray", RoleName="revision-ray")
        yield boto3.client("ec2", region_name="us-west-2")
    server.stop()


def test_ray_launches_every_node_type(aws):
    """Ray's own code for `ray up` on AWS, to the running instance: networks, keys, groups, requests."""
    config = bootstrap_aws(prepare_config(cluster_yaml()))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node_type in config["available_node_types"].items():
        assert len(provider.create_node(node_type["node_config"], {"ray-user-node-type": name}, 1)) == 1
    launched = [
        instance for group in aws.describe_instances()["Reservations"] for instance in group["Instances"]
    ]
    assert {instance["InstanceType"] for instance in launched} == {
        "m7i.2xlarge",
        "m7i.8xlarge",
        "g6e.12xlarge",
    }
    # Without the role a worker cannot read s3:// paths.
    assert all(instance["IamInstanceProfile"]["Arn"].endswith("/revision-ray") for instance in launched)
    assert [i["InstanceType"] for i in launched if i.get("InstanceLifecycle") == "spot"] == ["m7i.8xlarge"]


def test_nodes_have_the_resources_that_the_autoscaler_is_told(aws):
    """Else it would wait for tasks that no node can take, or start nodes that stay half idle."""
    for name in ("cpu", "gpu"):
        node_type = cluster_yaml()["available_node_types"][name]
        described = aws.describe_instance_types(InstanceTypes=[node_type["node_config"]["InstanceType"]])
        machine = described["InstanceTypes"][0]
        devices = sum(gpu["Count"] for gpu in machine.get("GpuInfo", {}).get("Gpus", []))
        assert node_type["resources"] == {"CPU": machine["VCpuInfo"]["DefaultVCpus"], "GPU": devices}


def test_workers_scale_from_zero_and_the_head_takes_no_task():
    config = prepare_config(cluster_yaml())
    head, cpu, gpu = (config["available_node_types"][name] for name in ("head", "cpu", "gpu"))
    assert cpu["min_workers"] == gpu["min_workers"] == head["max_workers"] == 0
    assert config["max_workers"] >= cpu["max_workers"] + gpu["max_workers"] > 0
    assert 0 < config["idle_timeout_minutes"] <= 15
    assert head["resources"]["CPU"] == 0
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]


def test_token_authentication_is_on_and_nothing_listens_openly():
    text = (ROOT / "cluster.yaml").read_text()
    config = yaml.safe_load(text)
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    token_path = next(option.split("=")[1] for option in options if "RAY_AUTH_TOKEN_PATH=" in option)
    assert config["file_mounts"][token_path] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    # A token of Ray's is 64 hexadecimal digits, an AWS key id begins with AKIA.
    assert "RAY_AUTH_TOKEN=" not in text
    assert not re.search(r"[0-9a-f]{32}|AKIA[A-Z0-9]{16}", text)


def test_images_hold_the_pinned_ray_and_the_tested_python():
    config = cluster_yaml()
    gpu_image = config["available_node_types"]["gpu"]["docker"]["worker_image"]
    for image, flavour in ((config["docker"]["image"], "cpu"), (gpu_image, "gpu")):
        assert image == f"rayproject/ray:{pins()['ray']}-py311-{flavour}"


def test_set_up_installs_exactly_the_dependencies_of_the_project(tmp_path):
    """The shell command of cluster.yaml, run as a node runs it, up to the call of pip."""
    config = cluster_yaml()
    listing, install = config["setup_commands"]
    assert "--constraint ~/project/constraints.txt --requirement /tmp/requirements.txt" in install
    (tmp_path / "project").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "project")
    command = listing.replace("> /tmp/requirements.txt", "")
    environment = {"HOME": str(tmp_path), "PATH": f"{BIN}:/usr/bin:/bin"}
    result = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert result.stdout.split("\n")[:-1] == project["dependencies"]
    mounted = {Path(remote).name: local for remote, local in config["file_mounts"].items()}
    assert mounted["pyproject.toml"] == "pyproject.toml"
    assert mounted["constraints.txt"] == "constraints.txt"


# --- ray job submit ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head():
    with short_folder() as folder, running(lambda: Head(folder)) as started:
        yield started


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What a clone has, with a heavy environment and old runs beside it."""
    folder = copy_of_checkout(tmp_path_factory.mktemp("checkout"))
    for heavy in (".venv/lib/library.so", "runs/demo/checkpoint.safetensors", ".git/objects/pack"):
        (folder / heavy).parent.mkdir(parents=True)
        (folder / heavy).write_bytes(bytes(1_000_000))
    return folder


WHERE = """
import json, os, ray, revision_ray
ray.init()
where = ray.remote(lambda: __import__("revision_ray").__file__)
files = [os.path.join(at, name) for at, _, names in os.walk(".") for name in names]
print("FOUND", json.dumps({
    "driver": revision_ray.__file__, "worker": ray.get(where.remote()), "top": sorted(os.listdir(".")),
    "size": sum(map(os.path.getsize, files)), "cwd": os.getcwd(),
}))
"""


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    """Two directories of Parquet with the two columns that anyone's embeddings have."""
    folder = tmp_path_factory.mktemp("stores")
    generator = np.random.default_rng(0)
    for name, centre in (("texts", 0.2), ("images", -0.2)):
        rows = generator.normal(centre, 1.0, size=(300, 16)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        table = pa.table({"id": [f"{name}-{row}" for row in range(300)], "embedding": list(rows)})
        (folder / name).mkdir()
        pq.write_table(table, folder / name / "part-0.parquet")
    return folder


@pytest.fixture(scope="module")
def submitted(head, checkout, stores) -> dict[str, subprocess.CompletedProcess]:
    """Four jobs, handed to the cluster at the same time, while this process writes to the output of one."""
    fit = ("python", "jobs/fit.py", "configs/fit.yaml")
    lines = {
        # -P keeps the current directory off the path, as with a script in jobs/.
        "where": ("python", "-P", "-c", WHERE),
        "fit": (*fit, f"texts={stores}/texts", f"images={stores}/images", f"output={stores}/fit"),
        "typo": (*fit, "txets=nowhere"),
        "second": (*fit, f"texts={stores}/texts", f"images={stores}/images", f"output={stores}/held"),
    }
    with ThreadPoolExecutor(len(lines)) as pool, artifact.writing(f"{stores}/held"):
        results = pool.map(lambda line: head.submit(checkout, *line), lines.values())
        return dict(zip(lines, results, strict=True))


@pytest.mark.slow
def test_a_second_submission_to_one_output_is_refused(submitted, stores):
    """A submission to an output that another job writes is refused and names that job."""
    result = submitted["second"]
    assert result.returncode != 0
    assert f"DataError: {stores}/held: another job writes there (process {os.getpid()} on " in result.stdout
    assert "exit code 2" in result.stdout
    assert not (stores / "held").exists()


@pytest.mark.slow
def test_after_that_a_submission_is_accepted_and_another_one_finds_it_done(head, checkout, submitted, stores):
    """An output that was given free takes a submission; the next one keeps what is there.

    The first has given the output free; a re-submission of what has finished keeps it."""
    fit = ("python", "jobs/fit.py", "configs/fit.yaml")
    for said in ("realign fitted on", "holds this fit already"):
        result = head.submit(
            checkout, *fit, f"texts={stores}/texts", f"images={stores}/images", f"output={stores}/held"
        )
        assert result.returncode == 0, result.stdout
        assert said in result.stdout


@pytest.mark.slow
def test_driver_and_workers_import_the_package_that_was_submitted(head, submitted):
    """Driver and workers import the submitted package, and no heavy folder travels.

    Not the one that this environment has installed: nodes of a cluster have none."""
    result = submitted["where"]
    assert result.returncode == 0, result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("FOUND"))
    found = json.loads(line.removeprefix("FOUND "))
    assert found["driver"] == found["worker"] == found["cwd"] + "/revision_ray/__init__.py"
    assert found["cwd"].startswith(str(head.folder))
    # What .gitignore names, and the repository's own objects, stay at home.
    assert found["top"] == [".gitignore", "configs", "jobs", "pyproject.toml", "revision_ray"]
    assert found["size"] < 2_000_000


@pytest.mark.slow
def test_a_job_line_runs_on_the_cluster(submitted, stores):
    """A submitted fit runs on the cluster and closes the gap."""
    result = submitted["fit"]
    assert result.returncode == 0, result.stdout
    gap = json.loads((stores / "fit" / "alignment.json").read_text())["modality_gap"]
    assert gap["after"] < 0.1 * gap["before"]


@pytest.mark.slow
def test_a_failing_job_fails_the_submission(submitted):
    """A submission with a wrong key fails with the job's exit code and its advice."""
    result = submitted["typo"]
    assert result.returncode != 0
    assert "Did you mean: 'texts'" in result.stdout
    assert "exit code 2" in result.stdout, "the job's own exit code is in Ray's message"


@pytest.mark.slow
def test_without_the_token_nothing_is_accepted(head, checkout):
    """Without the token, or with another, the cluster accepts nothing."""
    result = head.submit(checkout, "python", "-c", "print('ran')", environment=head.without_token)
    assert result.returncode != 0
    assert "Unauthorized" in result.stdout
    assert "ran\n" not in result.stdout
    with pytest.raises(urllib.error.HTTPError, match="401"):
        head.get("/api/jobs/", head.without_token)
    stranger = head.folder / "wrong-token"
    stranger.write_text(secrets.token_hex(32))
    with pytest.raises(urllib.error.HTTPError, match="403"):
        head.get("/api/jobs/", {"RAY_AUTH_TOKEN_PATH": str(stranger)})


# --- every job --------------------------------------------------------------------------------------------

JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.py"))
# In children of one process, which imports what they need once: that takes seconds of a core for each job.
EVERY_JOB = """
import glob, os, runpy, sys, tempfile, traceback
for job in sorted(glob.glob("jobs/*.py")):
    runpy.run_path(job)
    for label, argument, line in (("HELP", "--help", 0), ("WRONG", "no_such_key=1", -1)):
        with tempfile.TemporaryFile("w+") as said:
            child = os.fork()
            if not child:
                os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
                sys.argv, code = [job, argument], 0
                try:
                    runpy.run_path(job, run_name="__main__")
                except SystemExit as ended:
                    code = ended.code or 0
                except BaseException:
                    traceback.print_exc()
                    code = 1
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            print(label, code, job, said.read().splitlines()[line], flush=True)
sys.exit(7)
"""


@pytest.fixture(scope="module")
def every_job(head, checkout) -> subprocess.CompletedProcess:
    """Each job on the cluster, asked for its keys and given a key that it does not have."""
    return head.submit(checkout, "python", "-P", "-c", EVERY_JOB)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_every_job_answers_on_the_cluster_and_refuses_a_wrong_key(every_job, name):
    """Each job on the cluster prints its help and refuses a key that it does not have."""
    lines = every_job.stdout.splitlines()
    assert f"HELP 0 jobs/{name} usage: python jobs/{name} " in "\n".join(lines)
    # Ray repeats the end of a failed job's log.
    (wrong,) = {line for line in lines if line.startswith("WRONG ") and f" jobs/{name} " in line}
    assert wrong.startswith(f"WRONG 2 jobs/{name} ConfigError: ")
    assert "no_such_key" in wrong


@pytest.mark.slow
def test_the_exit_code_of_the_last_line_is_the_jobs(every_job):
    """The exit code of a submission is that of its last line."""
    assert every_job.returncode != 0
    assert "exit code 7" in every_job.stdout


# --- the pipeline, stopped --------------------------------------------------------------------------------

FITS = {
    f"{strategy}_{rows}": {"strategy": strategy, "max_rows": rows}
    for rows in (100, 250)
    for strategy in ("none", "anchor", "anchor_trace", "realign", "gaussian_ot")
}


@pytest.fixture(scope="module")
def chain(stores) -> Path:
    """Many fits, one behind the other."""
    inputs = {"texts": f"{stores}/texts", "images": f"{stores}/images"}
    stages = {
        name: {"fit": {**settings, **inputs, "output": f"${{output}}/{name}"}}
        for name, settings in FITS.items()
    }
    (stores / "chain.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return stores / "chain.yaml"


def states(output: Path) -> dict[str, str]:
    ledger = output / "ledger.json"
    return {
        name: record["state"]
        for name, record in (json.loads(ledger.read_text())["stages"] if ledger.exists() else {}).items()
    }


@pytest.mark.slow
def test_a_stopped_pipeline_is_submitted_again_and_goes_on(head, checkout, chain, stores):
    """A pipeline stopped on the cluster and submitted again goes on and ends with equal bytes."""
    line = ("python", "jobs/pipeline.py", str(chain))
    stopped = stores / "stopped"
    head.run("submit", "--working-dir", ".", "--no-wait", "--submission-id", "first", "--",
             *line, f"output={stopped}", folder=checkout)  # fmt: skip
    for _ in range(9000):
        if len(states(stopped)) >= 3 or head.status("first") not in ("PENDING", "RUNNING"):
            break
        time.sleep(0.1)
    head.run("stop", "first", folder=checkout)
    assert head.status("first") == "STOPPED"
    before = states(stopped)
    finished = [name for name, state in before.items() if state == "finished"]
    assert 2 <= len(finished) < len(FITS)
    again = head.submit(checkout, *line, f"output={stopped}", submission_id="again")
    assert again.returncode == 0, again.stdout
    assert head.status("again") == "SUCCEEDED"
    logs = head.run("logs", "again", folder=checkout)
    assert set(re.findall(r"stage (\w+) \(fit\): skipped, unchanged since", logs)) == set(finished)
    cut_off = [name for name, state in before.items() if state == "running"]
    assert re.findall(r"stage (\w+) \(fit\): goes on, was cut off", logs) == cut_off
    assert states(stopped) == dict.fromkeys(FITS, "finished")
    undisturbed = stores / "undisturbed"
    whole = head.submit(checkout, *line, f"output={undisturbed}")
    assert whole.returncode == 0, whole.stdout
    for name in FITS:
        files = [output / name / "alignment.safetensors" for output in (stopped, undisturbed)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
