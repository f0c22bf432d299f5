"""The server under load beside one plain process that calls generate for one request at a time.

    python -m benchmarks.serve [repeats=3] [tokens=32] [models=demo,large] [clients=1,4,16,64] [threads=2]

Random weights: a language model as small as the demo's, where the way to it is measured, and one of 99 M
parameters, where the model is. Both servers run at the same time and take turns with the same requests over
loopback. A client asks again when it has its answer. Every request holds about 100 tokens and a picture of
its own, and is answered greedily with exactly `tokens` tokens. Ours streams; the plain process
(benchmarks/plain_server.py) does not, so its first token comes with its last. Ours is `jobs/serve.py
configs/serve.yaml`, unchanged but for engine.num_threads=`threads`, which the plain process has as well.
"""

import asyncio
import base64
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from benchmarks.chat_models import DEMO, LARGE, WORDS, write_model
from benchmarks.processes import free_port, running

SIZES = {"demo": DEMO, "large": LARGE}
NAMES = {"demo": "demo-sized model", "large": "99 M model"}
# Every client asks at least once, and a few are enough where clients do not wait for each other.
NUM_REQUESTS = {1: 6, 4: 12, 16: 32, 64: 64}
# So many clients wait minutes for the plain process: once must do.
REPEATED_UP_TO = 16
NUM_PAIRS = 6


@dataclass(frozen=True, kw_only=True)
class Settings:
    repeats: int
    tokens: int
    models: list[str]
    clients: list[int]
    threads: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Of one request: seconds to the first token and to the last, and how many tokens."""

    first_s: float
    last_s: float
    num_tokens: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Round:
    """Answers that clients got side by side, and the seconds that it took."""

    answers: list[Answer]
    seconds: float

    @property
    def rate(self) -> float:
        return len(self.answers) / self.seconds


# --- requests -----------------------------------------------------------------------------------------------


def request_of(number: int, tokens: int) -> dict[str, Any]:
    """About 100 tokens with a picture; none of them is like another, so that no cache knows it."""
    random = np.random.default_rng(number)
    encoded = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(encoded, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": " ".join(random.choice(WORDS, random.integers(80, 112)))},
    ]
    return {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], *, whole: bool = False
) -> Answer:
    """The answer to `body`, streamed where the server streams and it is not asked for as a `whole`."""
    if whole:
        body = {name: value for name, value in body.items() if not name.startswith("stream")}
    content = json.dumps(body).encode()
    start = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    async with session.post(f"{url}/v1/chat/completions", data=content, headers=headers) as response:
        if response.status != 200:
            raise RuntimeError(f"{url}: {response.status} {await response.text()}")
        if response.content_type == "application/json":
            said = await response.json()
            first_s = last_s = time.perf_counter() - start
            text = said["choices"][0]["message"]["content"]
        else:
            first_s = last_s = 0.0
            said, text = {}, ""
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                said = event if event.get("usage") or "error" in event else said
                if piece := "".join(
                    choice["delta"].get("content", "") for choice in event.get("choices", [])
                ):
                    last_s = time.perf_counter() - start
                    first_s, text = first_s or last_s, text + piece
    if "usage" not in said:
        raise RuntimeError(f"{url}: the stream ends with {said}")
    num_tokens = said["usage"]["completion_tokens"]
    if num_tokens != body["max_tokens"]:
        raise RuntimeError(f"{url}: {num_tokens} tokens, expected {body['max_tokens']}")
    return Answer(first_s=first_s, last_s=last_s, num_tokens=num_tokens, text=text)


async def load(
    session: aiohttp.ClientSession, url: str, bodies: Sequence[dict[str, Any]], clients: int
) -> Round:
    """The answers to `bodies`, asked by so many `clients` at once."""
    waiting, answers = iter(bodies), []

    async def client() -> None:
        for body in waiting:
            answers.append(await ask(session, url, body))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Round(answers=answers, seconds=time.perf_counter() - start)


# --- servers and figures ------------------------------------------------------------------------------------


@contextmanager
def both(model: Path, folder: Path, threads: int) -> Iterator[tuple[str, str]]:
    """Addresses of our server and of the plain one, both serving `model`."""
    ours, plain = free_port(), free_port()
    serve = ["jobs/serve.py", "configs/serve.yaml", f"model={model}", f"port={ours}"]
    serve += [f"engine.num_threads={threads}"]
    with ExitStack() as stack:
        yield (
            stack.enter_context(running(serve, ours, folder, {"RAY_TMPDIR": str(folder)})),
            stack.enter_context(
                running(
                    ["benchmarks/plain_server.py", str(model), str(plain)],
                    plain,
                    folder,
                    {"OMP_NUM_THREADS": str(threads)},
                )
            ),
        )


async def compared(name: str, ours: str, plain: str, settings: Settings) -> dict[str, str]:
    """Every figure of one model, by its label."""
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        fresh = (request_of(number, settings.tokens) for number in range(1_000_000))
        for url in (ours, plain):
            await load(session, url, [next(fresh) for _ in range(4)], 2)
        figures = await one_by_one(session, name, ours, plain, fresh, settings.repeats)
        for clients in settings.clients:
            found: dict[str, list[Round]] = {ours: [], plain: []}
            for repeat in range(settings.repeats if clients <= REPEATED_UP_TO else 1):
                bodies = [next(fresh) for _ in range(NUM_REQUESTS.get(clients, clients))]
                for url in (ours, plain) if repeat % 2 == 0 else (plain, ours):
                    found[url].append(await load(session, url, bodies, clients))
            label = f"{name}, {clients} client{'s' * (clients > 1)}"
            figures |= under_load(label, found[ours], found[plain])
    return figures


async def one_by_one(
    session: aiohttp.ClientSession,
    name: str,
    ours: str,
    plain: str,
    fresh: Iterator[dict[str, Any]],
    repeats: int,
) -> dict[str, str]:
    """Whole answers to one client, each request put to both servers in turn."""
    ratios, equal = [], []
    for _ in range(repeats):
        seconds: dict[str, list[float]] = {ours: [], plain: []}
        for _ in range(NUM_PAIRS):
            body = next(fresh)
            pair = {url: await ask(session, url, body, whole=True) for url in (ours, plain)}
            for url, answer in pair.items():
                seconds[url].append(answer.last_s)
            equal.append(pair[ours].text == pair[plain].text)
        ratios.append(statistics.median(seconds[ours]) / statistics.median(seconds[plain]))
    return {
        f"{name}, 1 client: seconds of a whole answer over plain": spread(ratios),
        f"{name}, 1 client: answers equal to those of plain": f"{sum(equal)} of {len(equal)}",
    }


def under_load(label: str, ours: Sequence[Round], plain: Sequence[Round]) -> dict[str, str]:
    """Figures of rounds that took turns."""
    ratios = [mine.rate / its.rate for mine, its in zip(ours, plain, strict=True)]
    rates = [statistics.median(each.rate for each in rounds) for rounds in (ours, plain)]
    answers = [answer for each in ours for answer in each.answers]
    tokens = answers[0].num_tokens
    return {
        f"{label}: throughput over plain": spread(ratios),
        f"{label}: requests a second, ours and plain": " ".join(f"{rate:.2f}" for rate in rates),
        f"{label}: output tokens a second, ours and plain": " ".join(
            f"{rate * tokens:.0f}" for rate in rates
        ),
        f"{label}: ms to the first token, p50 p95 p99": quantiles([answer.first_s for answer in answers]),
        f"{label}: the same, plain (the whole answer)": quantiles(
            [answer.first_s for each in plain for answer in each.answers]
        ),
        f"{label}: ms a further token, p50 p95 p99": quantiles(
            [(answer.last_s - answer.first_s) / (tokens - 1) for answer in answers]
        ),
    }


def quantiles(seconds: Sequence[float]) -> str:
    return " ".join(f"{value * 1e3:.4g}" for value in np.percentile(seconds, [50, 95, 99]))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main(settings: Settings) -> dict[str, str]:
    figures: dict[str, str] = {}
    for name in settings.models:
        # Short: Ray puts sockets below it, whose paths may have 107 bytes.
        with tempfile.TemporaryDirectory(prefix="rv", dir="/tmp", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary)
            model = write_model(folder, SIZES[name])
            with both(model, folder, settings.threads) as (ours, plain):
                figures |= asyncio.run(compared(NAMES[name], ours, plain, settings))
    return figures


if __name__ == "__main__":
    options = dict(argument.split("=") for argument in sys.argv[1:])
    result = main(
        Settings(
            repeats=int(options.get("repeats", 3)),
            tokens=int(options.get("tokens", 32)),
            models=options.get("models", "demo,large").split(","),
            clients=[int(number) for number in options.get("clients", "1,4,16,64").split(",")],
            threads=int(options.get("threads", 2)),
        )
    )
    print(json.dumps(result, indent=2))
