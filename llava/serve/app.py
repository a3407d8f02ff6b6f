"""The routes of the server: OpenAI's chat completions and list of models, and a health check.

A request is read and its images are opened beside the event loop; the engine's thread hands pieces of the answer
back. Whoever goes away, or whose time is over, is cancelled, so that nothing is generated for nobody.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.eval.answering.answers import Task
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.prompts import prompt_ids
from llava.eval.answering.runner import load_images
from llava.serve.chat_request import ChatRequest, Defaults, RequestError, conversation_of, read_request
from llava.serve.engine import BusyError, End, Engine, EngineError, Job, Row
from llava.serve.image_urls import ImagePolicy

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response


@dataclass(frozen=True)
class Settings:
    """What a server allows.

    Attributes:
        conv_mode: conversation template.
        defaults: of requests, and their limits.
        images: which images are opened.
        seconds: for a whole answer, waiting included.
        max_body: bytes of a request.
        api_key: what `Authorization: Bearer` must say; None: nothing is asked.
    """

    conv_mode: str
    defaults: Defaults = field(default_factory=Defaults)
    images: ImagePolicy = field(default_factory=ImagePolicy)
    seconds: float = 300.0
    max_body: int = 64 * 2**20
    api_key: str | None = None


class Answer:
    """The pieces of one answer, from the engine's thread into the event loop."""

    def __init__(self, job: Job, seconds: float) -> None:
        self.job, self.until = job, time.monotonic() + seconds
        self.seconds = seconds
        self.reason: End | None = None
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | LlavaError | None] = asyncio.Queue()
        self.row = Row(job, self._put, self._end)

    def _put(self, piece: str | LlavaError | None) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def _end(self, reason: End | LlavaError, row: Row) -> None:
        if isinstance(reason, LlavaError):
            self._put(reason)
        else:
            self.reason = reason
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
                    return
                if isinstance(piece, LlavaError):
                    raise piece
                yield piece
        finally:
            self.row.cancel()

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens; an image counts as the positions it takes."""
        images, prompt = self.job.positions, len(self.job.input_ids) - len(self.job.images)
        return {
            "prompt_tokens": prompt + images,
            "completion_tokens": self.row.tokens,
            "total_tokens": prompt + images + self.row.tokens,
        }


def make_job(request: ChatRequest, loaded: LoadedModel, settings: Settings) -> Job:
    """Open the images, build the prompt and check its length.

    Raises:
        LlavaError: what the request has wrong.
    """
    config = loaded.model.config
    conversation = conversation_of(
        request, settings.conv_mode, loaded.tokenizer, bool(getattr(config, "mm_use_im_start_end", False))
    )
    ids = prompt_ids(conversation, loaded.tokenizer)
    task = Task(0, "", "", request.images, where="messages")
    images = load_images(task, loaded, settings.images.open_for(loaded))
    sizes = [image.size for image in images]
    positions = sum(loaded.model.image_lengths([image.pixels for image in images], sizes)) if images else 0
    length = len(ids) - int((ids == IMAGE_TOKEN_INDEX).sum()) + positions
    limit = getattr(config, "tokenizer_model_max_length", None)
    if limit is not None and length > limit:
        raise RequestError(f"the conversation has {length} positions, and the model takes {limit}", "messages")
    end = loaded.answer_end(settings.conv_mode)
    return Job(ids, images, request.options, (*request.stops, *end.texts), positions, end.ids)


def create_app(loaded: LoadedModel, engine: Engine, settings: Settings) -> FastAPI:
    """The server's application; it starts and closes the engine.

    Args:
        loaded: the model.
        engine: made for it, not started.
        settings: limits and defaults.
    """
    # An extra of the installation, needed by nothing else.
    from fastapi import FastAPI
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse, StreamingResponse

    # The engine's thread lives as long as the application, so a test can start and stop both.
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.close)

    async def completions(request: Request) -> Response:
        try:
            # The key and the size come first: a stranger is refused before anything else is read.
            _check_key(request, settings.api_key)
            asked = read_request(await _body(request, settings.max_body), settings.defaults)
            if asked.model != loaded.name:
                raise RequestError(
                    f"the model '{asked.model}' is not served here; '{loaded.name}' is", "model", status=404
                )
            # Images are opened and prompts tokenized outside the event loop, which streams other answers meanwhile.
            job = await run_in_threadpool(make_job, asked, loaded, settings)
            answer = Answer(job, settings.seconds)
            engine.submit(answer.row)
            frame = partial(_frame, f"chatcmpl-{uuid.uuid4().hex}", loaded.name)
            # Errors of a stream that has begun travel in it as events: its status line has been sent.
            if asked.stream:
                return StreamingResponse(_events(answer, frame, asked.include_usage), media_type="text/event-stream")
            text = await _whole(request, answer)
        except LlavaError as error:
            return JSONResponse(_problem(error), _status(error))
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": answer.reason, "logprobs": None}
        return JSONResponse(frame("chat.completion", [choice]) | {"usage": answer.usage})

    async def models(request: Request) -> Response:
        try:
            _check_key(request, settings.api_key)
        except RequestError as error:
            return JSONResponse(_problem(error), error.status)
        model = {"id": loaded.name, "object": "model", "created": started, "owned_by": "llava-extensions"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(request: Request) -> Response:
        # Without a key, for load balancers; it says how busy the server is and nothing of its requests.
        state = {"status": "ok" if engine.alive else "stopped"}
        load = {"answering": len(engine.answering), "waiting": engine.waiting}
        return JSONResponse(state | load, 200 if engine.alive else 503)

    started = int(time.time())
    # No schema page: FastAPI's own would be open to anybody, key or not.
    app = FastAPI(title="llava-extensions", lifespan=lifespan, openapi_url=None)
    app.add_route("/v1/chat/completions", completions, methods=["POST"])
    app.add_route("/v1/models", models, methods=["GET"])
    app.add_route("/health", health, methods=["GET"])
    return app


async def _body(request: Request, limit: int) -> Any:
    """The decoded JSON, never reading more than `limit` bytes.

    Raises:
        RequestError: too large, or no JSON.
    """
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise RequestError(f"the body has more than {limit} bytes; send smaller or fewer images", status=413)
    try:
        return json.loads(content)
    except ValueError as error:
        raise RequestError(f"the body is no JSON: {error}") from error


def _check_key(request: Request, key: str | None) -> None:
    """Refuse whoever does not know the key.

    Raises:
        RequestError: with status 401.
    """
    given = request.headers.get("authorization", "")
    if key is not None and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise RequestError("the API key is missing or wrong", status=401)


async def _whole(request: Request, answer: Answer) -> str:
    """The answer at once; cancelled if the client goes away."""

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


async def _events(answer: Answer, frame: Any, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer; an error that comes late is the last of them."""

    def event(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return f"data: {json.dumps(frame('chat.completion.chunk', [choice]))}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        begun, blanks = False, ""
        async for piece in answer.pieces():
            piece = blanks + (piece if begun else piece.lstrip())
            text = piece.rstrip()
            begun, blanks = begun or bool(text), piece[len(text) :]  # white space at either end is no answer
            if text:
                yield event({"content": text})
    except LlavaError as error:
        yield f"data: {json.dumps(_problem(error))}\n\n"
        return
    yield event({}, answer.reason)
    if include_usage:
        yield f"data: {json.dumps(frame('chat.completion.chunk', []) | {'usage': answer.usage})}\n\n"
    yield "data: [DONE]\n\n"


def _frame(identity: str, model: str, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model, "choices": choices}


def _status(error: LlavaError) -> int:
    """HTTP status of an error."""
    if isinstance(error, RequestError):
        return error.status
    return 429 if isinstance(error, BusyError) else 500 if isinstance(error, EngineError) else 400


def _problem(error: LlavaError) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    status = _status(error)
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    code = "model_not_found" if status == 404 else "invalid_api_key" if status == 401 else None
    return {"error": {"message": str(error), "type": kind, "param": getattr(error, "param", None), "code": code}}
