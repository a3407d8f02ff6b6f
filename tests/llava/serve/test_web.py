"""The page without a browser: its client of servers, its handlers, and its command line."""

from __future__ import annotations

import asyncio
import http.server
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava.errors import BadImageError, FlagError, LlavaError
from llava.serve import gradio_web_server, web
from llava.serve.page.client import Model, Sampling, Server, ServerError, list_models, server_address, stream_answer
from llava.serve.page.conversation import Conversation, Turn, data_url, read_upload
from llava.serve.page.feedback import Feedback
from llava.serve.page.handlers import Handlers, chosen_sampling, stopped
from llava.serve.page.models import NONE, ModelList
from tests.llava.serve.page_servers import IMAGE, SETTINGS, Served, asked_by_api, two_servers
from tests.llava.serve.test_api import ANYWHERE, running
from tests.structure import ROOT

httpx = pytest.importorskip("httpx", reason="the extra `serve` is not installed")

DIGEST = "0" * 64
VALUES = (0.0, 0.7, 6.0)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Served]]:
    with two_servers(tmp_path_factory.mktemp("web")) as found:
        yield found


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    """A folder with an upload of a visitor."""
    (tmp_path / "uploads" / DIGEST).mkdir(parents=True)
    shutil.copy(IMAGE, tmp_path / "uploads" / DIGEST / "mine.png")
    return tmp_path / "uploads"


@pytest.fixture
def handlers(servers: tuple[Served, Served], uploads: Path, tmp_path: Path) -> Handlers:
    models = ModelList([served.server for served in servers])
    models.look_now()
    return Handlers(models, uploads, Feedback(tmp_path / "votes"))


# Servers


@pytest.mark.parametrize("given", ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"])
def test_an_address_in_every_spelling(given: str) -> None:
    assert server_address(given) == "http://a:1"


@pytest.mark.parametrize(
    "given",
    ["", "a:1", "ftp://a", "http://", "http://a:x", "http://a:99999", "http://[", "http://a?b", "file:///a"],
)
def test_what_is_not_an_address_is_refused(given: str) -> None:
    with pytest.raises(FlagError, match=r"--server .*give the address of a server"):
        server_address(given)


@pytest.mark.parametrize("given", ["http://u:secret@a", "http://u:secret@a:x", "http://u:secret@["])
def test_a_password_in_an_address_is_refused_and_not_repeated(given: str) -> None:
    with pytest.raises(FlagError, match=r"--server: .*LLAVA_API_KEY") as refused:
        server_address(given)
    assert "secret" not in str(refused.value)


@contextmanager
def other_server(status: int, content: bytes) -> Iterator[Server]:
    """A server that says one thing to everybody."""

    class Says(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815 - the names of the library

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Says)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield Server(f"http://127.0.0.1:{listening.server_port}", seconds=5)
    finally:
        listening.shutdown()
        listening.server_close()


def names(*servers: Server) -> tuple[list[str], list[str]]:
    models, problems = asyncio.run(list_models(servers))
    return [model.label for model in models], [str(problem) for problem in problems]


def test_models_of_several_servers(servers: tuple[Served, Served]) -> None:
    first, second = (served.server for served in servers)
    assert names(first, second) == ([served.name for served in servers], [])
    # The same model on two servers is two models.
    with running(servers[0].engine.loaded, SETTINGS) as (client, _):
        again = Server(str(client.base_url).removesuffix("/v1/"))
        labels, _ = names(first, again)
        assert labels == [f"{servers[0].name} ({server.url})" for server in (first, again)]
    labels, problems = names(Server("http://127.0.0.1:9"), first)
    assert labels == [servers[0].name]
    assert "http://127.0.0.1:9: no server answers there; start one: python -m llava.serve.api" in problems[0]


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (200, b"<html>", "is not a server of this API (status 200): '<html>'"),
        (200, b"[]", "is not a server of this API"),
        (404, b'{"error": {"message": "nothing here"}}', "nothing here"),
        (401, b'{"error": {"message": "the API key is missing"}}', "the API key is missing; set LLAVA_API_KEY"),
        (502, b'{"error": "bad"}', "(status 502)"),
    ],
)
def test_another_server_is_named(status: int, content: bytes, said: str) -> None:
    with other_server(status, content) as server:
        assert said in names(server)[1][0]
        with pytest.raises(ServerError) as refused:
            answer_of(Model("a", "a", server))
        assert said in str(refused.value) or "broke off" in str(refused.value)


def answer_of(model: Model, question: str = "What?") -> str:
    async def read() -> str:
        messages = [{"role": "user", "content": question}]
        return "".join([piece.text async for piece in stream_answer(model, messages, Sampling(0, 0.7, 4))])

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "the answer broke off; ask again"),
        (b'data: {"error": {"message": "took too long"}}\n\n', "took too long"),
        (b"data: {\n\ndata: [DONE]\n\n", "is not a server of this API"),
        (b"", "broke off"),
    ],
)
def test_a_stream_that_breaks_is_no_answer(content: bytes, said: str) -> None:
    with other_server(200, content) as server, pytest.raises(ServerError, match=said.replace("?", r"\?")):
        answer_of(Model("a", "a", server))


@pytest.mark.parametrize(
    "event",
    [
        '{"choices": [1]}',
        '{"choices": {"a": 1}}',
        '{"choices": "ab"}',
        '{"choices": [{"delta": [1]}]}',
        '{"choices": [{"delta": {"content": [1]}}]}',
        '{"choices": [{"delta": {"content": {"a": 1}}}]}',
    ],
)
def test_events_of_another_form_are_refused_in_words(event: str) -> None:
    content = f"data: {event}\n\ndata: [DONE]\n\n".encode()
    with other_server(200, content) as server, pytest.raises(ServerError, match="is not a server of this API"):
        answer_of(Model("m", "m", server))


def test_a_key_is_sent_and_a_wrong_one_is_explained(servers: tuple[Served, Served]) -> None:
    settings = replace(SETTINGS, access=replace(SETTINGS.access, api_key="sesame"))
    with running(servers[0].engine.loaded, settings) as (client, _):
        url = str(client.base_url).removesuffix("/v1/")
        assert names(Server(url, "sesame")) == ([servers[0].name], [])
        labels, (problem,) = names(Server(url, "wrong"))
        assert labels == []
        assert "the API key is missing or wrong; set LLAVA_API_KEY to the key of the server" in problem


# Conversations


def test_messages_are_those_that_were_answered() -> None:
    turns = (
        Turn("one", "m", "first", ended=True),
        Turn("two", "m", "half", ended=True, problem="broke off"),
        Turn("three", "m"),
    )
    conversation = Conversation(turns)
    assert conversation.messages("data:x") == [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "data:x"}}, {"type": "text", "text": "one"}],
        },
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "three"},
    ]
    assert conversation.messages(None)[0] == {"role": "user", "content": "one"}
    assert [each["content"] for each in conversation.shown()][1::2] == ["first", "half\n\nError: broke off", "▌"]
    assert conversation.is_open
    assert not conversation.stopped().is_open
    assert stopped([conversation])[1][-1]["content"] == "(an empty answer)"


def test_an_upload_is_read_and_nothing_else(uploads: Path, tmp_path: Path) -> None:
    content, image = read_upload(str(uploads / DIGEST / "mine.png"), uploads)
    assert content == IMAGE.read_bytes()
    assert image.mode == "RGB"
    assert data_url(content).startswith("data:image/png;base64,")
    shutil.copy(IMAGE, tmp_path / "private.png")
    for path in (tmp_path / "private.png", "/dev/zero", uploads / DIGEST / "gone.png", uploads / DIGEST, 7, ""):
        with pytest.raises(BadImageError, match="upload it again"):
            read_upload(path if isinstance(path, int) else str(path), uploads)
    (uploads / DIGEST / "broken.png").write_bytes(b"no image")
    with pytest.raises(BadImageError, match="the image cannot be read") as refused:
        read_upload(str(uploads / DIGEST / "broken.png"), uploads)
    assert str(uploads) not in str(refused.value)


# Handlers


def asked(handlers: Handlers, question: object, image: object = None, **given: Any) -> tuple[str, str, list[Any]]:
    choices = given.get("choices", [model.label for model in handlers.models.models])
    conversations = given.get("conversations", [Conversation()] * len(choices))
    return asyncio.run(handlers.ask(question, image, choices, conversations))


def answered(
    handlers: Handlers, conversation: Conversation, values: Any = VALUES, details: bool = False
) -> list[tuple[Conversation, Any, str]]:
    async def read() -> list[Any]:
        return [column async for column in handlers.answer(conversation, values, details)]

    return asyncio.run(read())


def test_each_column_says_what_its_server_says(
    handlers: Handlers, servers: tuple[Served, Served], uploads: Path
) -> None:
    path = str(uploads / DIGEST / "mine.png")
    box, notice, conversations = asked(handlers, " What is shown? ", path)
    assert (box, notice) == ("", "")
    for served, conversation in zip(servers, conversations, strict=True):
        steps = answered(handlers, conversation, details=True)
        expected = asked_by_api(served, "What is shown?", data_url(IMAGE.read_bytes()), 6)
        last, shown, drawing = steps[-1]
        assert last.turns[-1].answer == expected.choices[0].message.content
        assert [each["content"] for each in shown] == ["What is shown?", last.turns[-1].answer]
        assert len({step[1][-1]["content"] for step in steps}) > 3, "it comes in pieces"
        assert not any(step[2] for step in steps[:-1])
        assert ("patches kept" in drawing) == (served is servers[0])
        assert ("Expert utilization" in drawing) == (served is servers[1])
        # A second turn sees the first one.
        _, _, (again,) = asked(handlers, "Why?", path, choices=[served.name], conversations=[last])
        (after, _, _) = answered(handlers, again)[-1]
        assert [turn.question for turn in after.turns] == ["What is shown?", "Why?"]
        assert after.turns[-1].problem is None


def test_a_column_that_fails_says_why_and_the_others_answer(handlers: Handlers) -> None:
    names = [handlers.models.models[0].label, "gone", NONE]
    _, _, conversations = asked(handlers, "What?", choices=names)
    ends = [answered(handlers, conversation)[-1] for conversation in conversations]
    assert ends[0][0].turns[-1].problem is None
    assert ends[1][1][-1]["content"] == "Error: no server has the model 'gone' now; choose another one"
    assert ends[2] == (Conversation(), [], "")
    # What failed is asked again, and is not part of what the model is told.
    notice, again = handlers.again([names[0], names[0], NONE], [end[0] for end in ends])
    assert notice == ""
    after = [answered(handlers, conversation)[-1][0] for conversation in again]
    assert after[0].turns[-1].answer == after[1].turns[-1].answer
    assert [len(conversation.turns) for conversation in after] == [1, 1, 0]


@pytest.mark.parametrize(
    ("question", "image", "said"),
    [
        ("", None, "there is no question"),
        ("  ", None, "there is no question"),
        (None, None, "there is no question"),
        ("a" * 20_001, None, "the question has 20001 characters; the most is 20000"),
        ("What?", "/dev/zero", "upload it again"),
        ("What?", {"path": "/dev/zero"}, "upload it again"),
    ],
)
def test_what_cannot_be_asked_stays_in_the_box(handlers: Handlers, question: Any, image: Any, said: str) -> None:
    box, notice, conversations = asked(handlers, question, image)
    assert box == (question or "")
    assert said in notice
    assert conversations == [Conversation()] * 2


def test_nothing_is_asked_of_no_model_or_under_way(handlers: Handlers) -> None:
    assert "no model is chosen" in asked(handlers, "What?", choices=[NONE, NONE])[1]
    under_way = [Conversation().ask("What?", "m")]
    assert "an answer is still coming" in asked(handlers, "What?", choices=["m"], conversations=under_way)[1]
    assert "an answer is still coming" in handlers.again(["m"], under_way)[0]
    assert "nothing was asked yet" in handlers.again(["m"], [Conversation()])[0]


def test_another_image_begins_a_new_conversation_whenever_that_is_noticed(handlers: Handlers, uploads: Path) -> None:
    path = str(uploads / DIGEST / "mine.png")
    _, _, (old, other) = asked(handlers, "What?")
    before = answered(handlers, old)[-1][0]
    # The step of the upload comes behind the question about it.
    _, notice, (new, _) = asked(handlers, "And here?", path, conversations=[before, other])
    assert (notice, [turn.question for turn in new.turns]) == ("", ["And here?"])
    assert handlers.new_image(path, [new, new]) == [None, None]
    assert answered(handlers, new)[-1][0].turns[-1].problem is None
    assert handlers.new_image(path, [before, new]) == [Conversation(), None]
    assert handlers.new_image(None, [before, new]) == [None, Conversation()]


def test_an_answer_that_nobody_wants_any_more_ends_without_a_word(handlers: Handlers) -> None:
    _, _, (first, second) = asked(handlers, "What?")

    async def read(conversation: Conversation, wanted: int) -> list[str]:
        shown = []
        async for step in handlers.answer(conversation, (0, 0.7, 6), False):
            shown.append(step[1][-1]["content"])
            if len(shown) == wanted:
                conversation.abandoned()
        return shown

    assert len(asyncio.run(read(first, 2))) == 2
    assert len(asyncio.run(read(second, 99))) > 3
    _, _, (third, _) = asked(handlers, "What?")
    third.abandoned()
    assert asyncio.run(read(third, 1)) == []
    # A version from before Stop, which a late step may put back, takes the next question.
    _, _, (fourth, _) = asked(handlers, "What?")
    fourth.stopped()
    assert asked(handlers, "And now?", conversations=[fourth, second.stopped()])[1] == ""


@pytest.mark.parametrize("values", [(None, 0.7, 6), (3, 0.7, 6), (0, 2, 6), (0, 0.7, 0), ("1", 0.7, 6), (True, 0.7, 6)])
def test_numbers_are_checked(handlers: Handlers, values: Any) -> None:
    with pytest.raises(FlagError, match="the field '"):
        chosen_sampling(values)
    _, _, conversations = asked(handlers, "What?")
    assert "the field '" in answered(handlers, conversations[0], values)[-1][0].turns[-1].problem
    assert chosen_sampling((1, 1, 6.0)) == Sampling(1.0, 1.0, 6)
    with pytest.raises(FlagError, match="nan"):
        chosen_sampling((float("nan"), 1, 6))


def test_who_stops_reading_ends_the_generation(handlers: Handlers, servers: tuple[Served, Served]) -> None:
    engine = servers[0].engine
    _, _, (conversation, _) = asked(handlers, "What?")

    async def leave() -> None:
        reading = handlers.answer(conversation, (0.0, 0.7, 64.0), False)
        async for step, _, _ in reading:
            if step.turns[-1].answer:
                break
        await reading.aclose()

    real = engine.loaded.model.forward
    tokens: list[float] = []

    def slow(*args: Any, **kwargs: Any) -> Any:
        tokens.append(time.monotonic())
        time.sleep(0.1)
        return real(*args, **kwargs)

    engine.loaded.model.forward = slow
    try:
        asyncio.run(leave())
        deadline = time.monotonic() + 60
        while engine.answering and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        engine.loaded.model.forward = real
    assert not engine.answering
    assert len(tokens) < 60, "the server went on for nobody"


def test_a_turn_is_answered_once(handlers: Handlers, servers: tuple[Served, Served]) -> None:
    """Steps that come to a turn while it is answered, at its beginning or in the middle, add nothing to it."""
    _, _, (conversation, _) = asked(handlers, "What?")
    before = len(servers[0].engine.batches)

    async def answer(turn: Conversation) -> list[Any]:
        return [column async for column in handlers.answer(turn, VALUES, False)]

    async def visit() -> list[Any]:
        reading, others, columns = handlers.answer(conversation, VALUES, False), [], []
        async for column in reading:
            columns.append(column)
            if not column[0].turns[-1].ended:
                assert "an answer is still coming" in handlers.again([servers[0].name], [column[0]])[0]
                others += [await answer(column[0]), await answer(conversation)]
        assert len(others) > 2
        assert not any(others)
        return columns

    columns = asyncio.run(visit())
    assert columns[-1][0].turns[-1].ended
    assert len(servers[0].engine.batches) == before + 1
    # Asked again, the same question has another answer of its own.
    _, (again,) = handlers.again([servers[0].name], [columns[-1][0]])
    assert asyncio.run(answer(again))[-1][0].turns[-1].answer == columns[-1][0].turns[-1].answer


# The command line

UPSTREAM = "--controller http://localhost:10000 --model-list-mode reload --host 127.0.0.1 --port 7861 --embed "
UPSTREAM += "--concurrency-count 8"


def test_options_of_upstream_are_accepted() -> None:
    args = gradio_web_server.build_parser().parse_args(shlex.split(UPSTREAM))
    web.check_options(args)
    assert (args.controller_url, args.model_list_mode, args.concurrency_count) == (
        "http://localhost:10000",
        "reload",
        8,
    )
    assert web.build_parser().parse_args([]).host == "127.0.0.1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--share", "--share: is not supported: it would open this machine to the internet"),
        ("--moderate", "--moderate: is not supported"),
        ("--port 70000", "--port"),
        ("--columns 9", "--columns"),
        ("--timeout 0", "--timeout"),
        ("--concurrency-count 0", "--concurrency-count"),
        ("--host 0.0.0.0", "--host 0.0.0.0: other machines could use this page; set LLAVA_PAGE_LOGIN"),
        ("--host example.org", "other machines could use this page"),
        ("--server nowhere", "--server nowhere: give the address"),
        ("--server http://127.0.0.1:9", "http://127.0.0.1:9: no server answers there"),
    ],
)
def test_what_is_refused(words: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(web.LOGIN, raising=False)
    with pytest.raises(LlavaError) as refused:
        web.main(shlex.split(words))
    assert said in str(refused.value)


def test_a_login_opens_the_page_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    args = web.build_parser().parse_args(["--host", ANYWHERE])
    monkeypatch.setenv(web.LOGIN, "me:and:a colon")
    assert web.login_of(args) == ("me", "and:a colon")
    monkeypatch.setenv(web.LOGIN, "word")
    with pytest.raises(FlagError, match="must be NAME:PASSWORD"):
        web.login_of(args)
    monkeypatch.delenv(web.LOGIN)
    args.allow_anyone = True
    assert web.login_of(args) is None


@pytest.mark.slow
def test_upstreams_command_starts_the_page(servers: tuple[Served, Served], tmp_path: Path) -> None:
    """As a program: it says where the page is and whom it asks, in our lines alone, and answers no other host."""
    pytest.importorskip("gradio", reason="the extra `serve` is not installed")
    addresses = [served.server.url for served in servers]
    words = ["--controller", "http://localhost:10000", "--model-list-mode", "reload"]
    words += [word for address in addresses for word in ("--server", address)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(tmp_path)}
    command = [sys.executable, "-u", "-m", "llava.serve.gradio_web_server", *words]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        first, second = process.stdout.readline(), process.stdout.readline()
        try:
            address = second.split()[4].rstrip(";")
            assert httpx.get(address, trust_env=False).status_code == 200
            rebound = httpx.get(address, headers={"Host": "evil.example"}, trust_env=False)
            assert rebound.status_code == 403
            assert "evil.example" in rebound.json()["error"]["message"]
        finally:
            process.terminate()
            _, errors = process.communicate(timeout=60)
    assert first == (
        "--controller-url http://localhost:10000: ignored, there is no controller; --server names the servers\n"
    )
    models = ", ".join(served.name for served in servers)
    assert second.startswith("the page is at http://127.0.0.1:")
    assert second.endswith(f"; it asks {', '.join(addresses)} ({models})\n")
    assert "Traceback" not in errors
