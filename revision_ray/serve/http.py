"""The HTTP side of the application: routes, strict JSON bodies of bounded size, API keys, and handlers."""

import asyncio
import hashlib
import hmac
import json
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute, APIRouter
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import AutoTokenizer

from revision_ray.core import storage
from revision_ray.serve import metrics
from revision_ray.serve.calls import (
    LanguageModelCalls,
    cause_of,
    overloaded,
    ready,
    rejected,
    together,
    unavailable,
)
from revision_ray.serve.chat import ChatCompletions, EventStream
from revision_ray.serve.drift import DriftReporter
from revision_ray.serve.embeddings import EmbeddingInputs
from revision_ray.serve.images import Fetcher, ServedImages
from revision_ray.serve.page import page
from revision_ray.serve.prompt import ModelFacts, Prompter
from revision_ray.serve.protocol import (
    MAX_NAME,
    ApiError,
    ChatCompletion,
    ChatRequest,
    Embeddings,
    EmbeddingsRequest,
    ErrorResponse,
    Health,
    Model,
    Models,
    internal,
    invalid,
    starting,
)
from revision_ray.serve.settings import ServeJob

# JSON can escape a lone surrogate (half of a character), which cannot be encoded as text later.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def strict_route(max_bytes: int, timeout_s: float) -> type[APIRoute]:
    """Return a route class that takes only JSON bodies of at most `max_bytes` that arrive in `timeout_s`."""

    class StrictRequest(Request):
        async def body(self) -> bytes:
            """
            Raises:
                ApiError: 400 empty, 408 too slow, 413 too large, 415 of another type.
            """
            if not hasattr(self, "_body"):
                self._body = await _read(self, max_bytes, timeout_s)
            return self._body

        async def json(self) -> Any:
            return _parsed(await self.body())

    class StrictRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_strictly(request: Request) -> Response:
                return await handle(StrictRequest(request.scope, request.receive))

            return handle_strictly

    return StrictRoute


async def _read(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "send the body as Content-Type: application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "send the body without Content-Encoding", code="unsupported_media_type")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and len(stated) < 20 and int(stated) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                # Count the bytes, because a chunked body states no length.
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {timeout_s:g} s; send it again", code="timeout"
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "the body ends before its end", code="invalid_json") from None
    if not body:
        raise ApiError(400, "the body is empty; send a JSON object", code="invalid_json")
    return bytes(body)


def _too_large(max_bytes: int) -> ApiError:
    rejected("body_size")
    return ApiError(413, f"the request has more than {max_bytes} bytes; send less", code="body_too_large")


def _parsed(body: bytes) -> Any:
    try:
        text = body.decode()
        parsed = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
        if _SURROGATE.search(text):
            json.dumps(parsed, ensure_ascii=False).encode()  # a lone one is no character
        return parsed
    except json.JSONDecodeError as error:
        reason = f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8: its byte {error.start} belongs to no character"
    except UnicodeEncodeError:
        reason = "holds half of a character (a surrogate without its other half), which is no text"
    except RecursionError:
        reason = "is nested too deeply"
    except ValueError:  # json's own, for integers of thousands of digits
        reason = "holds a number with too many digits"
    raise ApiError(400, f"the body {reason}", code="invalid_json")


def _no_constant(name: str) -> Any:
    raise ApiError(400, f"the body holds {name}, which is no number of JSON", code="invalid_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the JSON object of `pairs`; raise ApiError if a name occurs twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)[:MAX_NAME]
        message = f"{twice}: the body has this field twice in one object; send it once"
        raise ApiError(400, message, param=twice, code="duplicate_field")
    return made


# Paths that browsers and load balancers open without a key; they reveal nothing about the model's users.
OPEN_PATHS = ("/", "/health", "/openapi.json")


def key_digests(keys: str) -> tuple[str, ...]:
    """Return the hex SHA-256 of each key in a comma-separated list, to be passed on instead of the keys."""
    return tuple(_digest(os.fsencode(key.strip())) for key in keys.split(",") if key.strip())


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


class ApiGuard:
    """ASGI middleware that checks API keys, limits requests, sets headers and answers errors."""

    def __init__(
        self, app: ASGIApp, *, digests: Sequence[str], max_ongoing_per_key: int | None, gate: "RequestGate"
    ) -> None:
        self._app, self._digests, self._gate = app, digests, gate
        self._max_ongoing_per_key = max_ongoing_per_key
        self._ongoing: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # there are no websockets here
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = "499"  # the client left before an answer
        head = scope["method"] == "HEAD"
        if head:  # as GET, without the body
            scope = {**scope, "method": "GET"}

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Cache-Control", "no-store")
                headers.setdefault("Referrer-Policy", "no-referrer")
            elif head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._admitted(scope, receive, noted)
        except ApiError as error:
            await error.response()(scope, receive, noted)
        except Exception as error:
            if status != "499":  # half of an answer is out: it cannot become another
                internal(error)
            else:
                await internal(error).response()(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            metrics.instruments().requests.inc(tags={"route": route, "status": status})

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        digest = self._checked(Headers(scope=scope).get("authorization", ""))
        with self._gate:
            limit = self._max_ongoing_per_key
            if digest and limit is not None and self._ongoing[digest] >= limit:
                raise overloaded(f"this key has {limit} requests under way; wait for one of them", 429)
            self._ongoing[digest] += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._ongoing[digest] -= 1

    def _checked(self, authorization: str) -> str:
        """Check the Authorization header; return the key's digest, or "" where no key is required.

        Raises:
            ApiError: 401, the key is missing or unknown.
        """
        if not self._digests:
            return ""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # the bytes that were sent
        # Compare with all digests in constant time, so that the duration reveals nothing.
        equal = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() == "bearer" and any(equal):
            return given
        rejected("key")
        reason = "the API key is not known here" if authorization else "the request has no API key"
        if authorization and scheme.lower() != "bearer":
            reason = "the Authorization header has another scheme than Bearer"
        raise ApiError(
            401,
            f"{reason}; send one as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class RequestGate:
    """Context manager that counts running requests, and refuses further ones once it is closed."""

    def __init__(self) -> None:
        self.num_inside, self._closed = 0, False

    def close(self) -> None:
        self._closed = True

    def __enter__(self) -> None:
        if self._closed:
            rejected("draining")
            raise ApiError(503, "the server is shutting down; ask another", code="draining", retry_after_s=5)
        self.num_inside += 1

    def __exit__(self, *raised: Any) -> None:
        self.num_inside -= 1


_HEALTH_TIMEOUT_S = 3.0
_DRIFT_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 1.0


class Ingress:
    """The Serve deployment of the API. Handles of parts that are not configured are None."""

    def __init__(
        self,
        job: ServeJob,
        facts: ModelFacts,
        digests: Sequence[str],
        language_model: Any,
        image_encoder: Any = None,
        text_encoder: Any = None,
        monitor: Any = None,
    ) -> None:
        """Take the `digests` of the API keys (see `key_digests`), never the keys themselves."""
        self.job, self.digests, self.gate = job, tuple(digests), RequestGate()
        self.model = facts.listed(job.model_id)
        self._monitor = monitor
        self._parts = [part for part in (language_model, image_encoder, text_encoder) if part is not None]
        self._starting: asyncio.Task[Any] | None = None
        self.fetcher = Fetcher(job.remote_images, job.images.max_bytes)
        reporter = DriftReporter(monitor)
        images = ServedImages(facts, image_encoder, self.fetcher, reporter, job.images, job.limits)
        prompter = Prompter(
            AutoTokenizer.from_pretrained(storage.local_copy(job.model)),
            facts.image_token_id,
            facts.num_visual_tokens,
        )
        self.calls = LanguageModelCalls(language_model, job.limits, job.engine.token_timeout_s)
        self.chat = ChatCompletions(job.model_id, facts, prompter, self.calls, images, job.limits)
        has_fit = bool(job.alignment)
        self.embeddings = EmbeddingInputs(job.model_id, text_encoder, images, has_fit, job.limits)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return asgi_app(self)

    def start(self) -> None:
        """Start a task that waits until all parts are ready; call it in the event loop."""
        self._starting = asyncio.create_task(together([ready(part) for part in self._parts]))

    async def check_started(self) -> None:
        """Check that all parts have started.

        Raises:
            ApiError: 503, a part of the application is not ready yet.
        """
        if self._starting is None or self._starting.done():
            return
        await asyncio.wait([self._starting], timeout=_START_TIMEOUT_S)  # no longer, where all are there
        if not self._starting.done():
            raise starting()

    async def drain(self) -> int:
        """Refuse further requests; return the number of those still running."""
        self.gate.close()
        return self.gate.num_inside

    def check_health(self) -> None:
        """Serve replaces the replica where this raises; a loop that hangs does not answer at all."""

    async def drift(self) -> dict[str, Any]:
        if self._monitor is None:
            raise ApiError(404, "this server watches no drift; its operator sets alignment for it")
        try:
            return await asyncio.wait_for(self._monitor.report.remote(), _DRIFT_TIMEOUT_S)
        except Exception as error:
            if isinstance(cause_of(error), ApiError):
                raise
            raise unavailable("monitor") from None

    def check_model(self, name: str) -> None:
        if name != self.model.id:
            raise ApiError(
                404,
                f"model: this server has one model, {self.model.id}; see /v1/models",
                param="model",
                code="model_not_found",
            )


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse} for status in statuses}


_POST_ERRORS = _errors(400, 401, 404, 408, 413, 415, 422, 429, 503)
# In OpenAPI before 3.2 the schema of an event stream is that of each event.
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {"type": "string", "description": "a chat.completion.chunk as JSON; last, [DONE]"}
    },
}
_EVENTS = {"text/event-stream": {"schema": _EVENT}}


def asgi_app(ingress: Ingress) -> ASGIApp:
    """Return the ASGI app of the API of `ingress`, wrapped in the guard and, if configured, CORS."""
    limits = ingress.job.limits

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        ingress.start()
        yield
        await ingress.fetcher.close()

    app = FastAPI(
        title="revision_ray",
        description="A multimodal model behind the OpenAI API.",
        version="1",
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    # The guard asks for the key; this says so in the schema.
    key = [Depends(HTTPBearer(auto_error=False))] if ingress.digests else []
    api = [*key, Depends(_no_query), Depends(ingress.check_started)]
    route_class = strict_route(limits.max_body_bytes, limits.body_timeout_s)
    app.include_router(_posts(ingress, route_class), dependencies=api)
    app.include_router(_gets(ingress), dependencies=api)
    app.include_router(_metrics(), dependencies=key)
    app.include_router(_open(ingress))
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _unforeseen)
    guarded = ApiGuard(
        app,
        digests=ingress.digests,
        max_ongoing_per_key=limits.max_ongoing_per_key,
        gate=ingress.gate,
    )
    if not ingress.job.cors_origins:
        return guarded
    # Around the guard: a browser's question in advance (preflight) carries no key, and refusals are read too.
    # Keys travel in a header of their own, never as credentials that a browser adds by itself.
    return CORSMiddleware(
        guarded,
        allow_origins=ingress.job.cors_origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        allow_credentials=False,
        expose_headers=("Retry-After",),
    )


def _posts(ingress: Ingress, route_class: Any) -> APIRouter:
    router = APIRouter(route_class=route_class)

    @router.post(
        "/v1/chat/completions",
        response_model=None,
        responses={200: {"model": ChatCompletion, "content": _EVENTS}, **_POST_ERRORS},
    )
    async def chat_completions(body: ChatRequest) -> Response:
        """Answer a conversation about images."""
        ingress.check_model(body.model)
        prompt = await ingress.chat.prompt(body)
        if body.stream:
            return EventStream(await ingress.chat.start(body, prompt))
        return JSONResponse((await ingress.chat.complete(body, prompt)).model_dump())

    @router.post(
        "/v1/embeddings", response_model=None, responses={200: {"model": Embeddings}, **_POST_ERRORS}
    )
    async def embeddings(body: EmbeddingsRequest) -> Response:
        """Embed texts and images in the space of the model's encoder."""
        ingress.check_model(body.model)
        return JSONResponse((await ingress.embeddings.embed(body)).model_dump())

    return router


def _gets(ingress: Ingress) -> APIRouter:
    router = APIRouter()
    guarded = _errors(400, 401, 429, 503)

    @router.get("/v1/models", responses=guarded)
    async def models() -> Models:
        """The model."""
        return Models(object="list", data=[ingress.model])

    @router.get("/v1/models/{model_id:path}", responses=guarded | _errors(404, 422))
    async def model(model_id: str) -> Model:
        """The model, by its id."""
        ingress.check_model(model_id)
        return ingress.model

    @router.get("/v1/drift", responses=guarded | _errors(404))
    async def drift() -> dict[str, Any]:
        """How far the images served are from those of the fit."""
        return await ingress.drift()

    return router


def _metrics() -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", response_class=PlainTextResponse, responses=_errors(401, 429, 503))
    async def exposition() -> Response:
        """Counters and timings in Prometheus' text format."""
        return PlainTextResponse(
            await metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    return router


def _no_query(request: Request) -> None:
    """Nothing under /v1 takes parameters in the address: what they ask for would have no effect."""
    if request.query_params:
        name = next(iter(request.query_params))[:MAX_NAME]
        message = f"{name}: this route takes no parameters in its address; leave it out"
        raise ApiError(400, message, param=name, code="unknown_parameter")


def _open(ingress: Ingress) -> APIRouter:
    """Return the routes that need no key (/health, and the chat page if configured)."""
    router = APIRouter()

    @router.get("/health", responses=_errors(503))
    async def health() -> Health:
        """200 once every part is ready, and while the language model answers."""
        await ingress.check_started()
        if not await ingress.calls.alive(_HEALTH_TIMEOUT_S):
            raise unavailable("language model")
        return Health(status="ok")

    if ingress.job.page:

        @router.get("/", response_class=HTMLResponse)
        async def chat_page() -> Response:
            """A page to chat with the model."""
            html, policy = page()
            return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    return router


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    said = {
        404: "there is no such route; /openapi.json lists them",
        405: "this route has another method; /openapi.json lists them",
    }
    message = said.get(error.status_code, "the request cannot be answered")
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return invalid(error).response()


async def _unforeseen(request: Request, error: Exception) -> Response:
    # The error also reaches the guard, which logs it.
    return ApiError(500, "the server failed; nothing in the request needs to change").response()
