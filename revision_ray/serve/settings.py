"""How the model is served: typed settings of every part, beside what they mean. Imports no Ray."""

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
    """How the language model generates."""

    kind: Literal["continuous", "generate"] = "continuous"
    """continuous: requests join and leave the running batch at every step. generate: batches through the
    model's own generate, for architectures whose cache the former does not know."""
    num_slots: int = 16
    """Requests that generate at once."""
    max_length: int = 2048
    """Tokens of prompt and answer together, with visual tokens; never more than the model's positions."""
    max_waiting: int = 64
    """Requests that may wait for a slot in a replica; further ones are refused."""
    max_prefill_tokens: int = 2048
    """Prompt tokens taken into one step, so that streams that run are not held up (continuous)."""
    batch_wait_s: float = 0.01
    """How long a batch waits for company (generate)."""
    piece_interval_s: float = 0.08
    """Least time between two pieces of an answer's text, times the root of the number of answers that run;
    tokens in between wait and go together, for passing a piece on takes CPU time from the model. 0: every
    token by itself."""
    token_timeout_s: float = 60.0
    """A step that takes longer fails its requests, and the replica's health check."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the weights; auto is bfloat16 on a GPU that has it and float32 on the CPU."""
    attention: str | None = None
    """Attention implementation (sdpa, flash_attention_2, eager); transformers' choice if not given."""
    num_threads: int | None = None
    """Threads of a replica on the CPU; torch's own choice if not given."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_slots", "max_length", "max_prefill_tokens", "num_threads")
        _at_least(self, 0, "max_waiting", "batch_wait_s", "piece_interval_s")
        _positive(self, "token_timeout_s")


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """What images a request may hold, and how they are encoded."""

    max_bytes: int = 20 * 2**20
    """Of one encoded image; larger ones are refused with 413."""
    max_pixels: int = 50_000_000
    """Width times height, checked in the header before a pixel is decoded (decompression bombs)."""
    max_per_request: int = 16
    """Images in one request."""
    batch_size: int = 32
    """Images that the tower takes at once."""
    batch_wait_s: float = 0.005
    """How long a batch waits for company."""
    cache_entries: int = 4096
    """Embeddings kept in a replica, by the SHA-256 of the image; 0 keeps none."""
    num_threads: int = 2
    """Images decoded at once in a replica, and torch's threads for the tower on the CPU."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_bytes", "max_pixels", "max_per_request", "batch_size", "num_threads")
        _at_least(self, 0, "batch_wait_s", "cache_entries")


@dataclass(frozen=True, kw_only=True)
class RemoteImageSettings:
    """Images that are named by their https address."""

    enabled: bool = False
    """Off: image_url takes data URIs alone. On: the server fetches from the hosts below and no other."""
    hosts: list[str] = field(default_factory=list)
    """Host names that may be fetched from. .example.org stands for every host below it; example.org:8443 is
    another port than https's own."""
    max_redirects: int = 3
    """Each is checked as the first address was."""
    timeout_s: float = 10.0
    """Of one image, redirects included."""

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
    """What one request may ask for."""

    max_body_bytes: int = 64 * 2**20
    """Of a request; larger ones are refused with 413 while they are read."""
    max_messages: int = 256
    """Messages of a conversation."""
    max_choices: int = 8
    """n: answers to one prompt."""
    max_text_characters: int = 1_000_000
    """Of all texts of a request together, before anything is tokenised."""
    max_tokens_default: int = 512
    """Tokens of an answer where the request names no max_tokens; fewer where the context ends before."""
    max_texts: int = 256
    """Inputs of one embeddings request."""
    truncate_texts: bool = False
    """Embeddings of texts that are longer than the encoder takes: cut them at their end, which the answer
    says, where a request does not ask for it (truncate_prompt_tokens: -1); off refuses them."""
    max_ongoing_per_key: int | None = None
    """Requests of one API key at once in an ingress replica; further ones are refused with 429."""
    body_timeout_s: float = 60.0
    """For reading a request."""
    request_timeout_s: float = 300.0
    """Of a whole request, its stream included."""
    image_timeout_s: float = 120.0
    """For encoding an image; a replica that died must have been replaced by then."""
    first_token_timeout_s: float = 120.0
    """For the wait in the queue and the first token."""
    max_attempts: int = 3
    """How often a request is put to a replica when replicas die before its first token."""

    def __post_init__(self) -> None:
        _at_least(
            self, 1, "max_body_bytes", "max_messages", "max_choices", "max_text_characters",
            "max_tokens_default", "max_texts", "max_ongoing_per_key", "max_attempts",
        )  # fmt: skip
        _positive(self, "body_timeout_s", "request_timeout_s", "image_timeout_s", "first_token_timeout_s")


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """Replicas of one part of the application. Above min_replicas it scales with its load."""

    min_replicas: int = 1
    """Replicas that always run."""
    max_replicas: int = 1
    """Replicas that run under load."""
    num_cpus: float = 0.1
    """CPUs that Ray sets aside for a replica; a fraction lets small machines run every part."""
    num_gpus: float = 0.0
    """GPUs (or a fraction of one) for a replica."""
    max_ongoing: int = 64
    """Requests that a replica works on at once."""
    max_queued: int = 128
    """Requests that may wait outside the replicas, in each of their callers; further ones are refused with
    503. -1 sets no bound."""
    target_ongoing: float = 16.0
    """Replicas are added above, and removed below, this many requests a replica."""

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
    """How many replicas each part has and what they ask of the cluster."""

    # Two: while one is replaced, connections find the other.
    ingress: ReplicaSettings = field(
        default_factory=lambda: ReplicaSettings(min_replicas=2, max_replicas=2, max_ongoing=256)
    )
    """HTTP, validation, streaming."""
    image_encoder: ReplicaSettings = field(
        default_factory=lambda: ReplicaSettings(num_cpus=0.2, max_ongoing=128)
    )
    """Images to embeddings."""
    language_model: ReplicaSettings = field(
        default_factory=lambda: ReplicaSettings(
            num_cpus=0.8, max_ongoing=80, max_queued=64, target_ongoing=12.0
        )
    )
    """Prompts to answers. max_ongoing is best the engine's num_slots + max_waiting."""
    text_encoder: ReplicaSettings = field(default_factory=ReplicaSettings)
    """The dual encoder behind /v1/embeddings."""
    upscale_delay_s: float = 5.0
    """Load must last this long before replicas are added."""
    downscale_delay_s: float = 120.0
    """Quiet must last this long before replicas are removed."""
    surge_percent: int = 0
    """Further replicas, in percent, that a rolling update starts before it stops old ones; they need their
    resources. At 0 an old one goes first: with a single one, requests wait until the new one has loaded."""
    drain_timeout_s: float = 60.0
    """How long a replica that is replaced or removed may go on with what it has accepted."""
    health_period_s: float = 5.0
    """Between two health checks of a replica."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "upscale_delay_s", "downscale_delay_s", "surge_percent")
        _positive(self, "drain_timeout_s", "health_period_s")


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """Serve a trained model behind an OpenAI-compatible API: chat with images, embeddings, metrics, drift,
    and a chat page."""

    model: str = MISSING
    """Folder or URI of the model, as jobs/finetune.py or jobs/export.py wrote it; every node must see it.
    From an object store it is copied once to each node (REVISION_RAY_CACHE)."""
    name: str = ""
    """The model's id in the API; by default the folder's name."""
    host: str = "127.0.0.1"
    """Address that HTTP listens on. Any but a loopback address asks for API keys."""
    port: int = 8000
    """Port that HTTP listens on."""
    location: Literal["HeadOnly", "EveryNode"] = "HeadOnly"
    """HTTP on this machine alone, or on every node that runs a replica, for a load balancer."""
    application: str = "revision_ray"
    """Name of the Serve application; one cluster can run several, each at a port of its own cluster."""
    api_keys_env: str = "REVISION_RAY_API_KEYS"
    """Environment variable that holds the API keys, separated by commas. Unset or empty asks for none, which
    only a loopback host may."""
    alignment: str = ""
    """Directory of the fit that served images are compared with (drift), and that aligns texts in
    /v1/embeddings. Without one there is neither."""
    fits: list[str] = field(default_factory=list)
    """Further fits, of other domains: drift says when one of them is nearer."""
    encoder: EncoderConfig | None = None
    """The dual encoder whose text tower serves /v1/embeddings; without one the route takes images alone."""
    page: bool = True
    """A chat page at /."""
    cors_origins: list[str] = field(default_factory=list)
    """Origins of web pages elsewhere that may call the API from a browser (CORS), such as
    https://app.example.org or http://localhost:3000; "*" stands for every page. None by default."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Generation."""
    images: ImageSettings = field(default_factory=ImageSettings)
    """Images of a request."""
    remote_images: RemoteImageSettings = field(default_factory=RemoteImageSettings)
    """Images by https address."""
    limits: RequestLimits = field(default_factory=RequestLimits)
    """Bounds of a request."""
    replicas: Replicas = field(default_factory=Replicas)
    """Replicas and resources."""

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
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may mean anything


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
