"""Who is slow is closed: clients that trickle a head or a body or do not read, and hosts that trickle an image."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from llava.errors import BadImageError
from llava.eval.answering.loading import LoadedModel, load_model
from llava.serve import schema
from llava.serve.body import BodyLimits
from llava.serve.connection import Patience
from llava.serve.image_urls import ImagePolicy
from llava.serve.streaming import StopFilter
from tests.llava.serve.test_api import CHECKPOINT, HELLO, IMAGES, MODEL, SETTINGS, ask, expected, openai, running, shown

pytestmark = pytest.mark.versions

BODY = json.dumps({"model": MODEL, "messages": HELLO}).encode()
PATIENCE = Patience(head=1.0, reading=1.0)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(CHECKPOINT), device="cpu")


@pytest.fixture(scope="module")
def port(loaded: LoadedModel) -> Iterator[int]:
    """Of a server without much patience."""
    with running(loaded, replace(SETTINGS, body=BodyLimits(max_bytes=1000, seconds=1.0)), PATIENCE) as (client, _):
        yield client.base_url.port


def head(length: int | str, *more: str, path: str = "/v1/chat/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of what comes until the server closes the connection."""
    connection.settimeout(30)
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    if not received:
        return 0, b""
    begin, _, body = received.partition(b"\r\n\r\n")
    return int(begin.split()[1]), body


def trickle(connection: socket.socket, content: bytes) -> None:
    """Send a byte every tenth of a second, until nobody takes it."""
    for byte in content:
        try:
            connection.send(bytes([byte]))
        except OSError:
            return
        time.sleep(0.1)


SLOW: dict[str, tuple[bytes, bytes, int]] = {
    "says nothing": (b"", b"", 408),
    "a slow head": (b"", head(10), 408),
    "a head without end": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", b"x" * 100, 408),
    "a slow body": (head(200), b" " * 200, 408),
    "no body": (head(200), b"", 408),
    "a chunk": (head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"10\r\n", b"x" * 16, 408),
    "the rest of a body nobody reads": (head(200, path="/v1/models"), b" " * 200, 405),
    "the rest of a body that is too large": (head(2000), b" " * 2000, 413),
    "a second head": (head(len(BODY), path="/nothing") + BODY, head(10), 404),
}


@pytest.mark.parametrize("case", SLOW)
def test_slow_senders(case: str, port: int) -> None:
    """The first answer is an error in OpenAI's form, and the connection ends whatever goes on arriving."""
    begin, rest, status = SLOW[case]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        start = time.monotonic()
        connection.sendall(begin)
        sender = threading.Thread(target=trickle, args=(connection, rest), daemon=True)
        sender.start()
        try:
            found, body = answer(connection)
        except ConnectionResetError:  # closed while bytes of the rest were on their way
            found, body = status, b""
        assert time.monotonic() - start < 12
        assert found == status
        if body and case != "a second head":
            schema.Problem.model_validate_json(body)
    sender.join(timeout=30)
    assert not sender.is_alive()


BROKEN = {
    "not HTTP": b"hello\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "a length in words": head("many"),
    "two lengths": head(1, "Content-Length: 2"),
    "a negative length": head(-1),
    "a large head": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000,
    "a chunk that is none": head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"zz\r\n",
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_http(case: str, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(BROKEN[case])
        status, body = answer(connection)
    assert status == 400
    assert schema.Problem.model_validate_json(body).error.type == "invalid_request_error"


def test_an_upgrade_is_not_made(port: int) -> None:
    """Requests for WebSockets are answered as what they are otherwise."""
    lines = ["GET /v1/models/x HTTP/1.1", "Host: localhost", "Connection: Upgrade, close", "Upgrade: websocket", "", ""]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall("\r\n".join(lines).encode())
        status, body = answer(connection)
    assert status == 404
    schema.Problem.model_validate_json(body)


def test_a_client_in_time_is_answered(port: int) -> None:
    """In pieces, but within the limits; twice on one connection."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for more in ((), ("Connection: close",)):
            content = head(len(BODY), *more) + BODY
            for start in range(0, len(content), 60):
                connection.sendall(content[start : start + 60])
                time.sleep(0.02)
            if not more:
                connection.settimeout(60)
                received = b""
                while not received.endswith(b"}}"):
                    received += connection.recv(65536)
                assert received.startswith(b"HTTP/1.1 200")
        assert answer(connection)[0] == 200


def test_a_client_that_does_not_read(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is closed although the answer is not sent."""
    monkeypatch.setattr(schema.ModelList, "model_dump", lambda self: {"data": ["x" * 20_000_000]})
    with running(loaded, SETTINGS, PATIENCE) as (client, _):
        connection = socket.create_connection(("127.0.0.1", client.base_url.port))
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(5)
        received = 0
        with connection, contextlib.suppress(ConnectionResetError):
            connection.settimeout(30)
            while chunk := connection.recv(2**20):
                received += len(chunk)
    assert received < 20_000_000


@contextmanager
def slow_host(content: bytes, chunk: int, pause: float, after: int = 0) -> Iterator[str]:
    """A host that sends `content` in pieces after the first `after` bytes."""
    listener = socket.create_server(("127.0.0.1", 0))
    closing = threading.Event()

    def serve() -> None:
        while not closing.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=reply, args=(connection,), daemon=True).start()

    def reply(connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            try:
                connection.sendall(content[:after])
                for start in range(after, len(content), chunk):
                    connection.sendall(content[start : start + chunk])
                    if closing.wait(pause):
                        return
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        closing.set()
        listener.close()


FILE = (IMAGES / "im0.png").read_bytes()
OK = f"HTTP/1.1 200 OK\r\nContent-Length: {len(FILE)}\r\n\r\n".encode()
HOSTS: dict[str, tuple[bytes, int, float, int, str]] = {
    "says nothing": (b"", 1, 0.0, 0, "cannot read an image"),
    "a slow head": (OK + FILE, 1, 0.3, 0, "did not arrive within 1 s"),
    "a slow body": (OK + FILE, 1, 0.3, len(OK), "did not arrive within 1 s"),
    "an endless head": (OK[:17] + b"X: y\r\n" * 100_000, 6, 0.01, 17, "did not arrive within 1 s"),
    "a large body": (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 200_000, 200_000, 0.0, 0, "more than 100000 bytes"),
    "half a body": (OK + FILE[:20], 1000, 0.0, 0, "cannot read an image"),
    "not HTTP": (b"hello\r\n\r\n", 1000, 0.0, 0, "cannot read an image"),
    "a failure": (b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", 1000, 0.0, 0, "500"),
    "a circle": (b"HTTP/1.1 302 No\r\nLocation: /x.png\r\nContent-Length: 0\r\n\r\n", 1000, 0.0, 0, "more than 5"),
    "elsewhere": (
        b"HTTP/1.1 302 No\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n",
        1000,
        0.0,
        0,
        "fetch",
    ),
    "no address": (b"HTTP/1.1 302 No\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n", 1000, 0.0, 0, "messages: "),
    "a file": (
        b"HTTP/1.1 302 No\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
        1000,
        0.0,
        0,
        "messages: ",
    ),
}


@pytest.mark.parametrize("case", HOSTS)
def test_hosts_of_images(case: str, loaded: LoadedModel) -> None:
    """All are errors of the request, within the deadline of all its images together."""
    content, chunk, pause, after, message = HOSTS[case]
    with slow_host(content, chunk, pause, after) as host:
        policy = ImagePolicy(max_bytes=100_000, hosts=frozenset({host}), seconds=1.0)
        with running(loaded, replace(SETTINGS, images=policy)) as (client, _):
            start = time.monotonic()
            with pytest.raises(openai.BadRequestError, match=message) as caught:
                ask(client, shown("?", *(f"http://{host}/{number}.png" for number in range(3))))
            assert time.monotonic() - start < 8
            assert caught.value.body["param"] == "messages"


def test_a_host_in_time(loaded: LoadedModel) -> None:
    with slow_host(OK + FILE, len(FILE) // 3, 0.05) as host:
        policy = ImagePolicy(hosts=frozenset({host}), seconds=20.0)
        with running(loaded, replace(SETTINGS, images=policy)) as (client, _):
            found = ask(client, shown("What is shown?", f"http://{host}/x.png")).choices[0].message.content
            assert found == expected(loaded, "What is shown?", "im0.png")


def test_others_are_answered_while_a_host_is_slow(loaded: LoadedModel) -> None:
    """More slow requests than are prepared at once do not hold anybody up."""
    with slow_host(OK + FILE, 1, 1.0) as host:
        policy = ImagePolicy(hosts=frozenset({host}), seconds=15.0)
        with running(loaded, replace(SETTINGS, images=policy)) as (client, _):

            def ask_slowly() -> None:
                with pytest.raises(openai.APIError):
                    ask(client, shown("?", f"http://{host}/x.png"))

            slow = [threading.Thread(target=ask_slowly) for _ in range(8)]
            start = time.monotonic()
            for thread in slow:
                thread.start()
            time.sleep(0.5)
            assert ask(client, HELLO).choices
            assert time.monotonic() - start < 12
            for thread in slow:
                thread.join()


def test_an_address_needs_to_be_fetched_first(loaded: LoadedModel) -> None:
    with pytest.raises(BadImageError, match="is not an image address"):
        ImagePolicy(hosts=frozenset({"host"})).open("http://host/x.png", "messages")


@pytest.mark.parametrize("stop", ["a" * 250_000, "a" * 125_000 + "b" + "a" * 125_000])
def test_long_stops_take_linear_time(stop: str) -> None:
    """A text that is a beginning of the stop string all along; the time was quadratic (33 s for 128 characters)."""
    start = time.monotonic()
    text = StopFilter([stop])
    for _ in range(20_000):
        assert text.push("aaaa") == ""
    assert text.rest() == "a" * 80_000
    assert time.monotonic() - start < 10


def first_stop(text: str, stops: list[str]) -> int:
    return min((place for place in (text.find(stop) for stop in stops) if place >= 0), default=len(text))


def test_stops_in_all_short_texts() -> None:
    """Character by character, against a plain search: nothing of a stop string passes, and all before it does."""
    words = ["".join(letters) for length in range(7) for letters in itertools.product("ab", repeat=length)]
    for stops in (["ab"], ["aab"], ["aba"], ["aa", "ab"], ["bab", "a"], ["b"], []):
        for word in words:
            text, passed = StopFilter(stops), ""
            for char in word:
                passed += text.push(char)
                assert word.startswith(passed)
            passed += text.rest()
            ends = [end for end in range(len(word) + 1) if any(word[:end].endswith(stop) for stop in stops)]
            begun = word[: ends[0]] if ends else word
            assert passed == begun[: first_stop(begun, stops)]
