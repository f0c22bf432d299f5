"""What clients send and get: requests and responses of the OpenAI API, and the parts that are our own.

Requests are strict (no number in a string, no NaN). Fields that are not named here are ignored, but for those
that would change the answer: they are refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from revision_ray.serve.api_error import MANY, ONE, ApiError


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


def _one_or_many(value: Any) -> str:
    """The branch that the value is meant for, which alone then explains what is wrong with it."""
    return MANY if isinstance(value, list) else ONE


# --- chat ---------------------------------------------------------------------------------------------------


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str = Field(description="data:image/...;base64,... or, where the server allows it, https://...")


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


class StreamOptions(_Strict):
    include_usage: bool | None = None


_Stop = Annotated[str, Field(min_length=1, max_length=1000)]


# Field -> values that mean "off" and so are what this server does anyway.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
}


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

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        for name, harmless in _UNSUPPORTED.items() if isinstance(body, dict) else ():
            if name in body and body[name] not in harmless:
                message = f"{name} is not supported by this server; leave it out"
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        return body

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


# --- embeddings ---------------------------------------------------------------------------------------------

_Input = Annotated[str, Field(min_length=1)]
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
    ] = Field(description="Texts, or parts as in chat: {type: text, ...} and {type: image_url, ...}.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    align: bool | None = Field(None, description="Map text embeddings by the fit, to where images are.")

    @property
    def items(self) -> list[str | ImageUrlPart]:
        inputs = [self.input] if isinstance(self.input, str) else self.input
        return [item.text if isinstance(item, TextPart) else item for item in inputs]


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    encoder_fingerprint: str


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
