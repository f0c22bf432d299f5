"""Calls from the HTTP side to replicas: time limits, retries, failures and refusals."""

import asyncio
import contextlib
import functools
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from revision_ray.core.errors import RevisionError
from revision_ray.data.images import UndecodableImage
from revision_ray.serve.engine import AnswerPiece, Prompt, QueueFull
from revision_ray.serve.metrics import instruments
from revision_ray.serve.protocol import ApiError
from revision_ray.serve.sampling import Sampling
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


@dataclass(frozen=True)
class Refusal:
    """What a replica returns instead of raising an error that the request itself caused.

    Serve logs every exception of a replica with its trace (`Request failed.`), counts it as the deployment's
    error, and has no setting against either. A refusal must cost little under load and log no prompt.
    """

    error: Exception


_REFUSED = (RevisionError, QueueFull, TimeoutError)


def refusals_as_values(method: Any) -> Any:
    """Decorate a coroutine or an async generator method of a replica: return or yield its refusals.

    `value_of` raises them again on the caller's side.
    """
    if inspect.isasyncgenfunction(method):

        @functools.wraps(method)
        async def stream(*args: Any) -> AsyncIterator[Any]:
            try:
                async with contextlib.aclosing(method(*args)) as items:
                    async for item in items:
                        yield item
            except _REFUSED as error:
                yield Refusal(error)

        return stream

    @functools.wraps(method)
    async def call(*args: Any) -> Any:
        try:
            return await method(*args)
        except _REFUSED as error:
            return Refusal(error)

    return call


def value_of(answer: T | Refusal) -> T:
    """Return the `answer` of a replica, or raise the error of its refusal."""
    if isinstance(answer, Refusal):
        raise answer.error
    return answer


def explained(error: Exception, part: str) -> ApiError:
    """The answer to a request that failed with `error` in `part` of the application.

    Raises:
        Exception: `error` itself, which is no one's fault but ours.
    """
    cause = cause_of(error)
    if isinstance(cause, ApiError):
        return cause
    # Serve's BackpressureConfig (app.py) answers what its proxy refuses. What a handle behind the ingress
    # refuses arrives here, and is answered with the API's error object.
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
