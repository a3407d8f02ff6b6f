"""LaVIN's page in headless Chromium: what a visitor types, uploads and sees. Needs Chromium, for example Debian's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mma.lavin.chat import LavinChat
from mma.lavin.page import build_page
from tests.mma.lavin.test_demo import IMAGE, chat

__all__ = ["chat"]  # a fixture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
SECONDS = 30_000  # milliseconds, playwright's unit


@pytest.fixture
def tab(chat: LavinChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page, opened."""
    pytest.importorskip("gradio", reason="the extra `serve` is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra `dev` is not installed")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    page = build_page(chat, max_new_tokens=16)
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        with playwright.sync_playwright() as program:
            browser = program.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            tab = browser.new_page(viewport={"width": 1200, "height": 820})
            tab.set_default_timeout(SECONDS)
            tab.goto(address)
            yield tab
            browser.close()
    finally:
        page.close()


def ask(tab: Any, question: str) -> None:
    tab.get_by_label("Question").fill(question)
    tab.get_by_role("button", name="Send").click()


def settled(tab: Any, count: int) -> list[str]:
    """The messages of the conversation, once there are `count` and the last one is no longer growing."""
    bubbles = tab.get_by_test_id("bot").or_(tab.get_by_test_id("user"))
    tab.wait_for_function(
        "count => document.querySelectorAll('[data-testid=bot], [data-testid=user]').length >= count"
        " && !document.querySelector('.generating, .progress-text')",
        arg=count,
    )
    return [text.strip() for text in bubbles.all_inner_texts()]


def test_a_visit(tab: Any, tmp_path: Path) -> None:
    """A question without an image, an image, a question about it, and a file that is not an image."""
    ask(tab, "What is a lake?")
    first = settled(tab, 2)
    assert first[0] == "What is a lake?"
    assert first[1], "the answer is shown"

    upload = tab.locator("input[type=file]").first
    upload.set_input_files(IMAGE)
    tab.wait_for_function("() => document.querySelectorAll('[data-testid=bot]').length === 0")
    ask(tab, "What is shown?")
    shown = settled(tab, 2)
    assert shown[0] == "What is shown?", "another image begins a new conversation"
    tab.screenshot(path=str(tmp_path / "page.png"))
    assert (tmp_path / "page.png").stat().st_size > 10_000

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    tab.get_by_role("button", name="Clear").or_(tab.get_by_label("Remove Image")).first.click()
    upload.set_input_files(str(broken))
    tab.wait_for_function("() => document.querySelectorAll('[data-testid=bot]').length === 0")
    ask(tab, "And here?")
    assert "Error: " in (said := settled(tab, 2))[1], said
    assert "cannot be read" in said[1]
    assert tab.get_by_label("Question").input_value() == "And here?", "what was asked is not lost"

    tab.get_by_role("button", name="New").click()
    tab.wait_for_function("() => document.querySelectorAll('[data-testid=bot]').length === 0")
    assert "Traceback" not in tab.content()
