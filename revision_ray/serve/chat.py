"""POST /v1/chat/completions: messages to a prompt, the model's pieces to choices or server-sent events."""

import asyncio
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from revision_ray.serve.calls import LanguageModelCalls, PendingAnswer, explained, together
from revision_ray.serve.engine import AnswerPiece, Prompt, TokenLogprob
from revision_ray.serve.images import ServedImages
from revision_ray.serve.metrics import instruments
from revision_ray.serve.prompt import ModelFacts, Prompter, conversation_of
from revision_ray.serve.protocol import (
    AnswerMessage,
    ApiError,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    ErrorResponse,
    FinishReason,
    Logprob,
    PromptDetails,
    TokenLogprobs,
    Usage,
    internal,
)
from revision_ray.serve.sampling import Sampling
from revision_ray.serve.settings import RequestLimits

# JSON has no infinity; OpenAI's API says -9999 for tokens that cannot be.
_LEAST_LOGPROB = -9999.0


class ChatStream:
    """Answers that have begun, as the events of a streamed completion."""

    def __init__(
        self,
        answers: Sequence[PendingAnswer],
        *,
        head: dict[str, Any],
        usage: Callable[[int], Usage],
        with_logprobs: bool,
        with_usage: bool,
        timeout_s: float,
    ) -> None:
        """`usage` is called once, with the answers' number of tokens; `timeout_s` bounds the whole stream."""
        self._answers, self._head, self._usage = answers, head, usage
        self._with_logprobs, self._with_usage, self._timeout_s = with_logprobs, with_usage, timeout_s

    def close(self) -> None:
        """No replica works on the answers any more."""
        for answer in self._answers:
            answer.close()

    async def events(self) -> AsyncIterator[bytes]:
        """A chunk for each piece that says something; an error is an event of its own, and the last."""
        num_tokens = [0] * len(self._answers)
        ends = time.monotonic() + self._timeout_s
        try:
            for index in range(len(self._answers)):
                yield self._chunk(index, Delta(role="assistant", content=""))
            async for index, piece in merged(self._answers):
                if time.monotonic() > ends:  # each piece has a limit of its own
                    raise TimeoutError
                num_tokens[index] = piece.num_tokens
                token_logprobs = logprobs([piece]) if self._with_logprobs and piece.token else None
                if piece.text or token_logprobs:
                    yield self._chunk(index, Delta(content=piece.text), token_logprobs)
                if piece.finish_reason is not None:
                    yield self._chunk(index, Delta(), finish_reason=piece.finish_reason)
            usage = self._usage(sum(num_tokens))
            if self._with_usage:
                yield _event(ChatCompletionChunk(**self._head, choices=[], usage=usage))
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield _event(_error_response(error))
        finally:
            self.close()

    def _chunk(
        self,
        index: int,
        delta: Delta,
        token_logprobs: ChoiceLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> bytes:
        choice = ChunkChoice(index=index, delta=delta, logprobs=token_logprobs, finish_reason=finish_reason)
        usage: dict[str, Any] = {"usage": None} if self._with_usage else {}
        return _event(ChatCompletionChunk(**self._head, choices=[choice], **usage))


class EventStream(StreamingResponse):
    """Sends the stream's events; when the client has gone, or anything fails, the answers are closed."""

    media_type = "text/event-stream"

    def __init__(self, stream: ChatStream) -> None:
        # Proxies on the way must not collect events.
        super().__init__(stream.events(), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Also where the client left before the first event was asked for.
            self._stream.close()


async def merged(answers: Sequence[PendingAnswer]) -> AsyncIterator[tuple[int, AnswerPiece]]:
    """(index of its answer, piece) of all answers, as they come."""
    if len(answers) == 1:
        async for piece in answers[0].pieces():
            yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, AnswerPiece] | Exception | None] = asyncio.Queue()

    async def pump(index: int, answer: PendingAnswer) -> None:
        try:
            async for piece in answer.pieces():
                queue.put_nowait((index, piece))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(index, answer)) for index, answer in enumerate(answers)]
    try:
        num_ended = 0
        while num_ended < len(tasks):
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_ended += 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


def logprobs(pieces: Iterable[AnswerPiece]) -> ChoiceLogprobs:
    """Return the log probabilities of the pieces' tokens; pieces without a token are left out."""
    content = [
        TokenLogprobs(
            **_logprob_fields(piece.token),
            top_logprobs=[Logprob(**_logprob_fields(other)) for other in piece.top],
        )
        for piece in pieces
        if piece.token
    ]
    return ChoiceLogprobs(content=content, refusal=None)


def _logprob_fields(token: TokenLogprob) -> dict[str, Any]:
    finite = token.logprob if math.isfinite(token.logprob) else _LEAST_LOGPROB
    return {"token": token.token, "logprob": max(finite, _LEAST_LOGPROB), "bytes": list(token.bytes)}


def _error_response(error: Exception) -> ErrorResponse:
    try:
        api_error = explained(error, "language model")
    except Exception as unexpected:
        api_error = internal(unexpected)
    return ErrorResponse.model_validate(api_error.body())


def _event(body: BaseModel) -> bytes:
    """Write a server-sent event whose data are the fields of `body` that are set."""
    text = json.dumps(body.model_dump(exclude_unset=True), ensure_ascii=False, allow_nan=False)
    return b"data: " + text.encode() + b"\n\n"


class ChatCompletions:
    """Answers chat requests for one model."""

    def __init__(
        self,
        model: str,
        facts: ModelFacts,
        prompter: Prompter,
        calls: LanguageModelCalls,
        images: ServedImages,
        limits: RequestLimits,
    ) -> None:
        self._model, self._vocab_size = model, facts.vocab_size
        self._context_length = facts.context_length
        self._prompter, self._calls, self._images, self._limits = prompter, calls, images, limits
        # A tokenizer is not for several threads at once; and a long text must not hold up the event loop.
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")

    async def prompt(self, request: ChatRequest) -> Prompt:
        """What the model is asked.

        Raises:
            ApiError: the request asks for what this server or its model cannot do.
        """
        self._check(request)
        conversation = conversation_of(request.messages)
        if conversation.num_characters > self._limits.max_text_characters:
            raise ApiError(
                400,
                f"messages: {conversation.num_characters} characters, at most "
                f"{self._limits.max_text_characters}; send shorter texts, or fewer of them",
                param="messages",
                code="context_length_exceeded",
            )
        loop = asyncio.get_running_loop()
        # Before images are fetched and encoded: a prompt that does not fit costs little.
        input_ids = await loop.run_in_executor(self._tokenizing, self._prompter.input_ids, conversation)
        self._check_length(request, len(input_ids), len(conversation.images))
        rows_ID = await self._images.embeddings(conversation.images)
        instruments().prompt_tokens.inc(len(input_ids))
        instruments().visual_tokens.inc(len(rows_ID) * self._prompter.num_visual_tokens)
        return Prompt(input_ids=input_ids, image_embeds=rows_ID)

    def _check_length(self, request: ChatRequest, num_tokens: int, num_images: int) -> None:
        if not num_tokens:
            message = "messages: their text is empty, and so is the prompt; send a text or an image"
            raise ApiError(400, message, param="messages", code="empty_prompt")
        room = self._context_length - num_tokens
        if room < 1:
            visual = num_images * self._prompter.num_visual_tokens
            of_images = f", {visual} of them for {num_images} images" if visual else ""
            raise ApiError(
                400,
                f"messages: {num_tokens} tokens{of_images}, and the model's context holds "
                f"{self._context_length}, the answer included; send less",
                param="messages",
                code="context_length_exceeded",
            )
        if (request.min_tokens or 0) > room:
            raise ApiError(
                400,
                f"min_tokens: the messages leave {room} of the {self._context_length} tokens of the model's "
                "context for the answer; ask for no more",
                param="min_tokens",
                code="context_length_exceeded",
            )

    def _check(self, request: ChatRequest) -> None:
        limits = self._limits
        if request.messages[-1].role == "assistant":
            last = f"messages[{len(request.messages) - 1}]"
            raise ApiError(
                400,
                f"{last}: the last message is the assistant's, and this server continues none; end with the "
                "user's, whose answer begins anew",
                param=f"{last}.role",
                code="unsupported_value",
            )
        both = (request.max_completion_tokens, request.max_tokens)
        if None not in both and both[0] != both[1]:
            raise ApiError(
                400, "max_tokens: is the older name of max_completion_tokens; send one", param="max_tokens"
            )
        if (request.min_tokens or 0) > self._max_tokens(request):
            raise ApiError(
                400,
                f"min_tokens: the answer has {self._max_tokens(request)} tokens at most "
                "(max_completion_tokens); lower the one or raise the other",
                param="min_tokens",
            )
        for position, token in enumerate(request.stop_token_ids or ()):
            if token >= self._vocab_size:
                param = f"stop_token_ids[{position}]"
                message = f"{param}: the model's vocabulary has {self._vocab_size} tokens, from 0 on"
                raise ApiError(400, message, param=param)
        if len(request.messages) > limits.max_messages:
            raise ApiError(400, f"messages: at most {limits.max_messages}", param="messages")
        if (request.n or 1) > limits.max_choices:
            raise ApiError(400, f"n: at most {limits.max_choices}", param="n")
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs: set logprobs to true as well", param="top_logprobs")
        if request.stream_options is not None and not request.stream:
            raise ApiError(400, "stream_options: for streams alone; set stream", param="stream_options")

    def _max_tokens(self, request: ChatRequest) -> int:
        """Of an answer, which ends with finish_reason "length" there, or where the context ends before."""
        limit = request.max_completion_tokens or request.max_tokens or self._limits.max_tokens_default
        return min(limit, self._context_length)

    def samplings(self, request: ChatRequest) -> list[Sampling]:
        """One for each choice. Of a seed, each choice has one of its own."""
        return [
            Sampling(
                max_tokens=self._max_tokens(request),
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                top_k=request.top_k if (request.top_k or 0) > 0 else None,
                min_p=request.min_p or 0.0,
                repetition_penalty=request.repetition_penalty,
                presence_penalty=request.presence_penalty or 0.0,
                frequency_penalty=request.frequency_penalty or 0.0,
                min_tokens=request.min_tokens or 0,
                stop_token_ids=tuple(request.stop_token_ids or ()),
                ignore_eos=bool(request.ignore_eos),
                stop=request.stops,
                seed=None if request.seed is None else (request.seed + choice) % 2**63,
                top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            )
            for choice in range(request.n or 1)
        ]

    async def complete(self, request: ChatRequest, prompt: Prompt) -> ChatCompletion:
        """Return the body of an answer that is not streamed.

        Raises:
            ApiError: the model refused, or failed.
        """
        answers = await together([self._calls.whole(prompt, each) for each in self.samplings(request)])
        choices = [
            Choice(
                index=index,
                message=AnswerMessage(role="assistant", content="".join(piece.text for piece in pieces)),
                logprobs=logprobs(pieces) if request.logprobs else None,
                finish_reason=pieces[-1].finish_reason,  # type: ignore[arg-type]  # the last piece has one
            )
            for index, pieces in enumerate(answers)
        ]
        usage = self._usage(prompt, sum(pieces[-1].num_tokens for pieces in answers))
        return ChatCompletion(**self._head("chat.completion"), choices=choices, usage=usage)

    async def start(self, request: ChatRequest, prompt: Prompt) -> ChatStream:
        """The events of a streamed answer, each of whose choices has begun.

        Raises:
            ApiError: the model refused one of them.
        """
        answers: list[PendingAnswer] = []

        async def one(sampling: Sampling) -> PendingAnswer:
            answers.append(answer := await self._calls.start(prompt, sampling))
            return answer

        try:
            started = await together([one(sampling) for sampling in self.samplings(request)])
        except BaseException:
            for answer in answers:
                answer.close()
            raise
        return ChatStream(
            started,
            head=self._head("chat.completion.chunk"),
            usage=lambda num_tokens: self._usage(prompt, num_tokens),
            with_logprobs=bool(request.logprobs),
            with_usage=bool(request.stream_options and request.stream_options.include_usage),
            timeout_s=self._limits.request_timeout_s,
        )

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self._model,
        }

    def _usage(self, prompt: Prompt, completion_tokens: int) -> Usage:
        visual = len(prompt.image_embeds) * self._prompter.num_visual_tokens
        total = len(prompt.input_ids)
        return Usage(
            prompt_tokens=total,
            completion_tokens=completion_tokens,
            total_tokens=total + completion_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=0, visual_tokens=visual),
        )
