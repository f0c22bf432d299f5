"""Settings of the serve job and of each part of the application. Imports no Ray."""

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Literal

from revision_ray.core import storage
from revision_ray.core.config import MISSING
from revision_ray.core.errors import ConfigError
from revision_ray.encode.encoder import EncoderConfig

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of text generation."""

    kind: Literal["continuous", "generate"] = "continuous"
    """continuous: requests join and leave the running batch at every step. generate: batches through the
    model's own generate, for architectures that continuous does not support."""
    num_slots: int = 16
    """Largest number of requests that generate at once in a replica."""
    max_length: int = 2048
    """Most tokens of prompt and answer together, visual tokens included; the model's number of positions
    limits it further."""
    max_waiting: int = 64
    """Largest number of requests that wait for a slot in a replica; further ones are refused."""
    max_prefill_tokens: int = 2048
    """continuous: most prompt tokens taken into one step, so that running streams are not delayed."""
    batch_wait_s: float = 0.01
    """generate: seconds that a batch waits for more requests."""
    piece_interval_s: float = 0.08
    """Shortest time between two pieces of an answer's text, in seconds, times the square root of the number
    of running answers. Tokens in between are sent together, because sending a piece takes CPU time from the
    model. 0 sends every token by itself."""
    token_timeout_s: float = 60.0
    """Seconds after which a step fails its requests, and the replica's health check."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Data type of the weights; auto is bfloat16 on a GPU that has it and float32 on the CPU."""
    attention: str | None = None
    """Attention implementation (sdpa, flash_attention_2, eager); transformers chooses if not given."""
    num_threads: int | None = None
    """CPU threads of a replica; torch chooses if not given."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_slots", "max_length", "max_prefill_tokens", "num_threads")
        _at_least(self, 0, "max_waiting", "batch_wait_s", "piece_interval_s")
        _positive(self, "token_timeout_s")


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Limits on the images of a request, and settings of the image encoder."""

    max_bytes: int = 20 * 2**20
    """Most bytes of one encoded image; larger ones are refused with 413."""
    max_pixels: int = 50_000_000
    """Most pixels (width times height) of an image, checked in the header before decoding (decompression
    bombs)."""
    max_per_request: int = 16
    """Most images in one request."""
    batch_size: int = 32
    """Most images that the image tower takes at once."""
    batch_wait_s: float = 0.005
    """Seconds that a batch waits for more images."""
    cache_entries: int = 4096
    """Embeddings cached in a replica, by the SHA-256 of the image; 0 caches none."""
    num_threads: int = 2
    """Images decoded at once in a replica, and torch's threads for the tower on the CPU."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_bytes", "max_pixels", "max_per_request", "batch_size", "num_threads")
        _at_least(self, 0, "batch_wait_s", "cache_entries")


@dataclass(frozen=True, kw_only=True)
class RemoteImageSettings:
    """Settings for images that a request names by https address."""

    enabled: bool = False
    """false: image_url takes only data URIs. true: the server also fetches images from the hosts below."""
    hosts: list[str] = field(default_factory=list)
    """Host names that images may be fetched from. .example.org allows every host below example.org;
    example.org:8443 allows that port instead of 443."""
    max_redirects: int = 3
    """Most redirects of one image; the address of each is checked like the first."""
    timeout_s: float = 10.0
    """Seconds in which one image must be fetched, redirects included."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "max_redirects")
        _positive(self, "timeout_s")
        if self.enabled and not self.hosts:
            raise ConfigError(
                "remote_images.enabled is on, but remote_images.hosts is empty; name the hosts that images "
                "may be fetched from, or leave remote images off"
            )


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Limits of one request."""

    max_body_bytes: int = 64 * 2**20
    """Most bytes of a request body; larger ones are refused with 413 while they are read."""
    max_messages: int = 256
    """Most messages of a conversation."""
    max_choices: int = 8
    """Largest n, the number of answers to one prompt."""
    max_text_characters: int = 1_000_000
    """Most characters of all texts of a request together, checked before they are tokenised."""
    max_tokens_default: int = 512
    """Most tokens of an answer where the request gives no max_tokens; fewer where the context ends before."""
    max_texts: int = 256
    """Most inputs of one embeddings request."""
    truncate_texts: bool = False
    """Embeddings of texts longer than the encoder takes. true: cut off their end, and say so in the answer.
    false: refuse them, unless the request sets truncate_prompt_tokens to -1."""
    max_ongoing_per_key: int | None = None
    """Most requests of one API key at once in an ingress replica; further ones are refused with 429. No
    limit if not given."""
    body_timeout_s: float = 60.0
    """Seconds in which the body of a request must arrive."""
    request_timeout_s: float = 300.0
    """Seconds that a whole request may take, its stream included."""
    image_timeout_s: float = 120.0
    """Seconds that encoding an image may take, including the replacement of a replica that died."""
    first_token_timeout_s: float = 120.0
    """Seconds that the wait in the queue and the first token may take together."""
    max_attempts: int = 3
    """How often a request is sent to a replica when replicas die before its first token."""

    def __post_init__(self) -> None:
        _at_least(
            self, 1, "max_body_bytes", "max_messages", "max_choices", "max_text_characters",
            "max_tokens_default", "max_texts", "max_ongoing_per_key", "max_attempts",
        )  # fmt: skip
        _positive(self, "body_timeout_s", "request_timeout_s", "image_timeout_s", "first_token_timeout_s")


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """Number, resources and queues of the replicas of one part; above min_replicas, load decides."""

    min_replicas: int = 1
    """Replicas that always run."""
    max_replicas: int = 1
    """Most replicas that run under load."""
    num_cpus: float = 0.1
    """CPUs that Ray reserves for a replica; a fraction lets small machines run every part."""
    num_gpus: float = 0.0
    """GPUs, or a fraction of one, that Ray reserves for a replica."""
    max_ongoing: int = 64
    """Most requests that a replica works on at once."""
    max_queued: int = 128
    """Most requests that wait for a replica in each caller; further ones are refused with 503. -1 sets no
    limit."""
    target_ongoing: float = 16.0
    """Requests per replica above which replicas are added, and below which they are removed."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "min_replicas", "max_ongoing")
        _at_least(self, 0, "num_cpus", "num_gpus")
        _at_least(self, -1, "max_queued")
        _positive(self, "target_ongoing")
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}; raise it"
            )


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """Replicas of each part of the application, and how they are scaled and replaced."""

    # Two, so that connections reach one while the other is replaced.
    ingress: ReplicaSettings = field(
        default_factory=lambda: ReplicaSettings(min_replicas=2, max_replicas=2, max_ongoing=256)
    )
    """Replicas that handle HTTP, validation and streaming."""
    image_encoder: ReplicaSettings = field(
        default_factory=lambda: ReplicaSettings(num_cpus=0.2, max_ongoing=128)
    )
    """Replicas that encode images."""
    language_model: ReplicaSettings = field(
        default_factory=lambda: ReplicaSettings(
            num_cpus=0.8, max_ongoing=80, max_queued=64, target_ongoing=12.0
        )
    )
    """Replicas that generate answers. Set max_ongoing to the engine's num_slots + max_waiting."""
    text_encoder: ReplicaSettings = field(default_factory=ReplicaSettings)
    """Replicas that encode texts for /v1/embeddings."""
    upscale_delay_s: float = 5.0
    """Seconds that high load must last before replicas are added."""
    downscale_delay_s: float = 120.0
    """Seconds that low load must last before replicas are removed."""
    surge_percent: int = 0
    """Extra replicas, in percent, that a rolling update starts before it stops old ones; they need resources
    of their own. At 0 an old replica is stopped first: if it is the only one, requests wait until the new
    one has loaded."""
    drain_timeout_s: float = 60.0
    """Seconds in which a replica that is replaced or removed may finish the requests it has accepted."""
    health_period_s: float = 5.0
    """Seconds between two health checks of a replica."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "upscale_delay_s", "downscale_delay_s", "surge_percent")
        _positive(self, "drain_timeout_s", "health_period_s")


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """Serve a trained model behind an OpenAI-compatible API: chat with images, embeddings, metrics, drift,
    and a chat page."""

    model: str = MISSING
    """Folder or URI of the model, written by jobs/finetune.py or jobs/export.py; every node must be able to
    read it. A model on an object store is copied once to each node (REVISION_RAY_CACHE)."""
    name: str = ""
    """The model's id in the API; the folder's name if empty."""
    host: str = "127.0.0.1"
    """Address that HTTP listens on. API keys are required unless it is a loopback address."""
    port: int = 8000
    """Port that HTTP listens on."""
    location: Literal["HeadOnly", "EveryNode"] = "HeadOnly"
    """HeadOnly: HTTP on the head node only. EveryNode: on every node that runs a replica, for a load
    balancer."""
    application: str = "revision_ray"
    """Name of the Serve application."""
    api_keys_env: str = "REVISION_RAY_API_KEYS"
    """Environment variable with the API keys, separated by commas. If it is unset or empty, no key is
    required; this is allowed only on a loopback host."""
    alignment: str = ""
    """Directory of the fit that served images are compared with (drift), and that aligns texts in
    /v1/embeddings. Empty: neither is done."""
    fits: list[str] = field(default_factory=list)
    """Directories of fits of other domains; the drift report says when served images are nearer to one."""
    encoder: EncoderConfig | None = None
    """The dual encoder whose text tower serves /v1/embeddings; if not given, the route takes only images."""
    page: bool = True
    """Whether to serve a chat page at /."""
    cors_origins: list[str] = field(default_factory=list)
    """Origins of other web pages that may call the API from a browser (CORS), such as
    https://app.example.org or http://localhost:3000; "*" allows every page. None by default."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Settings of text generation."""
    images: ImageSettings = field(default_factory=ImageSettings)
    """Limits on images, and settings of the image encoder."""
    remote_images: RemoteImageSettings = field(default_factory=RemoteImageSettings)
    """Settings for images named by https address."""
    limits: RequestLimits = field(default_factory=RequestLimits)
    """Limits of one request."""
    replicas: Replicas = field(default_factory=Replicas)
    """Replicas of each part, and their resources."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ConfigError(f"port={self.port}: expected 1 to 65535")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"cors_origins: {origin} is no origin; expected SCHEME://HOST or SCHEME://HOST:PORT as "
                    "browsers send it, in small letters and without a path, or *"
                )

    @property
    def model_id(self) -> str:
        return self.name or storage.name_of(self.model)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a host name may resolve to any address


def _at_least(settings: object, bound: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= bound:  # `not >=` refuses NaN too
            raise ConfigError(f"{name}={value}: expected at least {bound}")


def _positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not value > 0:
            raise ConfigError(f"{name}={value}: expected more than 0")
