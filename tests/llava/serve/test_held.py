"""What a request holds: bytes that are counted for as long as they are there, and clients that go or do not read."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from llava.eval.answering.loading import LoadedModel
from llava.serve import body
from llava.serve.app import create_app
from llava.serve.body import BodyLimits, Held
from llava.serve.chat_request import ChatRequest
from llava.serve.connection import Patience, make_server
from llava.serve.engine import Engine
from llava.serve.image_fetch import fetch_images
from llava.serve.image_urls import ImagePolicy
from llava.serve.problems import BusyError, EngineError, StoppedError, problem, status_of
from tests.llava.serve.asgi_calls import Call
from tests.llava.serve.test_api import (  # noqa: F401
    HELLO,
    IMAGES,
    SETTINGS,
    Gate,
    ask,
    data_url,
    gate,
    image_host,
    loaded,
    openai,
    running,
    shown,
    until,
)

pytestmark = pytest.mark.versions

FILE = (IMAGES / "im0.png").read_bytes()


# Bytes


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_let_go_before_its_answer(stream: bool, loaded: LoadedModel, gate: Gate) -> None:  # noqa: F811
    """The addresses of its images are all of their bytes, and an answer may take minutes."""
    with running(loaded) as (client, engine), ThreadPoolExecutor(1) as pool:
        messages = shown("?", data_url(IMAGES / "im0.png"))
        answer = pool.submit(lambda: ask(client, messages, stream=stream))
        until(lambda: len(engine.answering) == 1)
        try:
            gc.collect()
            assert [each for each in gc.get_objects() if type(each) is ChatRequest] == []
        finally:
            gate.open.set()
        assert list(answer.result()) if stream else answer.result().choices


def test_images_that_are_fetched_are_counted() -> None:
    """With those of other requests, until the request lets go of them; also those of a request that fails."""
    held = Held(2 * len(FILE) - 1)
    with image_host() as host:
        policy = ImagePolicy(hosts=frozenset({host}))

        def fetch(take: Any) -> None:
            assert asyncio.run(fetch_images([f"http://{host}/x.png"], policy, take)) == {f"http://{host}/x.png": FILE}

        with held.body() as take:
            fetch(take)
            assert held.bytes == len(FILE)
            with held.body() as other, pytest.raises(BusyError, match="their images"):
                fetch(other)
            assert held.bytes == len(FILE)
        assert held.bytes == 0
        with held.body() as take:
            fetch(take)


def test_images_beyond_what_is_held(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Over HTTP: too many for one request are 413; while others hold as much, 429; and nothing stays counted."""
    settings = replace(SETTINGS, body=BodyLimits(max_bytes=400))
    limit = body.HELD_BODIES * 400
    with image_host() as host:
        fetching = replace(settings, images=ImagePolicy(hosts=frozenset({host})))
        urls = [f"http://{host}/{number}.png" for number in range(3)]
        assert len(FILE) < limit < 3 * len(FILE), "the numbers of this test"
        with running(loaded, fetching) as (client, _):
            for _ in range(4):
                with pytest.raises(openai.APIStatusError, match="together") as caught:
                    ask(client, shown("?", *urls))
                assert caught.value.status_code == 413
                assert ask(client, shown("?", urls[0])).choices
        monkeypatch.setattr(Held, "body", busy)
        with running(loaded, fetching) as (client, _), pytest.raises(openai.RateLimitError, match="later"):
            ask(client, shown("?", urls[0]))


@contextmanager
def busy(held: Held) -> Iterator[Any]:
    """Room for the body of a request, and none for an image."""

    def take(count: int) -> None:
        if count >= min(400, len(FILE)):
            raise BusyError("try again later")

    yield take


# Statuses


def test_a_server_that_stops_is_503(loaded: LoadedModel) -> None:  # noqa: F811
    engine = Engine(loaded)
    with pytest.raises(StoppedError) as caught:
        engine.submit(Any)  # type: ignore[arg-type]
    assert status_of(caught.value) == 503
    assert problem(caught.value)["error"]["type"] == "server_error"
    assert status_of(EngineError("the model failed")) == 500
    with running(loaded) as (client, engine):
        engine.close()
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            ask(client, HELLO)
        assert refused.value.status_code == 503
        engine.close = lambda: None  # type: ignore[method-assign]


def test_who_goes_away_in_a_body_is_no_error_of_the_server(loaded: LoadedModel) -> None:  # noqa: F811
    """No exception leaves the application, which a server would log with its trace."""
    said: list[MutableMapping[str, Any]] = []
    events = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, Any]:
        return next(events)

    async def send(event: MutableMapping[str, Any]) -> None:
        said.append(event)

    asyncio.run(create_app(loaded, Engine(loaded), SETTINGS)(Call().scope, receive, send))
    assert said[0]["status"] == 499


# Clients that do not read


@contextmanager
def small_buffers(content: bytes, reading: float) -> Iterator[tuple[int, Any]]:
    """A server whose kernel keeps next to nothing, and that says `content`: its port and its state."""

    async def says(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = [(b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = make_server(says, Patience(reading=reading), log_level="warning")  # type: ignore[arg-type]
    server.config.lifespan = "off"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield listener.getsockname()[1], server.server_state
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(timeout=60)
        listener.close()
        assert not thread.is_alive()


def connected(port: int, *headers: str) -> socket.socket:
    """A client with a small buffer that has asked."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall("\r\n".join(["GET / HTTP/1.1", "Host: localhost", *headers, "", ""]).encode())
    return client


@pytest.mark.parametrize("headers", [(), ("Connection: close",)])
def test_a_short_answer_that_is_not_read_ends(headers: tuple[str, ...]) -> None:
    """Less than the 64 KB that a transport takes without a word; a connection that was closed waits for it, too."""
    with small_buffers(b"x" * 50_000, reading=1.0) as (port, state), connected(port, *headers):
        until(lambda: len(state.connections) == 1)
        start = time.monotonic()
        until(lambda: not state.connections)
        assert time.monotonic() - start < 20


def test_a_slow_reader_gets_all() -> None:
    """Who reads is not closed, and the flow is taken up each time."""
    content = bytes(range(256)) * 400
    with small_buffers(content, reading=10.0) as (port, _), connected(port, "Connection: close") as client:
        client.settimeout(30)
        received = b""
        while chunk := client.recv(4096):
            received += chunk
            time.sleep(0.005)
    assert received.partition(b"\r\n\r\n")[2] == content
