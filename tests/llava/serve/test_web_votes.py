"""What the page writes and draws: votes in upstream's log, and what any extension says of an answer."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.errors import FlagError
from llava.serve.page.client import ServerError
from llava.serve.page.conversation import Conversation, Turn
from llava.serve.page.drawing import details_html
from llava.serve.page.feedback import VOTES, Feedback, FeedbackError
from llava.serve.page.handlers import Handlers
from llava.serve.page.models import ModelList
from tests.golden import golden_dir

IMAGE = golden_dir("llava") / "data" / "images" / "im0.png"
DIGEST = "0" * 64


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    """A folder with an upload of a visitor."""
    (tmp_path / "uploads" / DIGEST).mkdir(parents=True)
    shutil.copy(IMAGE, tmp_path / "uploads" / DIGEST / "mine.png")
    return tmp_path / "uploads"


@pytest.fixture
def handlers(uploads: Path, tmp_path: Path) -> Handlers:
    """Of a page without servers, which votes do not need."""
    return Handlers(ModelList([]), uploads, Feedback(tmp_path / "votes"))


# Votes


def voted(handlers: Handlers, kind: str, conversation: Conversation) -> tuple[Conversation, str]:
    return asyncio.run(handlers.vote(kind, conversation, "127.0.0.1"))


@pytest.mark.parametrize("kind", VOTES)
def test_a_vote_is_a_line_of_upstreams_log(handlers: Handlers, uploads: Path, tmp_path: Path, kind: str) -> None:
    path = str(uploads / DIGEST / "mine.png")
    turns = (Turn("no", "m", problem="broke", ended=True), Turn("What?", "m", "A “bus”\n.", ended=True))
    conversation = Conversation(turns, path)
    before = time.time()
    after, said = voted(handlers, kind, conversation)
    assert said.startswith(f"Saved: {kind} for m.")
    assert after.turns[-1].voted == kind
    assert "has your vote already" in voted(handlers, "flag", after)[1]
    (log,) = (tmp_path / "votes").glob("*.json")
    day = time.strftime("%Y-%m-%d")
    assert log.name == f"{day}-conv.json"
    (row,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert list(row) == ["tstamp", "type", "model", "state", "images", "ip"]
    assert before - 1 <= row["tstamp"] <= time.time() + 1
    assert (row["type"], row["model"], row["ip"]) == (kind, "m", "127.0.0.1")
    assert row["state"]["messages"] == [["user", "What?"], ["assistant", "A “bus”\n."]]
    with Image.open(tmp_path / "votes" / "serve_images" / day / f"{row['images'][0]}.jpg") as saved:
        assert saved.size == Image.open(IMAGE).size


def test_what_has_no_answer_gets_no_vote(handlers: Handlers, tmp_path: Path) -> None:
    for conversation in (
        Conversation(),
        Conversation().ask("What?", "m"),
        Conversation((Turn("What?", "m", problem="broke", ended=True),)),
    ):
        assert "there is no answer to vote on" in voted(handlers, "upvote", conversation)[1]
    assert not list((tmp_path / "votes").iterdir())


def test_votes_of_many_at_once_are_lines_of_their_own(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path)
    turns = [Conversation((Turn(str(number), "m", "a" * 5000, ended=True),)) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda each: feedback.vote("upvote", each, None, ""), turns))
    (log,) = tmp_path.glob("*-conv.json")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(int(row["state"]["messages"][0][1]) for row in rows) == list(range(40))
    assert log.stat().st_mode & 0o077 == 0, "others of the machine may not read what visitors said"


def test_a_line_that_is_not_whole_costs_itself_alone(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path)
    conversation = Conversation((Turn("What?", "m", "A bus.", ended=True),))
    log = feedback.vote("upvote", conversation, None, "")
    with log.open("a") as file:
        file.write('{"tstamp": 1, "type"')
    feedback.vote("flag", conversation, None, "")
    first, torn, second = log.read_text().splitlines()
    assert [json.loads(line)["type"] for line in (first, second)] == ["upvote", "flag"]
    assert torn == '{"tstamp": 1, "type"'


def test_a_log_that_cannot_be_written_is_said(handlers: Handlers, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FlagError, match=r"--feedback-dir .*file.*: cannot be made"):
        Feedback(tmp_path / "file" / "votes")
    shutil.rmtree(tmp_path / "votes")
    (tmp_path / "votes").write_text("in the way")
    conversation = Conversation((Turn("What?", "m", "A bus.", ended=True),))
    after, said = voted(handlers, "upvote", conversation)
    assert "the vote could not be saved: Not a directory" in said
    assert after.turns[-1].voted is None, "it may be given again"
    with pytest.raises(FeedbackError):
        handlers.feedback.vote("upvote", conversation, None, "")


# Drawings

PNG = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIAQMAAAD+wSzIAAAABlBMVEX///+/v7+jQ3Y5AAAADklEQVQI12P4AIX8EAgALgAD"
    "/aNpbtEAAAAASUVORK5CYII="
)
PATCHES = {"kind": "patches", "image": 0, "grid": [2, 2], "kept": [0, 3]}
WORDS = {"kind": "words", "title": "Answer <b>", "words": [["<script>", True], [" gone", False]]}
SHARES = {"kind": "shares", "title": "Use & more", "parts": ["a", "b"], "rows": [["layer <0>", [0.25, 0.75]]]}


def details(*said: Any, images: Any = (PNG,), name: str = "new") -> dict[str, Any]:
    return {"images": list(images), "extensions": {name: list(said)}}


def test_what_any_extension_says_is_drawn_and_escaped() -> None:
    html = details_html(details(PATCHES, WORDS, SHARES))
    assert html.count("<img") == 2
    assert "2 of 4 patches kept (50%)" in html
    assert '<span class="kept">&lt;script&gt;</span><span class="dropped"> gone</span>' in html
    assert "Use &amp; more" in html
    assert "layer &lt;0&gt;" in html
    assert html.count("<rect") == 2
    assert "<script>" not in html
    assert "<b>" not in html.replace('<b style="color:', "")
    assert details_html(None) == ""
    assert "no extension" in details_html({"images": [], "extensions": {}})


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {},
        {"images": []},
        {"images": [], "extensions": []},
        details({"kind": "other"}),
        details(PATCHES | {"kept": [4]}),
        details(PATCHES | {"grid": [0, 2]}),
        details(PATCHES | {"image": 1}),
        details(PATCHES | {"image": -1}),
        details(PATCHES, images=["http://elsewhere/a.png"]),
        details(PATCHES, images=["data:image/png;base64,§"]),
        details(PATCHES, images=["data:image/png;base64,QUJD"]),
        details(PATCHES, images=[7]),
        details(SHARES | {"rows": [["layer 0", [1.0]]]}),
        details(SHARES | {"rows": [["layer 0", [-1.0, 2.0]]]}),
        details(WORDS | {"words": [["a"]]}),
    ],
)
def test_details_of_another_form_are_refused(broken: Any) -> None:
    with pytest.raises(ServerError, match="the server's details cannot be drawn"):
        details_html(broken)
