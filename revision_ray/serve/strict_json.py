"""Request bodies: JSON in UTF-8 of bounded size, as RFC 8259 has it; everything else is refused by name."""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from revision_ray.serve.api_error import MAX_NAME, ApiError
from revision_ray.serve.calls import rejected

# JSON may escape half of a character, which is no text: it would fail wherever text is encoded.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def strict_route(max_bytes: int, timeout_s: float) -> type[APIRoute]:
    """Routes whose requests have a JSON body of at most `max_bytes`, which came within `timeout_s`."""

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
                # Counted, not believed: a chunked body states no length.
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
    """The object of `pairs`, of which a later one would hide an earlier one of its name."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)[:MAX_NAME]
        message = f"{twice}: the body has this field twice in one object; send it once"
        raise ApiError(400, message, param=twice, code="duplicate_field")
    return made
