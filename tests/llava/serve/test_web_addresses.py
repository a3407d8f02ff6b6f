"""Both pages over HTTP: a request that names a file by an http(s) address is refused before anything is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from llava.errors import FlagError
from llava.serve import uploads, web
from llava.serve.page.layout import build_page
from llava.serve.page.models import NONE, ModelList
from mma.lavin.chat import LavinChat
from mma.lavin.page import build_page as build_lavin_page

gradio = pytest.importorskip("gradio", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="the extra `serve` is not installed")

ADDRESS = "https://host.example/large"
META = {"_type": "gradio.FileData"}


class Opened(NamedTuple):
    """A page, and the addresses that it has fetched."""

    client: Any
    kind: str
    fetched: list[str]


@pytest.fixture(params=["web", "lavin"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    from gradio import processing_utils, routes
    from starlette.responses import PlainTextResponse

    fetched: list[str] = []

    async def download(url: str, cache_dir: str) -> str:
        fetched.append(url)
        file = Path(cache_dir) / ("0" * 64) / "large"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"large")
        return str(file)

    async def stream(url: str, _: Any) -> Any:
        fetched.append(url)
        return PlainTextResponse("large")

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", download)
    monkeypatch.setattr(routes, "secure_url_stream_response", stream)
    if request.param == "web":
        page = build_page(ModelList([]), 1)
        web.launch(page, web.build_parser().parse_args([]), None)
    else:
        # No question of this test reaches the model.
        page = build_lavin_page(cast("LavinChat", None), 64)
        page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **uploads.launch_limits())
    try:
        with httpx.Client(base_url=page.local_url, timeout=60, trust_env=False) as client:
            yield Opened(client, request.param, fetched)
    finally:
        page.close()


def ask(opened: Opened, question: Any, image: Any) -> str:
    """The events of one request to `ask`."""
    rest = [NONE, None] if opened.kind == "web" else [0.0, 0.75, 4, 0]
    data = [question, image, *rest] if opened.kind == "web" else [question, None, image, *rest]
    begun = opened.client.post("/gradio_api/call/ask", json={"data": data})
    begun.raise_for_status()
    return str(opened.client.get(f"/gradio_api/call/ask/{begun.json()['event_id']}").text)


def file(path: str) -> dict[str, Any]:
    return {"path": path, "meta": META}


@pytest.mark.parametrize(
    ("question", "image"),
    [
        ("What?", file(ADDRESS)),
        (file(ADDRESS), None),
        ([{"deep": [file(ADDRESS.replace("https", "http"))]}], None),
        ("What?", file(ADDRESS) | {"url": "/here"}),
    ],
    ids=["image", "question", "deep", "with a url"],
)
def test_an_address_is_refused_before_it_is_fetched(opened: Opened, question: Any, image: Any) -> None:
    events = ask(opened, question, image)
    assert "event: error" in events
    assert uploads.NOT_FETCHED in events
    assert opened.fetched == []


def test_the_route_of_files_is_not_a_proxy(opened: Opened) -> None:
    for path in (f"/gradio_api/file={ADDRESS}", f"/gradio_api/file/{ADDRESS}", "/gradio_api/file=https%3A//host/a"):
        answer = opened.client.get(path)
        assert answer.status_code == 403
        assert uploads.NOT_FETCHED in answer.text
    assert opened.fetched == []


def test_an_upload_is_served_and_asked_about(opened: Opened) -> None:
    """What is refused is no more than that: an upload has the page's own address as its `url`."""
    sent = opened.client.post("/gradio_api/upload", files={"files": ("a.png", b"no image")})
    (path,) = sent.json()
    assert opened.client.get(f"/gradio_api/file={path}").content == b"no image"
    url = f"{opened.client.base_url}gradio_api/file={path}"
    assert uploads.NOT_FETCHED not in ask(opened, "", file(path) | {"url": url})
    assert uploads.NOT_FETCHED not in ask(opened, ADDRESS, None)


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ([file(ADDRESS)], True),
        ([{"path": "HTTP://HOST/A"}], True),
        ([[{"a": {"path": " https://host"}}]], True),
        ([{"path": "/tmp/a", "url": ADDRESS}], False),  # noqa: S108 - only a name
        ([ADDRESS, None, 1, {"path": 3}], False),
    ],
)
def test_addresses_among_inputs(inputs: list[Any], found: bool) -> None:
    assert uploads.names_address(inputs) is found


def test_variables_of_the_environment_open_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio would read them in place of arguments that are not given."""
    assert uploads.launch_limits()["share"] is False
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    with pytest.raises(FlagError, match="GRADIO_ALLOWED_PATHS=/: visitors could read"):
        uploads.launch_limits()
