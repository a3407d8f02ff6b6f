"""What the server answers besides completions, in process: its document, its errors, and whom it answers at all."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava.errors import FlagError
from llava.eval.answering.loading import LoadedModel, load_model
from llava.serve import api, app, schema
from llava.serve.app import Settings, create_app
from llava.serve.body import BodyLimits, Held
from llava.serve.engine import Engine
from llava.serve.guard import Access, access_of
from llava.serve.problems import BusyError
from tests.llava.serve.test_api import ANYWHERE, CHECKPOINT, HELLO, MODEL, SETTINGS

pytestmark = pytest.mark.versions

testclient = pytest.importorskip("starlette.testclient", reason="the extra 'serve' is not installed")

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": HELLO}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(CHECKPOINT), device="cpu")


def connect(loaded: LoadedModel, settings: Settings = SETTINGS) -> Any:
    """A client in process; an exception of the server becomes its answer, as over a socket."""
    application = create_app(loaded, Engine(loaded), settings)
    return testclient.TestClient(application, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(loaded: LoadedModel) -> Iterator[Any]:
    with connect(loaded) as client:
        yield client


def refused(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, which must have OpenAI's form."""
    assert response.status_code == status, response.text
    return schema.Problem.model_validate_json(response.content).error.model_dump()


def test_the_document_names_all_routes_and_what_they_answer(client: Any) -> None:
    document = client.get("/openapi.json").json()
    routes = {
        route.path.replace(":path", ""): sorted(set(route.methods) - {"HEAD"})
        for route in client.app.routes
        if route.path != "/openapi.json"
    }
    described = {path: sorted(method.upper() for method in item) for path, item in document["paths"].items()}
    assert routes == described
    request = document["components"]["schemas"]["ChatCompletionRequest"]
    assert request["required"] == ["model", "messages"]
    assert request["properties"]["top_logprobs"]["enum"] == [None, 0]
    assert request["properties"]["logprobs"]["enum"] == [None, False]
    statuses = set(document["paths"][CHAT]["post"]["responses"])
    assert {"200", "400", "401", "403", "404", "408", "413", "415", "429", "500", "504"} <= statuses


def test_answers_have_the_declared_form(client: Any) -> None:
    schema.ChatCompletion.model_validate_json(client.post(CHAT, json=BODY).content)
    schema.ModelList.model_validate_json(client.get("/v1/models").content)
    schema.Health.model_validate_json(client.get("/health").content)
    lines = client.post(CHAT, json=BODY | {"stream": True, "stream_options": {"include_usage": True}}).text.split(
        "\n\n"
    )
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [schema.ChatCompletionChunk.model_validate_json(line.removeprefix("data: ")) for line in lines[:-2]]
    assert len(chunks) > 3
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_one_model_by_name(client: Any) -> None:
    assert client.get(f"/v1/models/{MODEL}").json() == client.get("/v1/models").json()["data"][0]
    for name in ("gpt-4", "a/b", "a%2Fb", "", "%F0%9F%98%80", "%ff", "x" * 5000):
        error = refused(client.get(f"/v1/models/{name}"), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("DELETE", f"/v1/models/{MODEL}", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("OPTIONS", CHAT, "POST"),
        ("TRACE", CHAT, "POST"),
    ],
)
def test_other_methods(method: str, path: str, allowed: str, client: Any) -> None:
    response = client.request(method, path)
    assert path in refused(response, 405)["message"]
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/completions", f"{CHAT}/", "/docs", "/v1/models2"])
def test_other_paths(path: str, client: Any) -> None:
    error = refused(client.get(path), 404)
    assert error["code"] == "unknown_url"
    assert path in error["message"]


NAMES = ("127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "127.0.0.1", "localhost.")
STRANGERS = (
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "",
    "localhost@evil.example",
    "[",
    "10.0.0.1",
)


@pytest.mark.parametrize("host", STRANGERS)
def test_other_hosts(host: str, client: Any) -> None:
    """DNS rebinding: a name of the attacker's leads here, and the browser says it. It holds for every path."""
    for path in ("/v1/models", "/health", "/openapi.json", "/nothing"):
        refused(client.get(path, headers={"host": host}), 403)
    if host:
        refused(client.post(CHAT, json=BODY, headers={"origin": f"http://{host}"}), 403)


def test_pages_without_a_name(client: Any) -> None:
    for origin in ("null", "http://", "file://", ""):
        refused(client.post(CHAT, json=BODY, headers={"origin": origin}), 403)


@pytest.mark.parametrize("host", NAMES)
def test_own_hosts(host: str, client: Any) -> None:
    assert client.get("/v1/models", headers={"host": host, "origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize(
    ("bound", "also"),
    [("", []), (" ", []), ("127.0.0.1", ["models:8000"]), ("127.0.0.1", ["http://models"]), ("127.0.0.1", [""])],
)
def test_names_that_no_request_would_match_are_refused(bound: str, also: list[str]) -> None:
    with pytest.raises(FlagError, match=r"--host is empty|--allowed-host"):
        access_of(bound, also, None)
    access_of("127.0.0.1", ["models", "10.0.0.1", "[::1]", "::1"], None)


def test_hosts_of_an_address() -> None:
    """All addresses stand for any address and the machine's name, but not for other names."""
    here = access_of("127.0.0.1", [], None)
    network = access_of("192.168.0.7", ["Models.Example"], None)
    everywhere = access_of(ANYWHERE, [], None)
    anything = access_of("127.0.0.1", ["*"], None)
    table = {
        "localhost": (True, True, True, True),
        "127.0.0.1": (True, True, True, True),
        "192.168.0.7": (False, True, True, True),
        "192.168.0.8": (False, False, True, True),
        "models.example": (False, True, False, True),
        socket.gethostname().lower(): (False, False, True, True),
        "evil.example": (False, False, False, True),
    }
    for host, wanted in table.items():
        assert tuple(access.allows(host) for access in (here, network, everywhere, anything)) == wanted, host


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data", "application/json; charset=utf-16"],
)
def test_other_content_types(kind: str, client: Any) -> None:
    """A page may send these to any address without asking."""
    content = json.dumps(BODY).encode()
    assert (
        "application/json"
        in refused(client.post(CHAT, content=content, headers={"content-type": kind}), 415)["message"]
    )


def test_no_content_type_and_compressed(client: Any) -> None:
    content = json.dumps(BODY).encode()
    refused(client.post(CHAT, content=content), 415)
    kind = {"content-type": "application/json"}
    refused(client.post(CHAT, content=content, headers=kind | {"content-encoding": "gzip"}), 415)
    refused(client.post(CHAT, content=content, headers={"content-type": "application/json; Charset=latin-1"}), 415)
    kind["content-type"] = 'Application/JSON; x=y; charset="UTF-8"; z=w'
    assert client.post(CHAT, content=content, headers=kind).status_code == 200


def test_a_key_is_asked_for_everywhere_but_health(loaded: LoadedModel) -> None:
    with connect(loaded, replace(SETTINGS, access=Access(api_key="secret"))) as client:
        for header in (
            "",
            "secret",
            "Bearer",
            "Bearer ",
            "Bearer guess",
            "Basic secret",
            "Bearer secret2",
            "Bearer \xe9",
        ):
            for path in ("/v1/models", f"/v1/models/{MODEL}", "/openapi.json", "/nothing"):
                response = client.get(path, headers={"authorization": header.encode("latin-1")})
                assert refused(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        # It is asked for before anything is read, so a stranger learns nothing and costs nothing.
        refused(client.post(CHAT, content=b"{", headers={"content-type": "text/plain"}), 401)
        assert client.get("/health").status_code == 200
        for header in ("Bearer secret", "bearer  secret"):
            assert client.get("/v1/models", headers={"authorization": header}).status_code == 200
        assert client.get("/openapi.json", headers={"authorization": "Bearer secret"}).json()["security"] == [
            {"key": []}
        ]


def test_keys_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(*words: str) -> str | None:
        arguments = api.build_parser().parse_args(["--model-path", str(CHECKPOINT), *words])
        return api.settings_of(arguments).access.api_key

    monkeypatch.delenv(api.KEY, raising=False)
    assert key() is None
    assert key("--api-key", "word", "--host", ANYWHERE) == "word"
    monkeypatch.setenv(api.KEY, "hidden")
    assert (key(), key("--api-key", "word")) == ("hidden", "word")
    for wrong in ("", "two words", "k\xe9y", "line\n"):
        with pytest.raises(FlagError, match="one word of printable ASCII"):
            key("--api-key", wrong)


def test_a_failure_of_the_server_says_so_and_nothing_more(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "make_job", lambda *_: 1 / 0)
    with connect(loaded) as client:
        error = refused(client.post(CHAT, json=BODY), 500)
    assert error["type"] == "server_error"
    assert "zero" not in error["message"]


def test_what_is_held_at_the_same_time(client: Any, loaded: LoadedModel) -> None:
    """Bodies that arrive together are bounded, and what is refused is let go."""
    held = Held(10)
    with held.body() as take:
        take(6)
        with held.body() as other:
            other(4)
            with pytest.raises(BusyError, match="try again"):
                other(1)
        assert held.bytes == 6
    assert held.bytes == 0
    with connect(loaded, replace(SETTINGS, body=BodyLimits(max_bytes=400))) as small:
        for _ in range(20):
            assert small.post(CHAT, json=BODY).status_code == 200
            refused(small.post(CHAT, json=BODY | {"zz": "x" * 300}), 400)
            refused(small.post(CHAT, json=BODY | {"zz": "x" * 400}), 413)


def test_flags_of_limits_are_documented() -> None:
    """In the help and in docs/serving.md."""
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    named = {"--api-key", "--allowed-host", "--allow-anyone", "--image-folder", "--allow-image-host", "--images-first"}
    flags = named | {"--" + name.replace("_", "-") for name in api.RANGES} - {"--temperature", "--max-new-tokens"}
    assert not {flag for flag in flags if f"`{flag}" not in text and f"{flag} " not in text}
    assert not {flag for flag in flags if f"{flag} " not in api.build_parser().format_help()}
