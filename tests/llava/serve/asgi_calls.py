"""Requests to an application in this process, of any bytes: no client library corrects them on their way."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

CHAT = "/v1/chat/completions"
JSON_HEADERS = (("host", "127.0.0.1:8000"), ("content-type", "application/json"))
PATIENCE = 60.0
"""Seconds after which a request counts as one that is never answered."""

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]


@dataclass(frozen=True)
class Call:
    """A request; a character of a header or a path is a byte."""

    body: bytes = b""
    method: str = "POST"
    path: str = CHAT
    headers: tuple[tuple[str, str], ...] = JSON_HEADERS

    @property
    def scope(self) -> dict[str, Any]:
        """As a server hands it to an application."""
        raw, _, query = self.path.partition("?")
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": unquote_to_bytes(raw.encode("latin-1")).decode("utf-8", "replace"),
            "raw_path": raw.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "root_path": "",
            "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self.headers],
            "client": ("127.0.0.1", 9),
            "server": ("127.0.0.1", 8000),
        }


@dataclass
class Reply:
    """What came back.

    Attributes:
        status: 0 if nothing came.
        headers: in lower case.
        body: all of it.
        error: an exception that left the application.
        cost: seconds of computing time that this process has spent meanwhile, whatever else the machine does.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    error: BaseException | None = None
    cost: float = 0.0


class InProcess:
    """An application with an event loop in a thread of its own, started and closed as a server does.

    Args:
        app: the application.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="application", daemon=True)
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._said: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()

    def __enter__(self) -> InProcess:
        self._thread.start()
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._life = self._run(self.app(scope, self._events.get, self._said.put))
        self._turn("startup")
        return self

    def __exit__(self, *_: object) -> None:
        self._turn("shutdown")
        self._life.result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    def _run(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _turn(self, what: str) -> None:
        self._run(self._events.put({"type": f"lifespan.{what}"})).result(PATIENCE)
        said = self._run(self._said.get()).result(PATIENCE)
        assert said["type"] == f"lifespan.{what}.complete", said

    def call(self, call: Call) -> Reply:
        """Send a request and wait for the whole reply.

        Raises:
            TimeoutError: nothing comes.
        """
        return self._run(self._call(call)).result(PATIENCE)

    async def _call(self, call: Call) -> Reply:
        reply, begun = Reply(), time.process_time()
        sent, never = False, asyncio.Event()

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                await never.wait()  # the client stays
            sent = True
            return {"type": "http.request", "body": call.body, "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode().lower(): value.decode("latin-1") for name, value in message["headers"]}
            elif message["type"] == "http.response.body":
                reply.body += message.get("body", b"")

        try:
            await self.app(call.scope, receive, send)
        except Exception as error:
            reply.error = error
        reply.cost = time.process_time() - begun
        return reply
