"""One answer on its way from the engine's thread to the client: as text, as a whole response, or as events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from llava.errors import LlavaError
from llava.serve.engine import DETAILS_FAILED, End, Job, Row
from llava.serve.problems import EngineError, RequestError, problem
from llava.serve.schema import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    Details,
    FinishReason,
    Usage,
)

if TYPE_CHECKING:
    from starlette.requests import Request

logger = logging.getLogger(__name__)


class Answer:
    """The pieces of one answer, from the engine's thread into the event loop.

    Args:
        job: what is asked.
        model: name of the model.
        seconds: for the whole answer.
        started: `time.monotonic()` when the request came.

    Attributes:
        details: of the whole answer, when all its pieces have been read; None: nobody wants them.
    """

    def __init__(self, job: Job, model: str, seconds: float, started: float | None = None) -> None:
        self.job, self.model, self.seconds = job, model, seconds
        self.until = (time.monotonic() if started is None else started) + seconds
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.details: Details | None = None
        self._reason: End | None = None
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | LlavaError | None] = asyncio.Queue()
        self.row = Row(job, self._put, self._end)

    def _put(self, piece: str | LlavaError | None) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def _end(self, reason: End | LlavaError, row: Row) -> None:
        if isinstance(reason, LlavaError):
            self._put(reason)
        else:
            self._reason = reason
            self._put(None)

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes.

        Raises:
            RequestError: the time is over.
            EngineError: the model failed.
        """
        try:
            while True:
                try:
                    async with asyncio.timeout(self.until - time.monotonic()):
                        piece = await self._pieces.get()
                except TimeoutError as error:
                    raise RequestError(f"the answer took more than {self.seconds:g} s", status=504) from error
                if piece is None:
                    await self._format_details()
                    return
                if isinstance(piece, LlavaError):
                    raise piece
                yield piece
        finally:
            self.row.cancel()

    async def _format_details(self) -> None:
        """Set `details`; in a thread, so that neither the engine nor other answers wait.

        Raises:
            RequestError: the time is over.
            EngineError: they cannot be formatted.
        """
        if self.row.details is None:
            return
        try:
            async with asyncio.timeout(self.until - time.monotonic()):
                self.details = await asyncio.to_thread(self.row.details)
        except TimeoutError as error:
            raise RequestError(f"the answer took more than {self.seconds:g} s", status=504) from error
        except Exception as error:  # the answer itself is whole; the log has the trace
            logger.exception("the details of an answer failed")
            raise EngineError(DETAILS_FAILED) from error

    @property
    def reason(self) -> FinishReason:
        """Why the answer ended; a row that was cancelled is answered to nobody."""
        return "length" if self._reason == "length" else "stop"

    @property
    def usage(self) -> Usage:
        """Numbers of tokens; an image counts as the positions it takes."""
        prompt = len(self.job.input_ids) - len(self.job.images) + self.job.positions
        return Usage(prompt_tokens=prompt, completion_tokens=self.row.tokens, total_tokens=prompt + self.row.tokens)

    def completion(self, text: str) -> ChatCompletion:
        """The response for the whole text."""
        choice = Choice(message=AnswerMessage(content=text), finish_reason=self.reason)
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[choice],
            usage=self.usage,
            details=self.details,
        )

    def event(self, choices: list[ChunkChoice], usage: Usage | None = None, details: Details | None = None) -> str:
        """One chunk as a server-sent event; all of an answer have one id and one time."""
        chunk = ChatCompletionChunk(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage, details=details
        )
        content = sent(chunk)
        for choice in content["choices"]:  # a delta names what it adds and nothing else
            choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
        return f"data: {json.dumps(content)}\n\n"


def sent(response: ChatCompletion | ChatCompletionChunk) -> dict[str, Any]:
    """JSON values of a response; what only some requests ask for is left out of the others."""
    return response.model_dump(exclude={name for name in ("usage", "details") if getattr(response, name) is None})


async def whole(request: Request, answer: Answer) -> str:
    """The answer at once; cancelled if the client goes away.

    Raises:
        RequestError: the client went away, or the time is over.
        EngineError: the model failed.
    """

    async def collect() -> str:
        return "".join([piece async for piece in answer.pieces()])

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    reading, leaving = asyncio.create_task(collect()), asyncio.create_task(gone())
    done, _ = await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
    if reading not in done:
        answer.row.cancel()
        reading.cancel()
        raise RequestError("the client went away", status=499)
    leaving.cancel()
    return (await reading).strip()


async def events(answer: Answer, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer; an error that comes late is the last of them."""
    yield answer.event([ChunkChoice(delta=Delta(role="assistant", content=""))])
    try:
        begun, blanks = False, ""
        async for piece in answer.pieces():
            piece = blanks + (piece if begun else piece.lstrip())
            text = piece.rstrip()
            begun, blanks = begun or bool(text), piece[len(text) :]  # white space at either end is no answer
            if text:
                yield answer.event([ChunkChoice(delta=Delta(content=text))])
    except LlavaError as error:
        yield f"data: {json.dumps(problem(error))}\n\n"
        return
    yield answer.event([ChunkChoice(delta=Delta(), finish_reason=answer.reason)], details=answer.details)
    if include_usage:
        yield answer.event([], answer.usage)
    yield "data: [DONE]\n\n"
