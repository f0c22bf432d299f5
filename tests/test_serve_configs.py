"""The Serve applications of configs/, and the metrics that a server exports."""

import ast
import asyncio
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.schema import ServeDeploySchema

from revision_ray.core import config
from revision_ray.serve import metrics
from revision_ray.serve.settings import ServeJob, is_loopback

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "configs" / "serve" / "deploy.yaml"
RAYSERVICE = ROOT / "configs" / "cluster" / "kuberay" / "rayservice.yaml"


def rayservice() -> dict:
    return next(yaml.safe_load_all(RAYSERVICE.read_text()))["spec"]


def deployed(name: str) -> dict:
    """The Serve config inside the file."""
    if name == "deploy.yaml":
        return yaml.safe_load(DEPLOY.read_text())
    return yaml.safe_load(rayservice()["serveConfigV2"])


def job_in(document: dict) -> ServeJob:
    (application,) = document["applications"]
    return config.from_mapping(ServeJob, application["args"], "args")


# --- Serve ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deploy.yaml", "rayservice.yaml"])
def test_serve_accepts_the_file_and_the_job_its_arguments(name):
    document = deployed(name)
    ServeDeploySchema.model_validate(document)
    # The schema ignores keys that it does not know, a typo among them.
    assert document.keys() <= ServeDeploySchema.model_fields.keys()
    assert (
        document["http_options"].keys()
        <= type(ServeDeploySchema(applications=[]).http_options).model_fields.keys()
    )
    job = job_in(document)
    module, _, function = document["applications"][0]["import_path"].partition(":")
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert function in {
        node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)
    }
    # Whether keys are required follows from what the job says of the address.
    assert (job.host, job.port) == (document["http_options"]["host"], document["http_options"]["port"])
    assert job.location == document["proxy_location"]
    model = job.replicas.language_model
    assert model.max_ongoing == job.engine.num_slots + job.engine.max_waiting
    assert model.max_replicas > model.min_replicas, "it scales"


def test_serve_deploy_listens_on_loopback_and_kubernetes_asks_for_keys():
    assert is_loopback(job_in(deployed("deploy.yaml")).host)
    assert not is_loopback(job_in(deployed("rayservice.yaml")).host)
    cluster = rayservice()["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        (keys,) = [each for each in container["env"] if each["name"] == "REVISION_RAY_API_KEYS"]
        assert "value" not in keys
        assert keys["valueFrom"]["secretKeyRef"]["name"] == "revision-ray-api-keys"


def test_the_cluster_of_the_rayservice_is_guarded_and_starts_no_gpu_by_itself():
    cluster = rayservice()["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "revision-ray-token"}
    assert cluster["enableInTreeAutoscaling"] is True
    with_gpu = [
        group
        for group in cluster["workerGroupSpecs"]
        if "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]
    ]
    assert [(group["minReplicas"], group["replicas"]) for group in with_gpu] == [(0, 0)]
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert cluster["rayVersion"] == pinned[1]


def test_every_replica_fits_the_pods_of_the_rayservice():
    job = job_in(deployed("rayservice.yaml"))
    sizes = {
        group["groupName"]: group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for group in rayservice()["rayClusterConfig"]["workerGroupSpecs"]
    }
    parts = job.replicas
    on_gpu = [parts.language_model, parts.image_encoder]
    assert sum(part.num_gpus for part in on_gpu) <= float(sizes["gpu"]["nvidia.com/gpu"])
    assert sum(part.num_cpus for part in on_gpu) <= float(sizes["gpu"]["cpu"])
    assert parts.ingress.num_cpus <= float(sizes["cpu"]["cpu"])


# --- metrics ----------------------------------------------------------------------------------------------

NODE = """# HELP ray_revision_ray_serve_requests_total Answered requests.
# TYPE ray_revision_ray_serve_requests_total counter
ray_revision_ray_serve_requests_total{{route="/health",status="200",WorkerId="{worker}"}} {value}
# HELP ray_node_mem_used Memory.
# TYPE ray_node_mem_used gauge
ray_node_mem_used{{ip="10.0.0.1"}} 5.0
# HELP ray_serve_deployment_queued_queries Queued.
# TYPE ray_serve_deployment_queued_queries gauge
ray_serve_deployment_queued_queries{{deployment="Ingress",WorkerId="{worker}"}} 0.0
# HELP python_info Python.
# TYPE python_info gauge
python_info{{version="3.11"}} 1.0
"""


def test_the_nodes_texts_become_one():
    """One HELP and TYPE a family, before all of its samples: Prometheus' own parser finds each sample."""
    text = metrics.relay([NODE.format(worker="a", value="3.0"), NODE.format(worker="b", value="4.0"), ""])
    assert text.count("# TYPE ray_revision_ray_serve_requests_total counter\n") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == {"ray_revision_ray_serve_requests", "ray_serve_deployment_queued_queries"}
    values = {
        sample.labels["WorkerId"]: sample.value
        for sample in families["ray_revision_ray_serve_requests"].samples
    }
    assert values == {"a": 3.0, "b": 4.0}


class Exporter(BaseHTTPRequestHandler):
    def do_GET(self):
        content = NODE.format(worker="a", value="3.0").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format, *args):
        pass


def test_a_node_that_keeps_silent_is_left_out_and_counted(monkeypatch):
    answering = HTTPServer(("127.0.0.1", 0), Exporter)
    silent = HTTPServer(("127.0.0.1", 0), Exporter)  # accepts a connection, says nothing
    closed = HTTPServer(("127.0.0.1", 0), Exporter)
    closed.server_close()
    threading.Thread(target=answering.serve_forever, daemon=True).start()
    ports = [answering.server_port, silent.server_port, closed.server_port]
    nodes = [
        {"Alive": True, "NodeManagerAddress": "127.0.0.1", "MetricsExportPort": port} for port in ports
    ] + [{"Alive": False, "NodeManagerAddress": "127.0.0.1", "MetricsExportPort": ports[0]}]
    monkeypatch.setattr(metrics.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics.ray, "nodes", lambda: nodes)
    try:
        text = asyncio.run(metrics.exposition(timeout_s=0.5))
    finally:
        answering.shutdown()
        answering.server_close()
        silent.server_close()
    assert text.count('requests_total{route="/health"') == 1
    assert 'ray_revision_ray_serve_exporters{answered="true"} 1\n' in text
    assert 'ray_revision_ray_serve_exporters{answered="false"} 2\n' in text


def test_instruments_outside_ray_do_nothing_and_fail_nobody():
    made = metrics.instruments()
    assert metrics.instruments() is made
    made.requests.inc(tags={"route": "/", "status": "200"})
    made.prompt_tokens.inc(0)
    made.queue_depth.set(float("nan"))
    made.time_to_first_token.observe(float("inf"))
    made.batch_size.observe(4, tags={"part": "image_encoder"})


@ray.remote(num_cpus=0.1)
class Recorder:
    """Records once into each of the instruments."""

    def record(self) -> None:
        for each in vars(metrics.instruments()).values():
            tags = dict.fromkeys(each.tags, "some")
            method = {"counter": "inc", "gauge": "set", "histogram": "observe"}[each.kind]
            getattr(each, method)(2, tags=tags)


@pytest.mark.slow
def test_ray_exports_every_instrument_under_the_name_that_we_say(cluster):
    """Ray exports every metric of serving under the name that we say."""
    recorder = Recorder.remote()
    ray.get(recorder.record.remote())
    end = time.monotonic() + 300  # a report interval is ten seconds; the machine may be busy
    recorded = {
        name + "_count" if kind == "histogram" else name: 1 if kind == "histogram" else 2
        for name, kind in metrics.exported().items()
    }
    while True:
        families = list(text_string_to_metric_families(asyncio.run(metrics.exposition())))
        # Applications that other tests served on this cluster may export the same names, too.
        seen = {(sample.name, sample.value) for family in families for sample in family.samples}
        if not (missing := recorded.items() - seen):
            break
        assert time.monotonic() < end, f"not exported: {sorted(missing)}"
        time.sleep(1)
    kinds = {family.name.removesuffix("_total"): family.type for family in families}
    for name, kind in metrics.exported().items():
        assert kinds[name.removesuffix("_total")] == kind
