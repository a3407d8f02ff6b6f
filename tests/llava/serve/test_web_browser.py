"""The page in headless Chromium, with two models behind two servers. Needs Chromium, for example Debian's."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llava.serve import web
from llava.serve.page import handlers
from llava.serve.page.client import stream_answer
from llava.serve.page.feedback import Feedback
from llava.serve.page.layout import build_page
from llava.serve.page.models import ModelList
from tests.llava.serve.page_servers import IMAGE, Served, asked_by_api, two_servers
from tests.llava.serve.test_api import data_url

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
MILLISECONDS = 180_000
TOKENS = 24
QUESTION = "What is shown here?"


class Visit(NamedTuple):
    """An opened page, the servers behind it, its log, and the models that have given an answer, in their order."""

    tab: Any
    servers: tuple[Served, Served]
    votes: Path
    answers: list[str]


@pytest.fixture
def visit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Visit]:
    pytest.importorskip("gradio", reason="the extra `serve` is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra `dev` is not installed")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    answers: list[str] = []

    async def counted(model: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for piece in stream_answer(model, *args, **kwargs):
            yield piece
        answers.append(model.label)

    monkeypatch.setattr(handlers, "stream_answer", counted)
    with two_servers(tmp_path) as servers:
        models = ModelList([served.server for served in servers])
        models.look_now()
        page = build_page(models, 2, feedback=Feedback(tmp_path / "votes"), max_new_tokens=64)
        web.launch(page, web.build_parser().parse_args([]), None)
        try:
            with playwright.sync_playwright() as program:
                browser = program.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
                tab = browser.new_page(viewport={"width": 1280, "height": 1100})
                tab.set_default_timeout(MILLISECONDS)
                tab.goto(page.local_url)
                yield Visit(tab, servers, tmp_path / "votes", answers)
                browser.close()
        finally:
            page.close()


def ask(tab: Any, question: str) -> None:
    tab.get_by_label("Question").fill(question)
    tab.get_by_role("button", name="Send").click()


def wait_for_answers(visit: Visit, count: int) -> None:
    """Wait until the models together have given as many answers."""
    for _ in range(MILLISECONDS // 50):
        if len(visit.answers) >= count:
            return
        visit.tab.wait_for_timeout(50)
    raise AssertionError(f"{len(visit.answers)} answers after {MILLISECONDS} ms, not {count}")


def column(tab: Any, number: int) -> Any:
    return tab.locator(f"#column-{number}")


WATCH = """() => {
    window.lengths = [[], []];
    new MutationObserver(() => [1, 2].forEach(number => {
        const all = document.querySelectorAll(`#column-${number} [data-testid=bot]`);
        const text = all.length ? all[all.length - 1].innerText : '';
        const seen = window.lengths[number - 1];
        if (seen[seen.length - 1] !== text) seen.push(text);
    })).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""
"""Notes every text that the last answer of a column had on its way."""

ANSWERED = """count => [1, 2].every(number => {
    const all = document.querySelectorAll(`#column-${number} [data-testid=bot]`);
    return all.length >= count && all[all.length - 1].innerText.trim() && !all[all.length - 1].innerText.includes('▌');
})"""


def plain(text: str) -> str:
    """Letters and digits, which Markdown leaves as they are."""
    return "".join(letter for letter in text if letter.isalnum())


def test_a_visit(visit: Visit, tmp_path: Path) -> None:
    """An image, a question, two streams that equal the API's answers, drawings, a vote, and a wrong file."""
    tab = visit.tab
    upload = tab.locator("input[type=file]").first
    upload.set_input_files(str(IMAGE))
    tab.get_by_role("button", name="Answers").click()
    for label, value in (("Temperature", "0"), ("Longest answer in tokens", str(TOKENS))):
        tab.get_by_label(f"number input for {label}").fill(value)
        tab.keyboard.press("Tab")
    tab.evaluate(WATCH)
    ask(tab, QUESTION)
    tab.wait_for_function(ANSWERED, arg=1)
    lengths = tab.evaluate("window.lengths")
    for number, served in enumerate(visit.servers, start=1):
        expected = asked_by_api(served, QUESTION, data_url(IMAGE), TOKENS).choices[0].message.content
        shown = column(tab, number).get_by_test_id("bot").last.inner_text()
        assert plain(expected)
        assert plain(shown) == plain(expected)
        assert len(lengths[number - 1]) > 3, "the answer came in pieces"
        assert column(tab, number).get_by_label(f"Model {number}").input_value() == served.name
    # Each model is drawn by what it does.
    sparse, routed = (tab.locator(f"#details-{number}") for number in (1, 2))
    sparse.get_by_text("patches kept").wait_for()
    assert sparse.locator("img").count() == 2
    assert sparse.locator(".dropped").count() > 0
    routed.get_by_text("Expert utilization: mlp").wait_for()
    assert routed.locator("svg rect").count() > 3
    assert routed.locator("img").count() == 0
    if folder := os.environ.get("LLAVA_SCREENSHOTS"):
        tab.screenshot(path=str(Path(folder) / "page.png"), full_page=True)
    # A vote is one line, and not given twice.
    column(tab, 2).get_by_role("button", name="Upvote").click()
    tab.get_by_text("Saved: upvote").wait_for()
    column(tab, 2).get_by_role("button", name="Flag").click()
    tab.get_by_text("has your vote already: upvote").wait_for()
    (log,) = visit.votes.glob("*-conv.json")
    (row,) = [json.loads(line) for line in log.read_text().splitlines()]
    expected = asked_by_api(visit.servers[1], QUESTION, data_url(IMAGE), TOKENS).choices[0].message.content
    assert (row["type"], row["model"]) == ("upvote", visit.servers[1].name)
    assert row["state"]["messages"] == [["user", QUESTION], ["assistant", expected]]
    assert len(list(visit.votes.glob(f"serve_images/*/{row['images'][0]}.jpg"))) == 1
    # The conversation continues; the last question can be asked again.
    ask(tab, "And now?")
    tab.wait_for_function(ANSWERED, arg=2)
    wait_for_answers(visit, 4)
    tab.get_by_role("button", name="Regenerate").click()
    wait_for_answers(visit, 6)  # those of before, which are the same, are still on the page when the step begins
    tab.wait_for_function(ANSWERED, arg=2)
    assert column(tab, 1).get_by_test_id("user").count() == 2
    # Another file begins a new conversation, and one that is not an image is refused in words.
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    tab.get_by_label("Remove Image").or_(tab.get_by_role("button", name="Clear")).first.click()
    upload.set_input_files(str(broken))
    tab.wait_for_function("() => document.querySelectorAll('[data-testid=bot]').length === 0")
    ask(tab, "And here?")
    tab.get_by_text("the image cannot be read").wait_for()
    assert tab.get_by_label("Question").input_value() == "And here?", "what was asked is not lost"
    assert tab.get_by_test_id("user").count() == 0
    assert "Traceback" not in tab.content()


def test_stop_ends_the_generation(visit: Visit) -> None:
    """What has come stays, the servers are done, and the page takes the next question."""
    tab = visit.tab
    tab.get_by_role("button", name="Answers").click()
    tab.get_by_label("number input for Longest answer in tokens").fill("64")
    tab.keyboard.press("Tab")
    engine = visit.servers[0].engine
    real = engine.loaded.model.forward

    @functools.wraps(real)  # `generate` reads its signature
    def slow(*args: Any, **kwargs: Any) -> Any:
        tab_pause.wait(0.25)
        return real(*args, **kwargs)

    import threading

    tab_pause = threading.Event()
    engine.loaded.model.forward = slow
    try:
        ask(tab, QUESTION)
        tab.wait_for_function("() => document.querySelectorAll('#column-1 [data-testid=bot]').length === 1")
        tab.wait_for_function("() => document.querySelector('#column-1 [data-testid=bot]').innerText.trim().length > 2")
        ask(tab, "Too early?")
        tab.get_by_text("an answer is still coming").wait_for()
        tab.get_by_role("button", name="Stop").click()
        tab.wait_for_function(ANSWERED, arg=1)
        for _ in range(100):
            if not engine.answering:
                break
            tab.wait_for_timeout(100)
        assert not engine.answering, "the server continues for nobody"
    finally:
        tab_pause.set()
        engine.loaded.model.forward = real
    ask(tab, "And now?")
    tab.wait_for_function(ANSWERED, arg=2)
    assert column(tab, 1).get_by_test_id("user").count() == 2
