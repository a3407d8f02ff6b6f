"""What the server answers besides completions, in process: its document, its errors, and whom it answers at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from llava.eval.answering.loading import LoadedModel, load_model
from llava.serve import schema
from llava.serve.app import Settings, create_app
from llava.serve.engine import Engine
from tests.llava.serve.test_api import CHECKPOINT, HELLO, MODEL, SETTINGS

pytestmark = pytest.mark.versions

testclient = pytest.importorskip("starlette.testclient", reason="the extra 'serve' is not installed")

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": HELLO}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(CHECKPOINT), device="cpu")


def connect(loaded: LoadedModel, settings: Settings = SETTINGS) -> Any:
    """A client in process; an exception of the server becomes its answer, as over a socket."""
    app = create_app(loaded, Engine(loaded), settings)
    return testclient.TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


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
