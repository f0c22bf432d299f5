"""What every request passes: the key, counts, headers; and every failure leaves as an error object."""

import contextlib
import hashlib
import hmac
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from revision_ray.serve.api_error import ApiError, internal
from revision_ray.serve.calls import overloaded, rejected
from revision_ray.serve.metrics import instruments

# What a browser or a load balancer asks before it has a key; nothing here tells about the model's users.
OPEN_PATHS = ("/", "/health", "/openapi.json")


def key_digests(keys: str) -> tuple[str, ...]:
    """SHA-256 of each key in a comma-separated list, in hex: what may travel and be kept."""
    return tuple(_digest(os.fsencode(key.strip())) for key in keys.split(",") if key.strip())


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


class Guard:
    """ASGI middleware around the API."""

    def __init__(
        self, app: ASGIApp, *, digests: Sequence[str], max_ongoing_per_key: int | None, gate: "Gate"
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


class Gate:
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
