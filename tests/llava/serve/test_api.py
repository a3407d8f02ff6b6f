"""The server, driven by OpenAI's own client over a real socket."""

from __future__ import annotations

import base64
import http.server
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava.errors import FlagError
from llava.eval.answering.answers import Task
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import LoadedModel, load_model
from llava.eval.answering.runner import answer_batch, load_images, make_prompt
from llava.eval.run_llava import open_image
from llava.serve import api
from llava.serve.app import Settings, create_app
from llava.serve.body import BodyLimits
from llava.serve.connection import Patience, make_server
from llava.serve.defaults import Defaults
from llava.serve.engine import Engine
from llava.serve.guard import Access
from llava.serve.image_urls import ImagePolicy
from tests.golden import golden_dir

pytestmark = pytest.mark.versions

openai = pytest.importorskip("openai", reason="the extra 'dev' is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

CHECKPOINT = golden_dir("llava") / "tiny-llava-v1.5"
IMAGES = golden_dir("llava") / "data" / "images"
MODEL = "tiny-llava-v1.5"
ANYWHERE = "0.0.0.0"  # noqa: S104 - refused, or parsed and not listened on
SETTINGS = Settings("vicuna_v1", Defaults(temperature=0.0, max_new_tokens=8, token_limit=32, max_images=3))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(CHECKPOINT), device="cpu")


@contextmanager
def running(
    loaded: LoadedModel, settings: Settings = SETTINGS, patience: Patience | None = None, **engine: Any
) -> Iterator[tuple[Any, Engine]]:
    """A server on a free port, and a client of it that does not try twice."""
    listener = socket.create_server(("127.0.0.1", 0))
    worker = Engine(loaded, **engine)
    server = make_server(create_app(loaded, worker, settings), patience, log_level="warning")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    try:
        yield (
            openai.OpenAI(base_url=address, api_key=settings.access.api_key or "none", max_retries=0, timeout=120),
            worker,
        )
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(loaded: LoadedModel) -> Iterator[tuple[Any, Engine]]:
    with running(loaded) as pair:
        yield pair


@pytest.fixture
def client(server: tuple[Any, Engine]) -> Any:
    return server[0]


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def shown(text: str, *urls: str) -> list[dict[str, Any]]:
    """One user message with images before its text."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def ask(client: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def expected(loaded: LoadedModel, question: str, *names: str, **options: Any) -> str:
    """The answer of the evaluation programs, one question at a time."""
    task = Task(0, question, question, tuple(str(IMAGES / name) for name in names), where="test")
    prompt = make_prompt("request", task, loaded, SETTINGS.conv_mode)
    chosen = GenerationOptions(**({"temperature": 0.0, "max_new_tokens": 8} | options))
    return answer_batch([prompt], [load_images(task, loaded, open_image)], loaded, chosen)["request"]


CASES = [
    (f"Question {number}: what is {'shown ' * (number % 5)}here?", [f"im{number % 3}.png"] * (number % 3))
    for number in range(16)
]


def test_sixteen_at_once(loaded: LoadedModel, server: tuple[Any, Engine]) -> None:
    """Nothing is lost or mixed up, and batches were made."""
    client, engine = server
    before = len(engine.batches)

    def one(case: tuple[str, list[str]]) -> str:
        question, names = case
        return ask(client, shown(question, *(data_url(IMAGES / name) for name in names))).choices[0].message.content

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, CASES))
    wanted = [expected(loaded, question, *names) for question, names in CASES]
    assert answers == wanted
    assert len(set(wanted)) > 8, "the answers must tell the requests apart"
    batches = engine.batches[before:]
    assert sum(batches) == 16
    assert max(batches) > 1


def test_mixed_options_in_one_batch(loaded: LoadedModel) -> None:
    """Rows with their own limit, temperature and seed are what they are alone."""
    options = [
        {"temperature": 0.0, "max_tokens": 3},
        {"temperature": 1.0, "max_tokens": 12, "seed": 1},
        {"temperature": 1.0, "max_tokens": 12, "seed": 2, "top_p": 0.9},
    ]
    with running(loaded, gather_seconds=2.0, max_batch=3) as (client, engine):
        with ThreadPoolExecutor(3) as pool:
            futures = [
                pool.submit(ask, client, shown("What is shown?", data_url(IMAGES / "im0.png")), **chosen)
                for chosen in options
            ]
            answers = [future.result() for future in futures]
        assert engine.batches == [3]
    for answer, chosen in zip(answers, options, strict=True):
        same = {("max_new_tokens" if key == "max_tokens" else key): value for key, value in chosen.items()}
        assert answer.choices[0].message.content == expected(loaded, "What is shown?", "im0.png", **same)
        whole = answer.usage.completion_tokens == chosen["max_tokens"]
        assert answer.choices[0].finish_reason == ("length" if whole else "stop")
    assert answers[0].usage.completion_tokens == 3
    assert answers[1].choices[0].message.content != answers[2].choices[0].message.content


def test_streaming(client: Any, loaded: LoadedModel) -> None:
    messages = shown("What is shown?", data_url(IMAGES / "im1.png"))
    whole = ask(client, messages)
    chunks = list(ask(client, messages, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content == expected(loaded, "What is shown?", "im1.png")
    assert len(chunks) > 4, "it must come in pieces"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert (
        whole.usage.prompt_tokens == whole.usage.total_tokens - whole.usage.completion_tokens > loaded.patches_per_image
    )
    assert len({chunk.id for chunk in chunks}) == 1


def test_stop_strings(client: Any) -> None:
    messages = shown("What is shown?", data_url(IMAGES / "im1.png"))
    text = ask(client, messages, max_tokens=32).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    for options in ({}, {"stream": True}):
        answer = ask(client, messages, max_tokens=32, stop=[stop, "never"], **options)
        if options:
            chunks = list(answer)
            cut = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            cut = answer.choices[0].message.content
            assert answer.usage.completion_tokens < 32
        assert cut == text[: text.index(stop)].rstrip()


def test_a_conversation(client: Any, loaded: LoadedModel) -> None:
    """Earlier turns and the system text reach the model."""
    first = shown("What is shown?", data_url(IMAGES / "im0.png"))
    turns = [*first, {"role": "assistant", "content": "A dog."}, {"role": "user", "content": "What is shown?"}]
    texts = [ask(client, messages).choices[0].message.content for messages in (first, turns)]
    told = [ask(client, [{"role": "system", "content": word}, *turns]) for word in ("Be brief.", "Speak of cats.")]
    texts += [answer.choices[0].message.content for answer in told]
    assert len(set(texts)) == 4


IMAGE = data_url(IMAGES / "im0.png")
HELLO = [{"role": "user", "content": "Hello"}]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two answers": ({"n": 2}, "n = 2: is not supported"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "unknown": ({"extra_body": {"typical_p": 0.5}}, "'typical_p' is not known"),
    "too many tokens": ({"max_tokens": 33}, "max_tokens = 33; this server takes 1 to 32"),
    "temperature": ({"temperature": -1}, "temperature = -1"),
    "temperature as text": ({"extra_body": {"temperature": "hot"}}, "'hot' has the wrong type"),
    "top_p": ({"top_p": 1.5}, "top_p = 1.5"),
    "stops": ({"stop": ["a"] * 5}, "takes up to 4"),
    "no message": ({"messages": []}, "takes at least 1"),
    "two users": ({"messages": HELLO * 2}, "user, user"),
    "last is the model": ({"messages": [*HELLO, {"role": "assistant", "content": "Hi"}]}, "first and last"),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "a text or an image_url"),
    "a marker": ({"messages": [{"role": "user", "content": "<image> what?"}]}, "literal"),
    "too many images": ({"messages": shown("?", *[IMAGE] * 4)}, "4 images; this server takes up to 3"),
    "a file": ({"messages": shown("?", f"file://{IMAGES / 'im0.png'}")}, "opens no files"),
    "a host": ({"messages": shown("?", "http://169.254.169.254/x.png")}, "does not fetch from '169.254.169.254'"),
    "another scheme": ({"messages": shown("?", "ftp://host/x.png")}, "is not an image address"),
    "no base64": ({"messages": shown("?", "data:image/png;base64,@@@@")}, "no base64"),
    "not an image": ({"messages": shown("?", "data:image/png;base64,AAAA")}, "is not an image"),
    "too long": ({"messages": [{"role": "user", "content": "word " * 3000}]}, "positions, and the model takes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, client: Any) -> None:
    """With the reason, as 400; the model is not asked."""
    options, message = REFUSED[case]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **({"messages": HELLO} | options))
    assert message in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"


def test_models_and_health(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    with pytest.raises(openai.NotFoundError, match=f"'gpt-4' is not served here; '{MODEL}' is"):
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    response = client._client.get(str(client.base_url).replace("/v1/", "/health"))
    assert (response.status_code, response.json()) == (200, {"status": "ok", "answering": 0, "waiting": 0})


def test_body_and_image_sizes(loaded: LoadedModel) -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 200)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    cases = [
        (replace(SETTINGS, body=BodyLimits(200)), openai.APIStatusError, "more than 200 bytes"),
        (replace(SETTINGS, images=ImagePolicy(max_bytes=50)), openai.BadRequestError, "takes up to 50"),
        (replace(SETTINGS, images=ImagePolicy(max_pixels=59_999)), openai.BadRequestError, "300 x 200 pixels"),
    ]
    for settings, error, message in cases:
        with running(loaded, settings) as (client, _), pytest.raises(error, match=message) as caught:
            ask(client, shown("?", url))
        assert caught.value.status_code == (413 if settings.body.max_bytes == 200 else 400)


def test_key(loaded: LoadedModel) -> None:
    with running(loaded, replace(SETTINGS, access=Access(api_key="secret"))) as (client, _):
        assert ask(client, HELLO).choices
        stranger = client.with_options(api_key="guess")
        for call in (lambda: ask(stranger, HELLO), stranger.models.list):
            with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
                call()


def test_files_below_a_folder(loaded: LoadedModel, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a b.png").write_bytes((IMAGES / "im0.png").read_bytes())
    (tmp_path / "secret.png").write_bytes((IMAGES / "im1.png").read_bytes())
    with running(loaded, replace(SETTINGS, images=ImagePolicy(folder=folder))) as (client, _):
        answer = ask(client, shown("What is shown?", "file:a%20b.png")).choices[0].message.content
        assert answer == expected(loaded, "What is shown?", "im0.png")
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
        (folder / "link").symlink_to(tmp_path)
        names = ("file:../secret.png", "file:%2e%2e/secret.png", f"file://{tmp_path}/secret.png")
        for name in (*names, "file:link.png", "file:link/secret.png", "file:link/images/../secret.png"):
            with pytest.raises(openai.BadRequestError, match=r"outside the image folder|is missing"):
                ask(client, shown("?", name))


@contextmanager
def image_host(redirect: str | None = None) -> Iterator[str]:
    """A web server with one image; or one that sends everybody elsewhere."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if redirect else 200)
            if redirect:
                self.send_header("Location", redirect)
            self.end_headers()
            if not redirect:
                self.wfile.write((IMAGES / "im0.png").read_bytes())

        def log_message(self, *_: Any) -> None:
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{web.server_port}"
    finally:
        web.shutdown()
        web.server_close()


def test_named_hosts(loaded: LoadedModel) -> None:
    """A host that is allowed is asked, and may not send the server on to one that is not."""
    with image_host() as host, image_host(f"http://{host}/x.png") as sender:
        for allowed, asked, fine in (({host}, host, True), ({sender}, sender, False), ({host, sender}, sender, True)):
            settings = replace(SETTINGS, images=ImagePolicy(hosts=frozenset(allowed)))
            with running(loaded, settings) as (client, _):
                messages = shown("What is shown?", f"http://{asked}/x.png")
                if fine:
                    wanted = expected(loaded, "What is shown?", "im0.png")
                    assert ask(client, messages).choices[0].message.content == wanted
                else:
                    with pytest.raises(openai.BadRequestError, match=f"does not fetch from '{host}'"):
                        ask(client, messages)


class Gate:
    """Lets the model take its steps only when it is open, and counts them."""

    def __init__(self) -> None:
        self.open, self.steps = threading.Event(), 0

    def __call__(self, *_: Any) -> None:
        assert self.open.wait(60)
        self.steps += 1


@pytest.fixture
def gate(loaded: LoadedModel) -> Iterator[Gate]:
    gate = Gate()
    hook = loaded.model.register_forward_pre_hook(gate)
    yield gate
    gate.open.set()
    hook.remove()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        threading.Event().wait(0.01)


def test_timeout(loaded: LoadedModel, gate: Gate) -> None:
    """The client is told, and the row is given up."""
    with running(loaded, replace(SETTINGS, seconds=0.3)) as (client, engine):
        with pytest.raises(openai.APIStatusError, match=r"more than 0\.3 s") as caught:
            ask(client, HELLO, max_tokens=32)
        assert caught.value.status_code == 504
        assert all(row.cancelled for row in engine.answering)
        with pytest.raises(openai.APIError, match=r"more than 0\.3 s"):
            list(ask(client, HELLO, stream=True))
        gate.open.set()
        until(lambda: not engine.answering and not engine.waiting)
    assert gate.steps < 4


def test_too_many_wait(loaded: LoadedModel, gate: Gate) -> None:
    with running(loaded, max_batch=1, max_waiting=1) as (client, engine), ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, client, HELLO)
        until(lambda: len(engine.answering) == 1)
        second = pool.submit(ask, client, HELLO)
        until(lambda: engine.waiting == 1)
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting"):
            ask(client, HELLO)
        gate.open.set()
        assert first.result().choices == second.result().choices


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_is_given_up(stream: bool, loaded: LoadedModel, gate: Gate) -> None:
    """The rest of an answer that nobody reads is not generated; the next one is."""
    with running(loaded) as (client, engine):
        with pytest.raises(openai.APITimeoutError):
            list(ask(client.with_options(timeout=0.5), HELLO, max_tokens=32, stream=stream))
        until(lambda: bool(engine.answering) and all(row.cancelled for row in engine.answering))
        gate.open.set()
        assert ask(client, HELLO).choices[0].message.content == expected(loaded, "Hello")
    assert gate.steps <= 2 + 8 + 8, "the first steps, the next answer, and the one that it is compared with"


def test_failures_end_their_batch_alone(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(loaded) as (client, _):
        with monkeypatch.context() as patch:
            patch.setattr(loaded.model, "generate", lambda *_, **__: 1 / 0)
            with pytest.raises(openai.InternalServerError, match="the model failed"):
                ask(client, HELLO)
            with pytest.raises(openai.APIError, match="the model failed"):
                list(ask(client, HELLO, stream=True))
        assert "ZeroDivisionError" in caplog.text
        assert ask(client, HELLO).choices[0].message.content == expected(loaded, "Hello")


def test_out_of_memory(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is halved until it fits, and nothing is lost; one that never fits is told so."""
    generate, limit = loaded.model.generate, [2]

    def small(input_ids: torch.Tensor, **options: Any) -> Any:
        if len(input_ids) > limit[0]:
            raise torch.OutOfMemoryError("too large")
        return generate(input_ids, **options)

    monkeypatch.setattr(loaded.model, "generate", small)
    with running(loaded, gather_seconds=2.0, max_batch=5) as (client, engine):
        with ThreadPoolExecutor(5) as pool:
            answers = [future.result() for future in [pool.submit(ask, client, HELLO) for _ in range(5)]]
        monkeypatch.setattr(loaded.model, "generate", generate)
        assert {answer.choices[0].message.content for answer in answers} == {expected(loaded, "Hello")}
        assert engine.max_batch < 3
        monkeypatch.setattr(loaded.model, "generate", small)
        limit[0] = 0
        with pytest.raises(openai.InternalServerError, match="ran out of memory"):
            ask(client, HELLO)


FLAGS: dict[str, tuple[list[str], str]] = {
    "open to all": (["--host", ANYWHERE], "LLAVA_API_KEY"),
    "no batch": (["--batch-size", "0"], "--batch-size 0"),
    "no folder": (["--image-folder", "/nowhere"], "no such folder"),
    "limits": (["--token-limit", "4"], "--max-new-tokens 512"),
    "template": (["--conv-mode", "nope"], "no such template"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, message = FLAGS[case]
    monkeypatch.delenv(api.KEY, raising=False)
    with pytest.raises(FlagError, match=message):
        api.settings_of(api.build_parser().parse_args(["--model-path", str(CHECKPOINT), *words]))


def test_flags_reach_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(api.KEY, "secret")
    words = ["--host", ANYWHERE, "--temperature", "0", "--max-image-mb", "1", "--allow-image-host", "Example.org"]
    settings = api.settings_of(api.build_parser().parse_args(["--model-path", str(CHECKPOINT), *words]))
    assert settings.access.api_key == "secret"
    assert settings.defaults.temperature == 0
    assert settings.images.max_bytes == 2**20
    assert settings.images.hosts == {"example.org"}


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(FlagError, match="cannot listen"):
        api.main(["--model-path", str(CHECKPOINT), "--port", str(other.getsockname()[1])])
