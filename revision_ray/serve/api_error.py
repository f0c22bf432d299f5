"""Answers other than 200: OpenAI's error object, with a message that says what to change."""

import logging
import os
import traceback
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

log = logging.getLogger(__name__)

# Tags of a union's branches; the sign keeps them apart from field names in the path of a validation error.
ONE, MANY = "~one", "~many"

# OpenAI's name for a kind of error, by status. The official client raises by status alone.
_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(HTTPException):
    """An answer other than 200; the message says what to change, and never quotes what the client sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        headers = dict(headers or {})
        if retry_after_s is not None:
            headers["Retry-After"] = str(retry_after_s)
        super().__init__(status, message, headers or None)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        return error_body(self.status_code, self.detail, self.param, self.code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def internal(error: BaseException) -> ApiError:
    """500 for what nobody foresaw. The log says what and where, no message: it may quote a prompt."""
    at = traceback.extract_tb(error.__traceback__)[-1:] if error.__traceback__ else []
    where = f"{os.path.basename(at[0].filename)}:{at[0].lineno}" if at else "an unknown place"
    log.error("%s at %s", type(error).__name__, where)
    return ApiError(500, "the server failed; nothing in the request needs to change", code="internal_error")


_PART_TYPES = ("text", "image_url", "image_embedding")


def invalid(error: RequestValidationError) -> ApiError:
    """422 that names the first field that is wrong; what the client sent is not quoted."""
    first = error.errors()[0]
    where, steps = "", first["loc"][1:]  # behind "body"
    for before, step in zip((None, *steps), steps, strict=False):
        if isinstance(step, int):
            where += f"[{step}]"
        elif not (step.startswith("~") or (step in _PART_TYPES and _follows_a_list(before))):
            where += f".{step}" if where else step
    if first["type"] == "union_tag_invalid":
        said = f"its type is none of {first['ctx']['expected_tags']}"
    elif first["type"] == "union_tag_not_found":
        said = "it has no type"
    else:
        said = first["msg"]
    return ApiError(422, f"{where or 'the body'}: {said}", param=where or None, code=first["type"])


def _follows_a_list(before: Any) -> bool:
    """Parts are told apart by their type, which then stands behind their index, or behind a branch's tag."""
    return isinstance(before, int) or before == MANY
