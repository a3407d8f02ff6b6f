"""The routes of the server: OpenAI's chat completions and list of models, and a health check.

A request is read and its images are opened outside the event loop; the engine's thread hands pieces of the answer
back. Whoever goes away, or whose time is over, is cancelled, so that nothing is generated for nobody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llava import __version__
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import FlagError, LlavaError
from llava.eval.answering.answers import Task
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.prompts import prompt_ids
from llava.eval.answering.runner import load_images
from llava.inference_options import call_extensions
from llava.serve.answer import Answer, events, sent, whole
from llava.serve.body import HELD_BODIES, BodyLimits, Held, read_json
from llava.serve.chat_request import ChatRequest, conversation_of, read_request
from llava.serve.defaults import Defaults
from llava.serve.engine import Engine, Job
from llava.serve.guard import Access, Guard
from llava.serve.image_fetch import fetch_images
from llava.serve.image_urls import LARGE, ONE_LARGE, ImagePolicy, RequestImages
from llava.serve.openapi import document
from llava.serve.problems import BusyError, RequestError, problem, problem_of, short, status_of
from llava.serve.schema import Health, Model, ModelList

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

PREPARED_AT_ONCE = 4
"""Requests whose images are decoded and whose prompts are tokenized at the same time; each may take a gigabyte."""


@dataclass(frozen=True)
class Settings:
    """What a server allows.

    Attributes:
        conv_mode: conversation template.
        defaults: of requests, and their limits.
        images: which images are opened.
        seconds: for a whole answer, waiting included.
        body: size of a request, and time for it.
        access: who may ask.
    """

    conv_mode: str
    defaults: Defaults = field(default_factory=Defaults)
    images: ImagePolicy = field(default_factory=ImagePolicy)
    seconds: float = 300.0
    body: BodyLimits = field(default_factory=BodyLimits)
    access: Access = field(default_factory=Access)


def make_job(
    request: ChatRequest, loaded: LoadedModel, settings: Settings, fetched: Mapping[str, bytes] | None = None
) -> Job:
    """Open the images, build the prompt and check its length.

    Args:
        request: what is asked.
        loaded: the model.
        settings: limits.
        fetched: see `ImagePolicy.open`.

    Raises:
        LlavaError: what the request has wrong.
    """
    config = loaded.model.config
    conversation = conversation_of(
        request, settings.conv_mode, loaded.tokenizer, bool(getattr(config, "mm_use_im_start_end", False))
    )
    ids = prompt_ids(conversation, loaded.tokenizer)
    task = Task(0, "", "", request.images, where="messages")
    opener = RequestImages(settings.images, loaded, fetched)
    # Without a tower there is nothing that images are made into; `load_images` says so.
    largest = opener.check(request.images, task.where) if loaded.image_processor is not None else 0
    with ONE_LARGE if largest > LARGE else nullcontext():
        images = load_images(task, loaded, opener.open)
    sizes = [image.size for image in images]
    positions = sum(loaded.model.image_lengths([image.pixels for image in images], sizes)) if images else 0
    length = len(ids) - int((ids == IMAGE_TOKEN_INDEX).sum()) + positions
    limit = getattr(config, "tokenizer_model_max_length", None)
    if limit is not None and length > limit:
        raise RequestError(f"the conversation has {length} positions, and the model takes {limit}", "messages")
    end = loaded.answer_end(settings.conv_mode)
    stops = (*request.stops, *end.texts)
    try:
        extensions = call_extensions(loaded.model, dict(request.inference))
    except FlagError as error:
        raise RequestError(str(error), request.inference[0][0]) from error
    return Job(
        ids, images, request.options, stops, positions, end.ids, request.wants_details, request.inference, extensions
    )


class Routes:
    """What the paths of the server do.

    Args:
        loaded: the model.
        engine: made for it.
        settings: limits and defaults.
    """

    def __init__(self, loaded: LoadedModel, engine: Engine, settings: Settings) -> None:
        self.loaded, self.engine, self.settings = loaded, engine, settings
        self.model = Model(id=loaded.name, created=int(time.time()))
        self._preparing = asyncio.Semaphore(PREPARED_AT_ONCE)
        self._held = Held(HELD_BODIES * settings.body.max_bytes)

    async def completions(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        from starlette.responses import JSONResponse, StreamingResponse

        started = time.monotonic()
        try:
            with self._held.body() as take:
                body = await read_json(request, self.settings.body, take)
                asked = read_request(body, self.settings.defaults)
                del body
                self._check_model(asked.model)
                stream, include_usage = asked.stream, asked.include_usage
                job = await self._prepare(asked, started, take)
                # Its images are in the job as pixels; an answer may take minutes, and nothing counts these bytes then.
                del asked
            answer = Answer(job, self.loaded.name, self.settings.seconds, started)
            self.engine.submit(answer.row)
            # Errors of a stream that has begun travel in it as events: its status line has been sent.
            if stream:
                return StreamingResponse(events(answer, include_usage), media_type="text/event-stream")
            text = await whole(request, answer)
        except LlavaError as error:
            return self._refusal(error)
        return JSONResponse(sent(answer.completion(text)))

    async def _prepare(self, asked: ChatRequest, started: float, take: Callable[[int], None]) -> Job:
        """The job of a request, made outside the event loop, which streams other answers meanwhile.

        Args:
            asked: the request.
            started: `time.monotonic()` when it came.
            take: called with the number of bytes of images that are about to be held; see `Held`.

        Raises:
            RequestError: a message or an image cannot be used, or the time is over.
            BusyError: too much is held for other requests.
        """
        try:
            fetched = await fetch_images(asked.images, self.settings.images, take)
            async with asyncio.timeout(self.settings.seconds - (time.monotonic() - started)):
                await self._preparing.acquire()
        except TimeoutError as error:
            raise RequestError(f"the answer took more than {self.settings.seconds:g} s", status=504) from error
        except (RequestError, BusyError):
            raise
        except LlavaError as error:
            raise RequestError(str(error), "messages") from error
        try:
            return await asyncio.to_thread(make_job, asked, self.loaded, self.settings, fetched)
        except RequestError:
            raise
        except LlavaError as error:
            raise RequestError(str(error), "messages") from error
        finally:
            self._preparing.release()

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        from starlette.responses import JSONResponse

        return JSONResponse(ModelList(data=[self.model]).model_dump())

    async def one_model(self, request: Request) -> Response:
        """`GET /v1/models/{model}`."""
        from starlette.responses import JSONResponse

        try:
            self._check_model(request.path_params["model"])
        except RequestError as error:
            return self._refusal(error)
        return JSONResponse(self.model.model_dump())

    async def health(self, request: Request) -> Response:
        """`GET /health`: without a key, for load balancers; it says how busy the server is, not what with."""
        from starlette.responses import JSONResponse

        state = Health(
            status="ok" if self.engine.alive else "stopped",
            answering=len(self.engine.answering),
            waiting=self.engine.waiting,
        )
        return JSONResponse(state.model_dump(), 200 if self.engine.alive else 503)

    def _check_model(self, name: str) -> None:
        if name != self.loaded.name:
            raise RequestError(
                f"the model {short(name)} is not served here; '{self.loaded.name}' is",
                "model",
                status=404,
                code="model_not_found",
            )

    def _refusal(self, error: LlavaError) -> Response:
        from starlette.responses import JSONResponse

        headers = {"Retry-After": "1"} if status_of(error) == 429 else {}
        # The rest of a body that does not arrive is not waited for.
        headers |= {"Connection": "close"} if status_of(error) == 408 else {}
        return JSONResponse(problem(error), status_of(error), headers)


def create_app(loaded: LoadedModel, engine: Engine, settings: Settings) -> FastAPI:
    """The server's application; it starts and closes the engine.

    Args:
        loaded: the model.
        engine: made for it, not started.
        settings: limits and defaults.
    """
    # An extra of the installation, needed by nothing else.
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    # The engine's thread lives as long as the application, so a test can start and stop both.
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    async def no_route(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if "Allow" in headers:
            headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
        said = f"{request.method} {short(request.url.path)}: {str(error.detail).lower()}"
        code = "unknown_url" if error.status_code == 404 else None
        return JSONResponse(problem_of(error.status_code, said, code=code), error.status_code, headers)

    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(problem_of(500, "the server has an error; see its log"), 500)

    routes = Routes(loaded, engine, settings)
    app = FastAPI(
        title="llava-extensions",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: no_route, Exception: failed},
    )
    app.add_route("/v1/chat/completions", routes.completions, methods=["POST"])
    app.add_route("/v1/models", routes.models, methods=["GET"])
    app.add_route("/v1/models/{model:path}", routes.one_model, methods=["GET"])
    app.add_route("/health", routes.health, methods=["GET"])
    described = document(__version__, settings.access.api_key is not None)
    app.openapi = lambda: described  # type: ignore[method-assign]
    app.add_middleware(Guard, access=settings.access)
    return app
