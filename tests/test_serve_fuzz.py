"""Ten thousand requests against real Serve: schemathesis' from the served OpenAPI, and ours near valid ones.

What they may not do: a 5xx that is not 503, an error that is no OpenAI error object, an answer that the
OpenAPI does not describe, memory that is not given back. FUZZ_REQUESTS=500 sends fewer.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import schemathesis
from fuzz_bodies import chat_bodies, embeddings_bodies, mutated
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from ray import serve
from schemathesis import Case, GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from test_serve_api import free_port, replicas, write_fit
from tiny_model import tiny_model

from revision_ray.encode.encoder import EncoderConfig, backend
from revision_ray.serve import app
from revision_ray.serve.protocol import ErrorResponse
from revision_ray.serve.settings import (
    EngineConfig,
    ImageSettings,
    Replicas,
    ReplicaSettings,
    RequestLimits,
    ServeJob,
)

pytestmark = pytest.mark.slow

NUM_REQUESTS = int(os.environ.get("FUZZ_REQUESTS", 10_000))
WARM_UP = 0.3
"""The share of the requests after which memory is read first: every path has been taken by then, and threads,
caches (of 256 images) and allocators have their size."""
GROWTH_BYTES = 48 * 2**20
"""That all replicas together may grow by in the rest. The requests have some kilobytes each: keeping even one
object of that size for each of 7,000 of them would be more than this; heaps that settle are less."""
NUM_CONNECTIONS = 8
ROOM = 2 * NUM_CONNECTIONS
NAME, CONTEXT = "tiny", 128
CHECKS: list[Any] = [status_code_conformance, content_type_conformance, response_schema_conformance]


@dataclass(frozen=True)
class Served:
    url: str
    fingerprint: str


@pytest.fixture(scope="module")
def served(cluster, tmp_path_factory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("fuzzed")
    model = tiny_model(root, context=CONTEXT)
    encoder = EncoderConfig(kind="open_clip", model=str(root / "encoder"))
    fingerprint = backend(encoder).fingerprint(encoder)
    write_fit(root / "fit", fingerprint)
    small = ReplicaSettings(num_cpus=0.1, max_ongoing=100)
    job = ServeJob(
        model=str(model),
        name=NAME,
        port=free_port(),
        alignment=str(root / "fit"),
        encoder=encoder,
        engine=EngineConfig(max_length=CONTEXT, num_threads=1),
        images=ImageSettings(max_bytes=100_000, max_pixels=1_000_000, cache_entries=256, num_threads=1),
        limits=RequestLimits(max_body_bytes=1_000_000, max_tokens_default=4, max_choices=4, max_texts=16),
        replicas=Replicas(ingress=small, image_encoder=small, language_model=small, text_encoder=small),
    )
    serve.start(proxy_location="HeadOnly", http_options={"host": job.host, "port": job.port})
    serve.run(app.application(app.checked(job), ()), name=job.application, route_prefix="/")
    yield Served(f"http://127.0.0.1:{job.port}", fingerprint)
    serve.shutdown()


class Sender:
    """Sends requests in the background, over a connection for each thread, and judges what comes back.

    What is wrong is kept: raising where requests are made would have hypothesis look for smaller ones, which
    tells nothing where several are under way.
    """

    def __init__(self, url: str, threads: ThreadPoolExecutor) -> None:
        self.url = url
        self.statuses: list[int] = []
        self.wrong: list[str] = []
        self.num_sent = 0
        self._threads = threads
        self._own = threading.local()
        self._room = threading.BoundedSemaphore(ROOM)

    def case(self, case: Case) -> None:
        """A request of schemathesis; the answer must be one that the OpenAPI describes."""
        self._send(lambda session: self._case(session, case))

    def body(self, path: str, content: bytes) -> None:
        self._send(lambda session: self._body(session, path, content))

    def wait(self) -> None:
        """Every request has its answer."""
        for _ in range(ROOM):
            self._room.acquire()
        self._room.release(ROOM)

    def _send(self, send: Callable[[requests.Session], None]) -> None:
        self._room.acquire()
        self.num_sent += 1

        def sent() -> None:
            if not hasattr(self._own, "session"):
                self._own.session = requests.Session()
                self._own.session.trust_env = False
            send(self._own.session)

        self._threads.submit(sent).add_done_callback(self._done)

    def _done(self, future: Future[None]) -> None:
        self._room.release()
        if error := future.exception():
            self.wrong.append(f"{type(error).__name__}: {error}")

    def _case(self, session: requests.Session, case: Case) -> None:
        response = case.call(base_url=self.url, session=session, timeout=600)
        content_type = response.headers.get("content-type", [""])[0]
        self._judge(response.status_code, content_type, response.content, case.as_curl_command)
        try:
            case.validate_response(response, checks=CHECKS)
        except FailureGroup as failures:
            self.wrong.append(str(failures))

    def _body(self, session: requests.Session, path: str, content: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        with session.post(self.url + path, content, headers=headers, timeout=600) as response:
            kind = response.headers.get("content-type", "")
            self._judge(response.status_code, kind, response.content, lambda: f"{path} {content!r}")

    def _judge(self, status: int, content_type: str, content: bytes, request: Callable[[], str]) -> None:
        self.statuses.append(status)
        try:
            assert status < 500 or status == 503
            assert b"Traceback" not in content
            if status >= 400:
                assert content_type == "application/json"
                assert ErrorResponse.model_validate_json(content, strict=True, extra="forbid").error.message
            elif content_type.startswith("text/event-stream"):
                *events, last = content.decode().split("\n\n")[:-1]
                assert last == "data: [DONE]"
                assert all("error" not in json.loads(event.removeprefix("data: ")) for event in events)
        except (AssertionError, ValueError) as error:
            said = content[:500].decode(errors="replace")
            self.wrong.append(f"{request()[:3000]}\n-> {status} {content_type} {said}\n{error}")


def fuzz(requests_: st.SearchStrategy[Any], number: int, turn: int, send: Callable[[Any], None]) -> None:
    """`number` of `requests_` are sent, fewer where there are no more; each `turn` has ones of its own."""

    @seed(turn)
    @settings(
        max_examples=number,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(requests_)
    def each(request: Any) -> None:
        send(request)

    each()


def from_the_openapi(served: Served, sender: Sender, number: int, turn: int) -> None:
    """About `number` requests, half of which fit the served OpenAPI, to every route."""
    openapi = requests.get(f"{served.url}/openapi.json", timeout=600).json()
    schema = schemathesis.openapi.from_dict(openapi)

    @schema.hook
    def map_body(context: Any, body: Any) -> Any:
        """Of this model: any other name is answered with 404, and nothing else is looked at."""
        named = isinstance(body, dict) and isinstance(body.get("model"), str)
        return body | {"model": NAME} if named else body

    for result in schema.get_all_operations():
        operation: Any = result.ok()
        has_body = bool(operation.body)
        for mode in GenerationMode if has_body else [GenerationMode.POSITIVE]:
            share = 0.24 if has_body else 0.04
            fuzz(operation.as_strategy(generation_mode=mode), max(1, int(number * share)), turn, sender.case)


def memory() -> dict[str, int]:
    """Bytes of every replica that no other process shares."""
    return {f"{each.cmdline()[0]} {each.pid}": each.memory_full_info().uss for each in replicas("")}


def test_ten_thousand_requests_break_nothing_and_leave_nothing_behind(served):
    """Ten thousand requests, wrong ones too, get an answer that the OpenAPI describes and leak no memory."""
    chat = mutated(chat_bodies(NAME, served.fingerprint))
    embeddings = mutated(embeddings_bodies(NAME))

    def both_kinds(sender: Sender, number: int, turn: int) -> None:
        """`number` requests, about two in five of them schemathesis'."""
        sent = sender.num_sent
        from_the_openapi(served, sender, number * 2 // 5, turn)
        left = number - (sender.num_sent - sent)
        fuzz(embeddings, left // 4, turn, lambda body: sender.body("/v1/embeddings", body))
        fuzz(chat, left - left // 4, turn, lambda body: sender.body("/v1/chat/completions", body))
        sender.wait()

    num_warm = int(NUM_REQUESTS * WARM_UP)
    with ThreadPoolExecutor(NUM_CONNECTIONS) as threads:
        sender = Sender(served.url, threads)
        both_kinds(sender, num_warm, 1)
        before = memory()
        both_kinds(sender, NUM_REQUESTS - num_warm, 2)
        after = memory()
    statuses = Counter(sender.statuses)
    growth = {name: (after[name] - before[name]) / 2**20 for name in after.keys() & before.keys()}
    print(f"{sender.num_sent} requests, answers by status {dict(statuses)}, growth in MiB {growth}")
    assert not sender.wrong, f"{len(sender.wrong)} answers are wrong:\n\n" + "\n\n".join(sender.wrong[:5])
    assert sender.num_sent >= NUM_REQUESTS
    assert statuses[200] > NUM_REQUESTS / 10, f"too few reach the models to tell anything: {statuses}"
    assert before.keys() == after.keys(), "a replica died"
    assert sum(after.values()) - sum(before.values()) < GROWTH_BYTES, growth
