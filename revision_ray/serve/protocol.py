"""Requests, responses and error objects of the OpenAI API, and the extensions of this server.

Requests are strict (no number in a string, no NaN). Every field either acts, or cannot change the answer, or
is refused by name. That holds for fields that are not listed here, and for values of known fields
(`OnlyValues`) that this server does not support.
"""

import logging
import os
import traceback
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError, core_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from revision_ray.core.errors import shorten_words

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
    return ErrorResponse(error=ErrorObject(message=message, type=kind, param=param, code=code)).model_dump()


def internal(error: BaseException) -> ApiError:
    """500 for what nobody foresaw. The log says what and where, no message: it may quote a prompt."""
    at = traceback.extract_tb(error.__traceback__)[-1:] if error.__traceback__ else []
    where = f"{os.path.basename(at[0].filename)}:{at[0].lineno}" if at else "an unknown place"
    log.error("%s at %s", type(error).__name__, where)
    return ApiError(500, "the server failed; nothing in the request needs to change", code="internal_error")


class OnlyValues:
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


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


_Off = Annotated[Any, OnlyValues()]
_OffOrFalse = Annotated[Any, OnlyValues(False)]
_OffOrTrue = Annotated[Any, OnlyValues(True)]
_OffOrEmpty = Annotated[Any, OnlyValues([])]
_OffOrNothing = Annotated[Any, OnlyValues({})]


def _one_or_many(value: Any) -> str:
    """The branch that the value is meant for, which alone then explains what is wrong with it."""
    return MANY if isinstance(value, list) else ONE


# --- chat ---------------------------------------------------------------------------------------------------


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str = Field(description="data:image/...;base64,... or, where the server allows it, https://...")
    detail: Annotated[Any, OnlyValues("auto")] = None


class ImageUrlPart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class ImageEmbedding(_Strict):
    embedding: Annotated[
        Annotated[list[float], Field(min_length=1), Tag(MANY)] | Annotated[str, Tag(ONE)],
        Discriminator(_one_or_many),
    ] = Field(description="Numbers, or base64 of little-endian float32; brought to length one here.")
    encoder_fingerprint: str = Field(
        description="Of the encoder that made it, as its store's manifest.json and /v1/models have it."
    )


class ImageEmbeddingPart(_Strict):
    """Our own part: the image stays where it is, and its embedding travels."""

    type: Literal["image_embedding"]
    image_embedding: ImageEmbedding


Part = Annotated[TextPart | ImageUrlPart | ImageEmbeddingPart, Field(discriminator="type")]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag(ONE)] | Annotated[list[Part], Field(min_length=1), Tag(MANY)],
        Discriminator(_one_or_many),
    ]
    # As answers have them, which clients send back as they are.
    refusal: _Off = None
    tool_calls: _OffOrEmpty = None
    annotations: _OffOrEmpty = None
    function_call: _Off = None
    audio: _Off = None
    reasoning_content: _Off = None
    tool_call_id: _Off = None
    name: _Off = None


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: _OffOrFalse = None
    continuous_usage_stats: _OffOrFalse = None


_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Label = Annotated[str, Field(max_length=512)]


class ChatRequest(_Strict):
    model: str
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128)
    stop: Annotated[
        Annotated[_Stop | None, Tag(ONE)] | Annotated[list[_Stop], Field(max_length=4), Tag(MANY)],
        Discriminator(_one_or_many),
    ] = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    # As vLLM has them.
    top_k: int | None = Field(None, ge=-1, description="Of the likeliest tokens; -1 and 0 are all.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="By default the model's own, which its folder holds."
    )
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=128)
    ignore_eos: bool | None = None
    # Cannot change an answer.
    user: _Label | None = None
    safety_identifier: _Label | None = None
    prompt_cache_key: _Label | None = None
    metadata: dict[str, str] | None = None
    service_tier: Annotated[Any, OnlyValues("auto", "default")] = None
    store: _OffOrFalse = None
    # Not here; the values that ask for nothing are taken.
    tools: _OffOrEmpty = None
    tool_choice: Annotated[Any, OnlyValues("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, OnlyValues(True, False)] = None
    functions: _OffOrEmpty = None
    function_call: Annotated[Any, OnlyValues("none", "auto")] = None
    response_format: Annotated[Any, OnlyValues({"type": "text"})] = None
    modalities: Annotated[Any, OnlyValues(["text"])] = None
    audio: _Off = None
    prediction: _Off = None
    web_search_options: _Off = None
    reasoning_effort: Annotated[Any, OnlyValues("none")] = None
    verbosity: Annotated[Any, OnlyValues("medium")] = None
    logit_bias: _OffOrNothing = None
    best_of: Annotated[Any, OnlyValues(1, advice="ask for n answers")] = None
    use_beam_search: _OffOrFalse = None
    length_penalty: Annotated[Any, OnlyValues(1)] = None
    early_stopping: _OffOrFalse = None
    echo: _OffOrFalse = None
    suffix: _Off = None
    max_new_tokens: Annotated[Any, OnlyValues(advice="use max_completion_tokens")] = None
    add_generation_prompt: _OffOrTrue = None
    continue_final_message: Annotated[
        Any, OnlyValues(False, advice="leave it out, and end the messages with the user's")
    ] = None
    add_special_tokens: _OffOrFalse = None
    chat_template: _Off = None
    chat_template_kwargs: _OffOrNothing = None
    documents: _OffOrEmpty = None
    mm_processor_kwargs: _OffOrNothing = None
    structured_outputs: _Off = None
    guided_json: _Off = None
    guided_regex: _Off = None
    guided_choice: _Off = None
    guided_grammar: _Off = None
    bad_words: _OffOrEmpty = None
    allowed_token_ids: _Off = None
    logits_processors: _OffOrEmpty = None
    prompt_logprobs: _Off = None
    truncate_prompt_tokens: _Off = None
    skip_special_tokens: _OffOrTrue = None
    spaces_between_special_tokens: _OffOrTrue = None
    include_stop_str_in_output: _OffOrFalse = None
    return_token_ids: _OffOrFalse = None
    return_tokens_as_token_ids: _OffOrFalse = None
    priority: Annotated[Any, OnlyValues(0)] = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Logprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(Logprob):
    top_logprobs: list[Logprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprobs] | None
    refusal: list[TokenLogprobs] | None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None


FinishReason = Literal["stop", "length"]


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class PromptDetails(BaseModel):
    cached_tokens: int
    visual_tokens: int = Field(description="Those of prompt_tokens that stand for images.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds to an answer; fields that are not set are not sent."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    """One event of a streamed answer; `usage` is not sent unless it is set."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


# --- embeddings ---------------------------------------------------------------------------------------------

_Input = Annotated[str, Field(min_length=1)]


def _no_token_ids(value: Any) -> Any:
    """Texts alone: ids are those of whatever tokenizer the client has."""
    first = value[0] if isinstance(value, list) and value else None
    first = first[0] if isinstance(first, list) and first else first
    if isinstance(first, int):
        raise PydanticCustomError(
            "token_ids", "token ids are of a tokenizer that may not be this server's; send texts"
        )
    return value


_InputPart = Annotated[TextPart | ImageUrlPart, Field(discriminator="type")]


def _text_or_part(value: Any) -> str:
    return MANY if isinstance(value, dict) else ONE


_InputItem = Annotated[
    Annotated[_Input, Tag(ONE)] | Annotated[_InputPart, Tag(MANY)], Discriminator(_text_or_part)
]


class EmbeddingsRequest(_Strict):
    model: str
    input: Annotated[
        Annotated[_Input, Tag(ONE)] | Annotated[list[_InputItem], Field(min_length=1), Tag(MANY)],
        Discriminator(_one_or_many),
        BeforeValidator(_no_token_ids),
    ] = Field(description="Texts, or parts as in chat: {type: text, ...} and {type: image_url, ...}.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    align: bool | None = Field(None, description="Map text embeddings by the fit, to where images are.")
    truncate_prompt_tokens: Literal[-1] | None = Field(
        None, description="-1 cuts longer texts to what the encoder takes; which ones, the answer says."
    )
    user: _Label | None = None

    @property
    def items(self) -> list[str | ImageUrlPart]:
        inputs = [self.input] if isinstance(self.input, str) else self.input
        return [item.text if isinstance(item, TextPart) else item for item in inputs]


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    truncated: bool = Field(description="Whether the end of a text was cut off, to what the encoder takes.")


class EmbeddingsUsage(BaseModel):
    prompt_tokens: int = Field(description="Of texts, as the encoder took them, padding not counted.")
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    encoder_fingerprint: str
    num_truncated: int = Field(description="Inputs that are truncated.")


# --- the rest -----------------------------------------------------------------------------------------------


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    embedding_dim: int
    num_visual_tokens: int
    encoder_fingerprint: str | None = Field(description="Of the encoder whose image embeddings it takes.")
    image_input: bool = Field(description="Whether it takes pictures, or image_embedding parts alone.")


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"]


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorObject
