"""An answer as server-sent events: the choices' pieces as they come, usage, and an error, if there is one."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from revision_ray.serve.api_error import internal
from revision_ray.serve.calls import Answer, explained
from revision_ray.serve.engine import Piece, TokenLogprob

# JSON has no infinity; OpenAI's API says -9999 for tokens that cannot be.
_LEAST_LOGPROB = -9999.0


class ChatStream:
    """Answers that have begun, as the events of a streamed completion."""

    def __init__(
        self,
        answers: Sequence[Answer],
        *,
        head: dict[str, Any],
        usage: Callable[[int], dict[str, Any]],
        with_logprobs: bool,
        with_usage: bool,
        timeout_s: float,
    ) -> None:
        """`usage` is told the answers' tokens, once; `timeout_s` is for the whole stream."""
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
                yield self._chunk(index, {"role": "assistant", "content": ""})
            async for index, piece in merged(self._answers):
                if time.monotonic() > ends:  # each piece has a limit of its own
                    raise TimeoutError
                num_tokens[index] = piece.num_tokens
                said = logprobs([piece]) if self._with_logprobs and piece.token else None
                if piece.text or said:
                    yield self._chunk(index, {"content": piece.text}, said)
                if piece.finish_reason is not None:
                    yield self._chunk(index, {}, finish_reason=piece.finish_reason)
            usage = self._usage(sum(num_tokens))
            if self._with_usage:
                yield _event(self._head | {"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield _event(_said(error))
        finally:
            self.close()

    def _chunk(
        self, index: int, delta: dict[str, Any], said: Any = None, finish_reason: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": said, "finish_reason": finish_reason}
        usage = {"usage": None} if self._with_usage else {}
        return _event(self._head | {"choices": [choice]} | usage)


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


async def merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Piece]]:
    """(index of its answer, piece) of all answers, as they come."""
    if len(answers) == 1:
        async for piece in answers[0].pieces():
            yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()

    async def pump(index: int, answer: Answer) -> None:
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


def logprobs(pieces: Iterable[Piece]) -> dict[str, Any]:
    """OpenAI's object for the tokens of pieces that name theirs."""
    content = [
        _logprob(piece.token) | {"top_logprobs": [_logprob(other) for other in piece.top]}
        for piece in pieces
        if piece.token
    ]
    return {"content": content, "refusal": None}


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    known = token.logprob if math.isfinite(token.logprob) else _LEAST_LOGPROB
    return {"token": token.token, "logprob": max(known, _LEAST_LOGPROB), "bytes": list(token.bytes)}


def _said(error: Exception) -> dict[str, Any]:
    try:
        return explained(error, "language model").body()
    except Exception as unexpected:
        return internal(unexpected).body()


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
