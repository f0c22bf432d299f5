"""Counters, gauges and timers of the server, and their exposition for Prometheus.

Every process records into Ray's metrics; each node's agent exports them over HTTP, with `ray_` before the
name and tags of its own (node, worker). A value is there after at most one report interval (10 s by default,
`metrics_report_interval_ms`); gauges of a process that ended are gone two intervals later. Ray reports a
histogram's buckets exactly and its sum from the middles of the buckets: take quantiles, not means. Outside a
Ray process the instruments do nothing.
"""

import asyncio
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import aiohttp
import ray

from revision_ray.core.observe import PREFIX, Counter, Gauge, Histogram, instruments_in

SERVE_PREFIX = PREFIX + "serve_"
# Families that `exposition` hands on: the server's, and Ray Serve's own (replicas, queues, latencies).
RELAYED = ("ray_" + SERVE_PREFIX, "ray_serve_")
_TIMEOUT_S = 2.0

_SECONDS = [0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60]
_TOKEN_SECONDS = [
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.2,
    0.5,
    1,
    5,
]
_BATCH_SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256]


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """All instruments of the server; a process records into those that it knows about."""

    requests: Counter
    """Answered requests. Tags: route (the path's pattern, never the path), status (of HTTP)."""
    rejected: Counter
    """Requests that were refused. Tag: cause (one word: queue_full, body_size, image, key, ...)."""
    queue_depth: Gauge
    """Prompts that wait for a slot of the language model."""
    running: Gauge
    """Prompts that have one."""
    batch_size: Histogram
    """Rows that were computed together. Tag: part (language_model, image_encoder, text_encoder)."""
    time_to_first_token: Histogram
    """Seconds from a prompt's way to the language model to the first token, the queue included."""
    time_per_output_token: Histogram
    """Seconds a token, from the first to the last of an answer: one observation an answer."""
    image_cache: Counter
    """Images that were looked up by content. Tag: result (hit, miss)."""
    prompt_tokens: Counter
    """Tokens of prompts, visual ones included."""
    completion_tokens: Counter
    """Tokens of answers."""
    visual_tokens: Counter
    """Tokens that stood for images."""
    drift_centroid_distance: Gauge
    """Distance of the served images' centroid from the fit's image centroid."""
    drift_sampling_floor: Gauge
    """The distance to expect from sampling alone, were the images the fit's."""
    drift_trace_ratio: Gauge
    """Trace of the served images over the fit's image trace."""
    drift_images: Gauge
    """Served images that the two rest on."""


@functools.cache
def instruments() -> Instruments:
    """The instruments of this process, made once."""
    return Instruments(
        requests=Counter(SERVE_PREFIX + "requests_total", "Answered requests.", ("route", "status")),
        rejected=Counter(
            SERVE_PREFIX + "rejected_total", "Requests that were refused, by cause.", ("cause",)
        ),
        queue_depth=Gauge(
            SERVE_PREFIX + "queue_depth", "Prompts that wait for a slot of the language model."
        ),
        running=Gauge(SERVE_PREFIX + "running", "Prompts that have a slot of the language model."),
        batch_size=Histogram(
            SERVE_PREFIX + "batch_size", "Rows that were computed together.", _BATCH_SIZES, ("part",)
        ),
        time_to_first_token=Histogram(
            SERVE_PREFIX + "time_to_first_token_seconds",
            "From a prompt's way to the model to its first token.",
            _SECONDS,
        ),
        time_per_output_token=Histogram(
            SERVE_PREFIX + "time_per_output_token_seconds",
            "A token, from the first to the last of an answer.",
            _TOKEN_SECONDS,
        ),
        image_cache=Counter(
            SERVE_PREFIX + "image_cache_total", "Images that were looked up by content.", ("result",)
        ),
        prompt_tokens=Counter(
            SERVE_PREFIX + "prompt_tokens_total", "Tokens of prompts, visual ones included."
        ),
        completion_tokens=Counter(SERVE_PREFIX + "completion_tokens_total", "Tokens of answers."),
        visual_tokens=Counter(SERVE_PREFIX + "visual_tokens_total", "Tokens that stood for images."),
        drift_centroid_distance=Gauge(
            SERVE_PREFIX + "drift_centroid_distance", "Served images' centroid to the fit's image centroid."
        ),
        drift_sampling_floor=Gauge(
            SERVE_PREFIX + "drift_sampling_floor",
            "Distance to expect from sampling alone, were the images the fit's.",
        ),
        drift_trace_ratio=Gauge(
            SERVE_PREFIX + "drift_trace_ratio", "Trace of the served images over the fit's image trace."
        ),
        drift_images=Gauge(SERVE_PREFIX + "drift_images", "Served images that the drift rests on."),
    )


def exported() -> dict[str, str]:
    """Name in the exposition -> counter, gauge or histogram, for each of our families."""
    return {each.exported: each.kind for each in instruments_in(instruments())}


async def exposition(timeout_s: float = _TIMEOUT_S) -> str:
    """Our families and Ray Serve's from the exporter of every node that is alive, in Prometheus' text format.

    A node that does not answer within `timeout_s` is left out, and counted in
    `ray_revision_ray_serve_exporters{answered="false"}`.
    """
    nodes = await asyncio.to_thread(ray.nodes) if ray.is_initialized() else []
    urls = [
        _url(node["NodeManagerAddress"], node["MetricsExportPort"])
        for node in nodes
        if node["Alive"] and node["MetricsExportPort"] > 0
    ]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:
        texts = await asyncio.gather(*(_fetch(session, url) for url in urls))
    answered = sum(text is not None for text in texts)
    name = "ray_" + SERVE_PREFIX + "exporters"
    return relay(text for text in texts if text is not None) + (
        f"# HELP {name} Nodes whose metrics are in this answer, and those that kept silent.\n"
        f"# TYPE {name} gauge\n"
        f'{name}{{answered="true"}} {answered}\n{name}{{answered="false"}} {len(texts) - answered}\n'
    )


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}/metrics" if ":" in host else f"http://{host}:{port}/metrics"


async def _fetch(session: aiohttp.ClientSession, url: str) -> str | None:
    try:
        async with session.get(url, allow_redirects=False) as response:
            return await response.text() if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, UnicodeDecodeError):
        return None


def relay(texts: Iterable[str]) -> str:
    """Return the expositions `texts` as one, with the families named in RELAYED alone.

    Each has one HELP and one TYPE before all of its samples, as the format demands.
    """
    # Lines are passed on as Ray wrote them. prometheus_client's parser and writer would make an object of
    # every sample, and declare counters whose names do not end in _total under other names.
    heads: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                _, keyword, family, *_ = line.split(" ", 3)
                if family.startswith(RELAYED):
                    heads.setdefault(family, {}).setdefault(keyword, line)
            elif family.startswith(RELAYED) and line.startswith(family):
                samples.setdefault(family, []).append(line)
    lines: list[str] = []
    for family, head in heads.items():
        if family in samples:
            lines += [head[keyword] for keyword in ("HELP", "TYPE") if keyword in head] + samples[family]
    return "".join(f"{line}\n" for line in lines)
