"""The corpus of requests, and requests made of it: each is answered, or refused in OpenAI's form by a declared status.

A seeded draw runs with the tests; `LLAVA_FUZZ=all` tries 20,000 requests, `LLAVA_FUZZ=1/N` an N-th of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from llava.serve.app import create_app
from llava.serve.engine import Engine
from tests.llava.serve.asgi_calls import Call, InProcess, Reply
from tests.llava.serve.corpus import Entry, load_corpus
from tests.llava.serve.fuzzed_server import load_tiny, settings
from tests.llava.serve.mutations import mutations
from tests.reliability.choice import SEED, amount

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("jsonschema_rs", reason="the extra 'dev' is not installed")

from tests.llava.serve.api_checks import Checks

CORPUS = load_corpus()
ANSWERED = [entry.call for entry in CORPUS if entry.status == 200 and entry.call.method == "POST"]
SEEDS = [entry.call for entry in CORPUS] + ANSWERED * (len(CORPUS) // len(ANSWERED))
"""Half are requests that are answered: what is wrong with a request is found one after the other."""

MOST, USUAL = 20_000, 400
"""Requests of the mutation test, of all and of a usual run."""


@dataclass(frozen=True)
class Server:
    """A server in this process."""

    app: Any
    running: InProcess
    checks: Checks

    def ask(self, call: Call) -> tuple[Reply, list[str]]:
        """The reply, and what is wrong with it."""
        reply = self.running.call(call)
        return reply, self.checks.faults(call, reply)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    loaded = load_tiny()
    app = create_app(loaded, Engine(loaded, gather_seconds=0), settings(tmp_path_factory.mktemp("images")))
    with InProcess(app) as running:
        yield Server(app, running, Checks(app.openapi()))


@pytest.mark.parametrize("entry", CORPUS, ids=[entry.name for entry in CORPUS])
def test_corpus(entry: Entry, server: Server) -> None:
    reply, faults = server.ask(entry.call)
    assert faults == []
    assert reply.status == entry.status, bytes(reply.body[:500])
    if entry.param is not None:
        assert json.loads(reply.body)["error"]["param"] == entry.param


def test_the_corpus_is_of_many_kinds() -> None:
    """Its names are different, and no status that a request can bring about is without an entry."""
    assert len({entry.name for entry in CORPUS}) == len(CORPUS) > 300
    assert {entry.status for entry in CORPUS} == {200, 400, 403, 404, 405, 413, 415}


def test_mutations(server: Server) -> None:
    """Whatever becomes of the corpus is answered or refused; then the server answers as before."""
    first = next(entry for entry in CORPUS if entry.name == "an image")
    before = json.loads(server.ask(first.call)[0].body)["choices"]
    seen: Counter[int] = Counter()
    for number, call in enumerate(mutations(SEEDS, amount(MOST, USUAL), SEED)):
        reply, faults = server.ask(call)
        assert not faults, (
            f"request {number}: {faults}\n{call.method} {call.path[:200]} {call.headers}\n{call.body[:2000]!r}"
        )
        seen[reply.status] += 1
    assert json.loads(server.ask(first.call)[0].body)["choices"] == before
    assert {200, 400, 403, 404, 405, 415} <= seen.keys(), seen
    assert seen[200] > sum(seen.values()) / 50, f"the requests must reach the model: {seen}"


def broken(status: int, content: bytes, kind: str = "application/json") -> Any:
    """An application that answers everything in one way."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return app


async def raising(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError("no such thing")


def problem(**changes: Any) -> bytes:
    error = {"message": "no", "type": "invalid_request_error", "param": None, "code": None} | changes
    return json.dumps({"error": error}).encode()


CONTROLS: dict[str, tuple[Any, str]] = {
    "an exception": (raising, "ValueError left the application"),
    "500": (broken(500, problem()), "status 500"),
    "an undeclared status": (broken(418, problem()), "status 418 is not declared"),
    "FastAPI's own form": (broken(400, b'{"detail": "no"}'), "not OpenAI's form of an error"),
    "no JSON": (broken(400, b"Bad Request"), "it is not JSON"),
    "text": (broken(400, problem(), "text/plain"), "content type 'text/plain' is not declared"),
    "no code": (broken(400, b'{"error": {"message": "no"}}'), "not OpenAI's form of an error"),
    "an empty message": (broken(400, problem(message="")), "0 characters"),
    "a trace": (broken(400, problem(message="Traceback (most recent call last)")), "'Traceback'"),
    "another answer": (broken(200, b'{"id": "x"}'), "not of the declared form"),
    "a stream that breaks off": (broken(200, b"data: {}\n\n", "text/event-stream"), "the stream ends with"),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_faults_are_found(control: str, server: Server) -> None:
    app, words = CONTROLS[control]
    call = CORPUS[0].call

    async def with_life(scope: Any, receive: Any, send: Any) -> None:
        """The broken application; the server's own starts and ends."""
        if scope["type"] == "http":
            await app(scope, receive, send)
        else:
            for what in ("startup", "shutdown"):
                assert (await receive())["type"] == f"lifespan.{what}"
                await send({"type": f"lifespan.{what}.complete"})

    with InProcess(with_life) as running:
        faults = server.checks.faults(call, running.call(call))
    assert any(words in fault for fault in faults), faults


def test_costs_are_found(server: Server) -> None:
    reply, faults = server.ask(CORPUS[0].call)
    assert faults == []
    assert any("computing time" in fault for fault in server.checks.faults(CORPUS[0].call, replace(reply, cost=7.0)))
