"""cluster.yaml's node types come and go with the jobs that ask for them: Ray's fake multi-node provider."""

import re
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from heads import ROOT, Head, copy_of_checkout, free_ports, running, short_folder
from tiny_encoder import WORDS, write_encoder

from revision_ray.core import storage

pytestmark = pytest.mark.slow

# What Ray's fake provider calls the head, whatever the configuration does.
HEAD_ID, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
ASKED = ("CPU", "GPU")
SMALLER = 16  # nodes have this fraction of cluster.yaml's CPUs; devices cost nothing where they are not real


def fake_cluster(gcs_port: int) -> dict:
    """cluster.yaml with its node types, made to fit, on nodes that are processes of this machine."""
    real = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    types = {}
    for name, node_type in real["available_node_types"].items():
        types[HEAD_TYPE if name == real["head_node_type"] else name] = {
            "node_config": {},
            "resources": {**node_type["resources"], "CPU": node_type["resources"]["CPU"] // SMALLER},
            "min_workers": node_type.get("min_workers", 0),
            "max_workers": min(node_type.get("max_workers", 0), 2),
        }
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": f"127.0.0.1:{gcs_port}",
        "head_node_id": HEAD_ID,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
    }
    return {
        **{key: real[key] for key in ("cluster_name", "max_workers", "upscaling_speed")},
        "idle_timeout_minutes": 0.1,
        "provider": provider,
        "head_node_type": HEAD_TYPE,
        "available_node_types": types,
        # A process needs no setting up; Ray asks for the empty lists of providers that it does not know.
        **{f"{who}setup_commands": [] for who in ("", "head_", "worker_")},
        **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
        **{"initialization_commands": [], "file_mounts": {}, "cluster_synced_files": [], "auth": {}},
    }


def authentication() -> dict[str, str]:
    """What cluster.yaml's containers are told of it."""
    options = yaml.safe_load((ROOT / "cluster.yaml").read_text())["docker"]["run_options"]
    given = dict(
        option.removeprefix("--env ").split("=") for option in options if option.startswith("--env ")
    )
    return {"RAY_AUTH_MODE": given.get("RAY_AUTH_MODE", "disabled")}


@dataclass
class Watch:
    """The worker nodes of the cluster, looked at all the time: (type, node id) of the living."""

    head: Head
    kinds: dict[tuple[int, ...], str]
    """Name of a node type by its resources."""
    seen: list[frozenset[tuple[str, str]]] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def look(self) -> frozenset[tuple[str, str]]:
        return frozenset(
            (self.kinds[tuple(int(node["resources_total"].get(name, 0)) for name in ASKED)], node["node_id"])
            for node in self.head.nodes()
            if not node["is_head_node"]
        )

    def run(self) -> None:
        while not self.done.wait(0.5):
            with suppress(OSError):  # a dashboard that is busy for once
                self.seen.append(self.look())

    def types(self, since: int = 0) -> set[str]:
        return {kind for nodes in self.seen[since:] for kind, _ in nodes}

    def wait_until_empty(self) -> None:
        for _ in range(600):
            if not self.seen[-1]:
                return
            time.sleep(0.5)
        raise TimeoutError(f"still there: {sorted(self.seen[-1])}")


@pytest.fixture(scope="module")
def head():
    (gcs_port,) = free_ports(1)
    environment = {
        **authentication(),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    with short_folder() as folder:
        (folder / "cluster.yaml").write_text(yaml.safe_dump(fake_cluster(gcs_port)))

        def start() -> Head:
            options = (f"--autoscaling-config={folder}/cluster.yaml", "--num-gpus=0")
            return Head(folder, *options, cpus=0, environment=environment, gcs_port=gcs_port)

        with running(start) as started:
            yield started


@pytest.fixture
def watch(head):
    """From before the test's jobs, with no worker yet, until its end."""
    types = yaml.safe_load((head.folder / "cluster.yaml").read_text())["available_node_types"]
    watching = Watch(
        head, {tuple(kind["resources"][name] for name in ASKED): key for key, kind in types.items()}
    )
    watching.seen.append(watching.look())
    thread = threading.Thread(target=watching.run)
    thread.start()
    try:
        watching.wait_until_empty()
        yield watching
    finally:
        watching.done.set()
        thread.join()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return copy_of_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    """Embeddings of anyone's in forty small files a side."""
    folder = tmp_path_factory.mktemp("stores")
    generator = np.random.default_rng(0)
    for name, centre in (("texts", 0.2), ("images", -0.2)):
        (folder / name).mkdir()
        for part in range(40):
            rows = generator.normal(centre, 1.0, size=(50, 16)).astype(np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            table = pa.table({"id": [f"{name}-{part}-{row}" for row in range(50)], "embedding": list(rows)})
            pq.write_table(table, folder / name / f"part-{part:02d}.parquet")
    return folder


def succeeded(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_who_has_no_token_starts_no_node(head, watch, checkout):
    """A submission without the token is refused and starts no node.

    The switch is cluster.yaml's."""
    result = head.submit(checkout, "python", "-c", "print('ran')", environment=head.without_token)
    assert result.returncode != 0
    assert "Unauthorized" in result.stdout
    assert watch.types() == set()


def test_a_fit_brings_cpu_nodes_up_and_they_go(head, watch, checkout, stores):
    """A submitted fit brings CPU nodes up, no others, and they go when it ends."""
    said = succeeded(
        head.submit(
            *(checkout, "python", "jobs/fit.py", "configs/fit.yaml"),
            *(f"texts={stores}/texts", f"images={stores}/images", f"output={stores}/fit"),
        )
    )
    assert "realign fitted on" in said
    assert watch.types() == {"cpu"}
    watch.wait_until_empty()
    assert watch.types() == {"cpu"}


def test_the_doctor_looks_at_a_node_of_each_kind_and_they_go(head, watch, checkout):
    """The doctor starts a node of each kind, examines it, and they go."""
    result = head.submit(
        *(checkout, "python", "jobs/doctor.py", "configs/doctor.yaml", "start_nodes=true", "format=json"),
        *("min_free_gb=0.001", "wait_s=240"),
    )
    assert watch.types() == {"cpu", "gpu"}
    for kind in ("cpu", "gpu"):
        found = re.findall(rf'"kind": "{kind}"', result.stdout)
        assert found, f"nothing was found of a node of kind {kind}: {result.stdout[-3000:]}"
    watch.wait_until_empty()


def test_encoding_brings_gpu_nodes_up_and_they_go(head, watch, checkout, tmp_path):
    """Encoding with a GPU an actor brings GPU nodes up, no others, and they go.

    As the README says it: the encoder's actors ask for a GPU each."""
    encoder = write_encoder(tmp_path / "encoder")
    for part in range(6):
        lines = [f"{WORDS[part]} {WORDS[row]}\n" for row in range(40)]
        (tmp_path / f"texts-{part}.txt").write_text("".join(lines))
    succeeded(
        head.submit(
            *(checkout, "python", "jobs/embed.py", "configs/embed.yaml"),
            *(f"texts={tmp_path}/texts-*.txt", f"encoder.model={encoder}", f"output={tmp_path}/store"),
            *("resources.gpus_per_actor=1", "resources.max_actors=2"),
        )
    )
    assert storage.read_json(f"{tmp_path}/store/manifest.json")["num_rows"] == 240
    assert watch.types() == {"gpu"}
    watch.wait_until_empty()
    assert watch.types() == {"gpu"}


TRAIN = """
import ray
from ray.train import RunConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from revision_ray.core.cluster import connect
from revision_ray.core.config import load
from revision_ray.train.entry import scaling
from revision_ray.train.stages import PretrainJob

def work():
    print("HOLDS", ray.get_runtime_context().get_accelerator_ids()["GPU"])

connect()
job = load(PretrainJob, ["configs/pretrain_llama3_8b.yaml", "data=[x]", "output=x", "num_workers=2"])
asked = scaling(job.num_workers, job.workers.gpus_per_worker, job.workers.cpus_per_worker)
DataParallelTrainer(work, scaling_config=asked, run_config=RunConfig(storage_path="STORAGE")).fit()
"""


def test_training_brings_gpu_nodes_up_and_they_go(head, watch, checkout, tmp_path):
    """What stage 1 asks for brings GPU nodes up, a device for each worker, and they go.

    What stage 1's configuration asks of the cluster, by the function that its job asks with; its loop
    would look for CUDA."""
    said = succeeded(head.submit(checkout, "python", "-P", "-c", TRAIN.replace("STORAGE", str(tmp_path))))
    assert set(re.findall(r"HOLDS \['\d'\]", said)) == {"HOLDS ['0']", "HOLDS ['1']"}, "a device each"
    assert watch.types() == {"gpu"}
    watch.wait_until_empty()
    assert watch.types() == {"gpu"}
