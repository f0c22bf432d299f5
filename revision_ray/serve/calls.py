"""Calls from the HTTP side to replicas (time limits, retries, failures), and checks of every request."""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from revision_ray.core.errors import RevisionError
from revision_ray.data.images import UndecodableImage
from revision_ray.serve.engine import AnswerPiece, Prompt, QueueFull, Sampling
from revision_ray.serve.metrics import instruments
from revision_ray.serve.protocol import ApiError, internal
from revision_ray.serve.settings import RequestLimits

log = logging.getLogger(__name__)

T = TypeVar("T")

# A replica was killed, or drained away, with the request in it; or its engine was closed, which is a
# RuntimeError. Another replica can answer.
_GONE = (RayActorError, ReplicaUnavailableError, TaskCancelledError, RuntimeError)
_FIRST_PAUSE_S = 0.05
RETRY_AFTER_S = 1


def cause_of(error: BaseException) -> BaseException:
    """What was raised in the replica, without Ray's wrapping (whose text is a traceback)."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def value_of(answer: T) -> T:
    """`answer` of a replica; raised where it is a refusal (deployments.py says why those come as values)."""
    if isinstance(answer, Exception):
        raise answer
    return answer


def explained(error: Exception, part: str) -> ApiError:
    """The answer to a request that failed with `error` in `part` of the application.

    Raises:
        Exception: `error` itself, which is no one's fault but ours.
    """
    cause = cause_of(error)
    if isinstance(cause, ApiError):
        return cause
    if isinstance(cause, BackPressureError | QueueFull):
        return overloaded(f"the {part} has as many requests as it takes; try again in a moment")
    if isinstance(cause, TimeoutError):
        rejected("timeout")
        return ApiError(
            503,
            f"the {part} took too long; try again, or ask for less",
            code="timeout",
            retry_after_s=RETRY_AFTER_S,
        )
    if isinstance(cause, UndecodableImage):
        rejected("image")
        return ApiError(400, str(cause), code="invalid_image")
    if isinstance(cause, RevisionError):
        rejected("input")
        return ApiError(400, str(cause))
    if isinstance(cause, (*_GONE, DeploymentUnavailableError)):
        rejected("replica_gone")
        return unavailable(part)
    raise error


def overloaded(message: str, status: int = 503) -> ApiError:
    rejected("queue_full")
    return ApiError(status, message, code="overloaded", retry_after_s=RETRY_AFTER_S)


def unavailable(part: str) -> ApiError:
    message = f"the {part} is not available at the moment; try again"
    return ApiError(503, message, code="unavailable", retry_after_s=RETRY_AFTER_S)


def rejected(cause: str) -> None:
    """A refusal is counted."""
    with contextlib.suppress(Exception):  # metrics fail no request
        instruments().rejected.inc(tags={"cause": cause})


async def ready(handle: Any) -> None:
    """Wait until a replica behind `handle` is there."""
    while True:
        try:
            await handle.check_health.remote()
            return
        except Exception as error:
            if isinstance(cause_of(error), BackPressureError):  # there, and busy
                return
        await asyncio.sleep(1)


async def patiently(
    attempt: Callable[[], Awaitable[T]], part: str, *, timeout_s: float, max_attempts: int
) -> T:
    """What `attempt` gives; it is made again where a replica is lost on the way.

    Raises:
        ApiError: it failed for good, or took longer than `timeout_s`, all attempts together.
    """
    try:
        async with asyncio.timeout(timeout_s):
            for number in range(1, max_attempts + 1):
                try:
                    return value_of(await attempt())
                except Exception as error:
                    if number == max_attempts or not isinstance(cause_of(error), _GONE):
                        raise
                    log.warning("%s: a replica is gone; attempt %d", part, number + 1)
                await asyncio.sleep(_FIRST_PAUSE_S * 2**number)
            raise AssertionError("max_attempts is at least one")
    except Exception as error:
        raise explained(error, part) from None


class PendingAnswer:
    """An answer under way: its first piece, which has come, and those that follow."""

    def __init__(self, first: AnswerPiece, pieces: Any, timeout_s: float) -> None:
        self._first, self._pieces, self._timeout_s = first, pieces, timeout_s
        self._began = time.monotonic()

    async def pieces(self) -> AsyncIterator[AnswerPiece]:
        """From the first to the last.

        Raises:
            TimeoutError: one did not come in time.
        """
        piece = self._first
        while piece.finish_reason is None:
            yield piece
            async with asyncio.timeout(self._timeout_s):
                piece = value_of(await anext(self._pieces))
        self._count(piece.num_tokens)
        yield piece

    def _count(self, num_tokens: int) -> None:
        with contextlib.suppress(Exception):  # metrics fail no request
            made = instruments()
            made.completion_tokens.inc(num_tokens)
            if num_tokens > 1:
                seconds = time.monotonic() - self._began
                made.time_per_output_token.observe(seconds / (num_tokens - 1))

    def close(self) -> None:
        """The replica stops working on it; nothing happens where it has finished."""
        self._pieces.cancel()


class LanguageModelCalls:
    """The language model's replicas as seen from the HTTP side."""

    def __init__(self, handle: Any, limits: RequestLimits, token_timeout_s: float) -> None:
        self._handle, self._limits = handle, limits
        self._streaming = handle.options(stream=True, method_name="stream")
        # The engine itself ends what takes longer; this is for a replica that says nothing at all.
        self._piece_timeout_s = token_timeout_s + 5

    async def start(self, prompt: Prompt, sampling: Sampling) -> PendingAnswer:
        """An answer whose first piece is there: nothing that can be refused is refused later.

        Raises:
            ApiError: refused, or no replica lived long enough.
        """
        began = time.monotonic()
        answer = await patiently(
            lambda: self._first(prompt, sampling),
            "language model",
            timeout_s=self._limits.first_token_timeout_s,
            max_attempts=self._limits.max_attempts,
        )
        with contextlib.suppress(Exception):  # metrics fail no request
            instruments().time_to_first_token.observe(time.monotonic() - began)
        return answer

    async def whole(self, prompt: Prompt, sampling: Sampling) -> list[AnswerPiece]:
        """Every piece of an answer; while nobody has seen any, it can begin anew elsewhere.

        Raises:
            ApiError: as `start`, or the model failed for good.
        """

        async def attempt() -> list[AnswerPiece]:
            answer = await self.start(prompt, sampling)
            try:
                return [piece async for piece in answer.pieces()]
            finally:
                answer.close()

        return await patiently(
            attempt,
            "language model",
            timeout_s=self._limits.request_timeout_s,
            max_attempts=self._limits.max_attempts,
        )

    async def alive(self, timeout_s: float) -> bool:
        """Whether a replica answers, or is too busy to."""
        try:
            await asyncio.wait_for(self._handle.describe.remote(), timeout_s)
        except Exception as error:
            return isinstance(cause_of(error), BackPressureError)
        return True

    async def _first(self, prompt: Prompt, sampling: Sampling) -> PendingAnswer:
        pieces = self._streaming.remote(prompt, sampling)
        try:
            first = value_of(await anext(pieces))
        except StopAsyncIteration:
            raise RuntimeError("an answer without a piece") from None
        except BaseException:
            pieces.cancel()
            raise
        return PendingAnswer(first, pieces, self._piece_timeout_s)


async def together(calls: list[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; where one fails, the others are cancelled, and have ended, before it is raised."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# What a browser or a load balancer asks before it has a key; nothing here tells about the model's users.
OPEN_PATHS = ("/", "/health", "/openapi.json")


def key_digests(keys: str) -> tuple[str, ...]:
    """SHA-256 of each key in a comma-separated list, in hex: what may travel and be kept."""
    return tuple(_digest(os.fsencode(key.strip())) for key in keys.split(",") if key.strip())


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


class ApiGuard:
    """ASGI middleware around the API."""

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
            with contextlib.suppress(Exception):  # metrics fail no request
                instruments().requests.inc(tags={"route": route, "status": status})

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
        """The digest of the key; "" where none is asked for.

        Raises:
            ApiError: 401.
        """
        if not self._digests:
            return ""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # the bytes that were sent
        # Against all of them, in constant time: how long it takes tells nothing.
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
    """How many requests are inside; once closed, no further one comes in."""

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
