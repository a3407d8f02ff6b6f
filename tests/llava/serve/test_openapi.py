"""The server is held to its own OpenAPI document: schemathesis draws valid and invalid requests from it.

The draw is fixed. `LLAVA_FUZZ=all` tries 2,000 requests of each operation and kind, `LLAVA_FUZZ=1/N` an N-th of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llava.serve.app import create_app
from llava.serve.engine import Engine
from tests.llava.serve.fuzzed_server import MODEL, load_tiny, settings
from tests.reliability.choice import amount

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
schemathesis = pytest.importorskip("schemathesis", reason="the extra 'dev' is not installed")
hypothesis = pytest.importorskip("hypothesis", reason="the extra 'dev' is not installed")

from schemathesis import checks as usual  # noqa: E402 - comes with what is skipped without
from schemathesis.core.failures import FailureGroup  # noqa: E402
from schemathesis.specs.openapi import checks as declared  # noqa: E402

HOST = "127.0.0.1:8000"
CHAT = "/v1/chat/completions"
MOST, USUAL = 2_000, 60
"""Requests of each operation and kind, of all and of a usual run."""

CHECKS = (
    usual.not_a_server_error,
    declared.status_code_conformance,
    declared.content_type_conformance,
    declared.response_schema_conformance,
    declared.response_headers_conformance,
)
OPERATIONS = (
    ("POST", CHAT),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
)


def form_of_errors(ctx: Any, response: Any, case: Any) -> None:
    """Errors are as OpenAI's clients read them, whatever the document says; as a check of schemathesis."""
    if response.status_code >= 400:
        error = response.json().get("error", {})
        assert error.keys() == {"message", "type", "param", "code"}, "not OpenAI's form of an error"
        assert error["message"], "an error without a message"


Change = Callable[[int, bytes], tuple[int, bytes]]
"""Another status and body for those of a completion."""


class WithoutLife:
    """An application whose engine the test starts and closes; its replies to completions may be changed.

    Args:
        app: the server's.
        change: None: nothing is changed.
    """

    def __init__(self, app: Any, change: Change | None = None) -> None:
        self.app, self.change = app, change

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] == "lifespan":
            for what in ("startup", "shutdown"):
                assert (await receive())["type"] == f"lifespan.{what}"
                await send({"type": f"lifespan.{what}.complete"})
        elif self.change is None or scope["path"] != CHAT:
            await self.app(scope, receive, send)
        else:
            await self._changed(self.change, scope, receive, send)

    async def _changed(self, change: Change, scope: Any, receive: Any, send: Any) -> None:
        status, body = 0, b""

        async def collect(message: Any) -> None:
            nonlocal status, body
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                body += message["body"]

        await self.app(scope, receive, collect)
        status, body = change(status, body)
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The server with a tiny model."""
    loaded = load_tiny()
    engine = Engine(loaded, gather_seconds=0)
    engine.start()
    yield create_app(loaded, engine, settings(tmp_path_factory.mktemp("images")))
    engine.close()


def described(app: Any, change: Change | None = None) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", WithoutLife(app, change), headers={"Host": HOST})


def towards_the_model(case: Any, turn: int) -> Any:
    """Make two of three drawn requests ask for the served model; half of these begin with the user and end there."""
    body = case.body
    if isinstance(body, dict) and "messages" in body and turn:
        body["model"] = MODEL
        messages = body["messages"]
        if turn == 2 and isinstance(messages, list) and messages and isinstance(messages[0], dict):
            body["messages"] = [messages[0] | {"role": "user"}]
    return case


def run(app: Any, method: str, path: str, kind: str, count: int, change: Change | None = None) -> Counter[int]:
    """Draw requests of an operation and check what comes back; how often each status came.

    Raises:
        FailureGroup: a check has failed; the message has the request.
    """
    mode = schemathesis.GenerationMode(kind)
    strategy = described(app, change)[path][method].as_strategy(generation_mode=mode)
    seen: Counter[int] = Counter()

    @hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(strategy, hypothesis.strategies.integers(0, 2))
    def ask(case: Any, turn: int) -> None:
        response = towards_the_model(case, turn).call(base_url=f"http://{HOST}")
        seen[response.status_code] += 1
        case.validate_response(response, checks=[*CHECKS, form_of_errors])

    ask()
    return seen


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        *((method, path, "positive") for method, path in OPERATIONS),
        ("POST", CHAT, "negative"),
    ],  # the others take anything
    ids=[*(path for _, path in OPERATIONS), "invalid requests"],
)
def test_operation(method: str, path: str, kind: str, app: Any) -> None:
    seen = run(app, method, path, kind, amount(MOST, USUAL))
    assert sum(seen.values()) > 0
    if method == "POST":
        assert {200, 400} <= seen.keys() if kind == "positive" else 400 in seen, seen


def test_all_operations_are_tried(app: Any) -> None:
    found = {(operation.ok().method.upper(), operation.ok().path) for operation in described(app).get_all_operations()}
    assert found == set(OPERATIONS)


CONTROLS: dict[str, tuple[Change, str]] = {
    "500": (lambda status, body: (500, body), "Server error"),
    "an undeclared status": (lambda status, body: (418, body), "Undocumented status code"),
    "an undeclared form": (lambda status, body: (200, b'{"id": 1}'), "Response violates schema"),
    "another form of errors": (lambda status, body: (400, b'{"detail": "no"}'), "not OpenAI's form"),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_faults_are_found(control: str, app: Any) -> None:
    change, title = CONTROLS[control]
    with pytest.raises(FailureGroup) as caught:
        run(app, "POST", CHAT, "positive", 5, change)
    assert any(title in f"{type(found).__name__}: {found}" for found in caught.value.exceptions), (
        caught.value.exceptions
    )
