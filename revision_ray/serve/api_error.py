"""Answers other than 200: OpenAI's error object, with a message that says what to change."""

import logging
import os
import traceback
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic_core import PydanticCustomError, core_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from revision_ray.errors import shorten_words

log = logging.getLogger(__name__)

# Tags of a union's branches; the sign keeps them apart from field names in the path of a validation error.
ONE, MANY = "~one", "~many"

# Type of the validation error of a field that is known, with a value that this server does not do.
UNSUPPORTED = "unsupported_parameter"
# Characters of a field's name that a message repeats: clients choose the names of unknown ones.
MAX_NAME = 100

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
        super().__init__(status, shorten_words(message), headers or None)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        return error_body(self.status_code, self.detail, self.param, self.code)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, headers=self.headers)


def starting() -> ApiError:
    """503 for what comes before the models are loaded."""
    message = "the server is starting: its models are being loaded; try again"
    return ApiError(503, message, code="starting", retry_after_s=5)


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


class Only:
    """Annotation of a field that this server does not have, of which null and `values` are taken.

    They ask for nothing, and clients send them as defaults. Any other value is refused with `advice`.
    """

    def __init__(self, *values: Any, advice: str = "leave it out") -> None:
        self._values, self._advice = (None, *values), advice

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": list(self._values)}

    def _checked(self, value: Any) -> Any:
        # 0 is 0.0 in JSON, and false is neither.
        for taken in self._values:
            if value == taken and isinstance(value, bool) == isinstance(taken, bool):
                return value
        raise PydanticCustomError(UNSUPPORTED, "{advice}", {"advice": self._advice})


_PART_TYPES = ("text", "image_url", "image_embedding")


def invalid(error: RequestValidationError) -> ApiError:
    """422 that names the first field that is wrong, 400 for a field that is not here; no value is quoted."""
    first = error.errors()[0]
    unknown = first["type"] == "extra_forbidden"
    where, steps = "", first["loc"][1:]  # behind "body"
    for place, (before, step) in enumerate(zip((None, *steps), steps, strict=False), 1):
        if isinstance(step, int):
            where += f"[{step}]"
        elif (unknown and place == len(steps)) or not (
            step.startswith("~") or (step in _PART_TYPES and _follows_a_list(before))
        ):
            where += f".{step[:MAX_NAME]}" if where else step[:MAX_NAME]
    if unknown:
        message = f"{where}: this server knows no such field; leave it out (/openapi.json lists the fields)"
        return ApiError(400, message, param=where, code="unknown_parameter")
    if first["type"] == UNSUPPORTED:
        message = f"{where} is not supported by this server; {first['msg']}"
        return ApiError(400, message, param=where, code=UNSUPPORTED)
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
