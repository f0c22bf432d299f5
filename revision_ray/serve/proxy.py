"""What Ray Serve's HTTP proxy says while the application starts: 503 and when to come again.

By itself the proxy answers 404 until it knows the application, and then lets requests wait for a replica.
Imported in the proxy's process, so nothing heavy is imported here.
"""

import asyncio
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from revision_ray.serve.protocol import starting

IMPORT_PATH = "revision_ray.serve.proxy:middlewares"
"""For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, where Ray runs this application alone."""

_ASK_AT_MOST_S = 2.0


def middlewares() -> list[Middleware]:
    """What the proxy wraps itself in."""
    return [Middleware(UntilHealthy)]


class UntilHealthy:
    """ASGI middleware that answers 503 until /health has been answered with 200 once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._healthy = app, False
        self._asking: asyncio.Task[bool] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        own = scope["type"] != "http" or scope["path"].startswith("/-/")  # Serve's own routes
        if own or self._healthy or await self._asked(scope):
            await self._app(scope, receive, send)
            return
        await starting().response()(scope, receive, send)

    async def _asked(self, scope: Scope) -> bool:
        """Ask for /health, once for all who wait to know."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(scope))
            self._asking.add_done_callback(self._forget)
        return await asyncio.shield(self._asking)

    def _forget(self, _: Any) -> None:
        self._asking = None

    async def _ask(self, scope: Scope) -> bool:
        asked = {"method": "GET", "path": "/health", "raw_path": b"/health"}
        asked |= {"query_string": b"", "headers": []}
        read, answered = False, asyncio.Event()

        async def receive() -> Message:
            nonlocal read
            if read:  # what says that nobody waits any more would end the request
                await answered.wait()
                return {"type": "http.disconnect"}
            read = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._healthy = self._healthy or message["status"] == 200
            elif not message.get("more_body"):
                answered.set()

        try:
            async with asyncio.timeout(_ASK_AT_MOST_S):
                await self._app({**scope, **asked}, receive, send)
        except Exception:  # whatever it is, nobody is served yet
            return self._healthy
        return self._healthy
