"""Build the Serve application from its deployments; run it until it is stopped, or for `serve deploy`."""

import glob
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from transformers import AutoTokenizer

from revision_ray.align.alignment import load_alignment
from revision_ray.core import cluster, config, storage
from revision_ray.core.errors import AlignmentError, ConfigError, DataError, shorten
from revision_ray.encode import checkpoints
from revision_ray.model import ReVisionConfig
from revision_ray.model.ending import unknown_ends
from revision_ray.serve import proxy
from revision_ray.serve.calls import RETRY_AFTER_S
from revision_ray.serve.drift import Drift, DriftMonitor
from revision_ray.serve.http import Ingress, key_digests
from revision_ray.serve.prompt import Prompter, facts_of
from revision_ray.serve.replicas import ImageEncoder, LanguageModel, TextEncoder
from revision_ray.serve.settings import Replicas, ReplicaSettings, ServeJob, is_loopback

log = logging.getLogger(__name__)

# Logging when run by the job; with `serve deploy`, the Serve file sets it.
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
_PROXY_SETTING = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
_MONITOR = ReplicaSettings(num_cpus=0.05, max_ongoing=100, max_queued=1000)
# Number of times that Serve starts a replica that cannot load its model before the deployment fails.
_ATTEMPTS_TO_START = 3


def run_serve(job: ServeJob) -> str:
    """Serve the model at job.host:job.port until SIGINT or SIGTERM; then finish the accepted requests.

    Raises:
        ConfigError: the model or the port cannot be used, or API keys are missing.
        AlignmentError: a fit cannot be used.
    """
    digests = _digests(job, loopback=is_loopback(job.host))
    job = checked(job)
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        _check_port(job.host, job.port)
        os.environ.setdefault(_PROXY_SETTING, proxy.IMPORT_PATH)  # read by the proxy, which inherits it
    cluster.connect()
    log.info("starting the replicas of %s; each loads its part of the model", job.model_id)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    stopped = threading.Event()
    shared = _serve_runs(job)
    try:
        built = application(job, digests)
        if not shared:
            http = {"host": job.host, "port": job.port}
            serve.start(proxy_location=job.location, http_options=http, logging_config=QUIET)
        handle = serve.run(built, name=job.application, route_prefix="/", logging_config=QUIET)
        host = f"[{job.host}]" if ":" in job.host else job.host
        page = "/" if job.page else "none"
        sys.stdout.write(f"Serving {job.model_id} at http://{host}:{job.port}  (page: {page}, API: /v1)\n")
        sys.stdout.flush()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        stopped.wait()
        _drain(handle, job.replicas.drain_timeout_s)
    finally:
        if shared:  # others' applications run on
            serve.delete(job.application)
        else:
            serve.shutdown()
    return "stopped"


def build(args: dict) -> serve.Application:
    """Return the application for `serve deploy`; `args` are the keys of configs/serve.yaml.

    Another part of the Serve file sets the address to listen on. API keys are therefore required unless
    `args` has a `host` that is a loopback address.

    Raises:
        ConfigError: the model cannot be used, or API keys are missing.
        AlignmentError: a fit cannot be used.
    """
    job = config.from_mapping(ServeJob, args, "args")
    return application(checked(job), _digests(job, loopback="host" in args and is_loopback(job.host)))


def application(job: ServeJob, digests: Sequence[str]) -> serve.Application:
    """Return the application of a checked job: all deployments, each bound to those that it calls."""
    replicas = job.replicas
    facts = facts_of(job)
    monitor = image_encoder = text_encoder = None
    if job.alignment:
        monitor = _deployed(DriftMonitor, "Monitor", _MONITOR, replicas).bind(job.alignment, job.fits)
    if facts.image_input:
        image_encoder = _deployed(ImageEncoder, "ImageEncoder", replicas.image_encoder, replicas).bind(
            job.model, job.images, monitor
        )
    if job.encoder is not None:
        text_encoder = _deployed(TextEncoder, "TextEncoder", replicas.text_encoder, replicas).bind(
            job.encoder, job.alignment
        )
    language_model = _deployed(LanguageModel, "LanguageModel", replicas.language_model, replicas).bind(
        job.model, job.engine
    )
    return _deployed(serve.ingress()(Ingress), "Ingress", replicas.ingress, replicas).bind(
        job, facts, tuple(digests), language_model, image_encoder, text_encoder, monitor
    )


def _deployed(part_class: Any, name: str, part: ReplicaSettings, replicas: Replicas) -> Any:
    """Return `part_class` as a Serve deployment with the replica settings `part`."""
    number: dict[str, Any] = {"num_replicas": part.min_replicas}
    if part.max_replicas > part.min_replicas:
        number = {"autoscaling_config": _autoscaling(part, replicas)}
    return serve.deployment(
        part_class,
        name=name,
        ray_actor_options={"num_cpus": part.num_cpus, "num_gpus": part.num_gpus},
        max_ongoing_requests=part.max_ongoing,
        max_queued_requests=part.max_queued,
        # Answer of the proxy when too many requests wait for the ingress itself.
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_timeout_s=replicas.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=replicas.health_period_s,
        max_constructor_retry_count=_ATTEMPTS_TO_START,
        max_surge_percent=replicas.surge_percent,
        **number,
    )


def _autoscaling(part: ReplicaSettings, replicas: Replicas) -> AutoscalingConfig:
    # Measure load at least twice per delay. Serve's default is 10 s, and it warns about any other value.
    interval_s = min(10.0, max(0.5, replicas.upscale_delay_s / 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=part.min_replicas,
            max_replicas=part.max_replicas,
            target_ongoing_requests=part.target_ongoing,
            upscale_delay_s=replicas.upscale_delay_s,
            downscale_delay_s=replicas.downscale_delay_s,
            metrics_interval_s=interval_s,
            look_back_period_s=3 * interval_s,
        )


def _digests(job: ServeJob, *, loopback: bool) -> tuple[str, ...]:
    """Return the SHA-256 digests of the API keys; the keys themselves are not passed on.

    Raises:
        ConfigError: there are no keys, and the host is not a loopback address.
    """
    digests = key_digests(os.environ.get(job.api_keys_env, ""))
    if not digests and not loopback:
        raise ConfigError(
            f"others than this machine may reach the server, and the environment variable {job.api_keys_env} "
            "holds no API keys; set it (several keys are separated by commas), or say host: 127.0.0.1 if "
            "nobody else can"
        )
    return digests


def checked(job: ServeJob) -> ServeJob:
    """Check the model and the fits of a job, and return the job with absolute paths.

    Raises:
        ConfigError: the model cannot be served.
        AlignmentError: a fit is missing, or belongs to another encoder than the model.
    """
    job = replace(job, model=storage.absolute(job.model))
    kind = _model_type(job.model)
    if kind != ReVisionConfig.model_type:
        raise ConfigError(
            f"model={job.model}: {f'its model_type is {kind}' if kind else 'no model there'}; name a folder "
            "that jobs/finetune.py or jobs/export.py wrote"
        )
    try:
        folder = storage.local_copy(job.model)
        model, facts = ReVisionConfig.from_pretrained(folder), facts_of(job)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model={job.model}: is damaged or not complete ({shorten(error)}); save it again"
        ) from error
    # Checked here, because an error in a Serve replica would come with its trace.
    checkpoints.tensor_names(sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))))
    Prompter(tokenizer, facts.image_token_id, facts.num_visual_tokens)  # has a chat template
    if warning := unknown_ends(folder):
        log.warning("model=%s: %s", job.model, warning)
    if job.alignment:
        fit = load_alignment(job.alignment)
        expected = (model.alignment or {}).get("image_fingerprint")
        found = fit.image_encoder.fingerprint
        if fit.embedding_dim != model.embedding_dim or (expected and found and expected != found):
            raise AlignmentError(
                f"alignment={job.alignment}: was fitted on {fit.image_encoder.name} with embedding_dim "
                f"{fit.embedding_dim}, the model takes {model.embedding_dim} of another encoder or size; "
                "name the fit that the model was trained with"
            )
        Drift(fit, [load_alignment(uri) for uri in job.fits])
    elif job.fits:
        raise ConfigError("fits are compared with the model's own; name it as alignment")
    encoder = job.encoder and replace(
        job.encoder,
        **{
            name: os.path.abspath(value)
            for name in ("model", "pretrained", "text_model")
            if (value := getattr(job.encoder, name)) and os.path.exists(value)
        },
    )
    return replace(
        job,
        name=job.model_id,
        encoder=encoder,
        alignment=_absolute(job.alignment),
        fits=[_absolute(uri) for uri in job.fits],
    )


def _model_type(model: str) -> str | None:
    """Return the model_type in the folder's config.json, or None if there is none."""
    try:
        document = storage.read_json(storage.join(model, "config.json"))
    except DataError:
        return None
    return document.get("model_type") if isinstance(document, dict) else None


def _absolute(uri: str) -> str:
    return storage.absolute(uri) if uri else uri


def _check_port(host: str, port: int) -> None:
    """Raise ConfigError if the port cannot be used; Serve itself says so only a minute later, in an actor."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"host={host} port={port}: cannot listen there ({error.strerror or error}); choose another port"
        ) from error


def _serve_runs(job: ServeJob) -> bool:
    """Return whether Serve already runs on this cluster, at the job's host and port.

    Raises:
        ConfigError: it listens at another address; Serve does not change the address while it runs.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return False
    running = client.http_config
    if (running.host, running.port) != (job.host, job.port):
        raise ConfigError(
            f"Serve runs on this cluster already and listens at {running.host}:{running.port}, not at "
            f"{job.host}:{job.port}; say so with host and port, or shut it down (serve shutdown)"
        )
    return True


def _drain(handle: DeploymentHandle, timeout_s: float) -> None:
    """Make the ingress replicas refuse further requests, and wait for those accepted, at most `timeout_s`."""
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        inside = handle.broadcast("drain").results(timeout_s=10, return_exceptions=True)
        if not sum(number for number in inside if isinstance(number, int)):
            return
        time.sleep(0.2)
