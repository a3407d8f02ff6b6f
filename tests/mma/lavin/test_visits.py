"""Whatever a visitor of LaVIN's demo sends is answered, or refused in words; only uploads are read.

An entry of the corpus `corpus/visits.json` has a name, what the reply says (null: it is an answer), and what is sent in
place of a usual question, image and options; `times` repeats the question, `{...}` are folders of the test. Visits made
of it by a seeded draw run with the tests; 5,000 with `LLAVA_FUZZ=all`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.eval.answering.processes import Processes
from llava.serve import uploads
from llava.serve.engine import Engine
from mma.lavin import demo
from mma.lavin.answering import find_folders, given_options, load_lavin
from mma.lavin.chat import LavinChat
from mma.lavin.page import Handlers
from tests.mma.lavin.lavin_files import LavinFiles
from tests.mma.lavin.test_data import IMAGES
from tests.reliability.choice import SEED, amount

CORPUS = json.loads((Path(__file__).parent / "corpus" / "visits.json").read_text(encoding="utf-8"))
USUAL_VISIT = {"question": "What is this?", "image": None, "options": [0.0, 0.75, 4, 0]}
LONGEST = 64
MOST, USUAL = 5_000, 150
"""Visits of the mutation test, of all and of a usual run."""

DIGEST, LINKED = "0a" * 32, "1b" * 32
PRIVATE = ("Traceback", "site-packages", " object at 0x", "UnicodeEncodeError")
"""What no reply may have."""

VALUES: tuple[Any, ...] = (
    *(None, "", "a", True, 0, 1, -1, 0.5, 2**63, -(2**63), 10**400, 1e308, float("nan"), float("inf"), [], {}, [1]),
    *("\0", "\ud800", "/dev/zero", "{mine}/good.png", "{mine}/link.png", "{root}/private.png", "x" * 2000),
)
SPANS = (
    "..",
    "/",
    "//",
    "./",
    "\0",
    "\ud800",
    "%2e%2e",
    "~",
    "\n",
    " ",
    "{mine}",
    "{root}",
    "{digest}",
    "{linked}",
    "private.png",
)


@pytest.fixture(scope="module")
def chat(lavin_files: LavinFiles, lavin_checkpoint: Path) -> Iterator[LavinChat]:
    words = ["--ckpt_dir", str(lavin_files.weights), "--llm_model", "7B", "--adapter_path", str(lavin_checkpoint)]
    words += ["--device", "cpu"]
    args, given = demo.build_parser().parse_args(words), given_options(demo.build_parser(), words)
    engine = Engine(load_lavin(args, given, find_folders(args, given, Processes()), "cpu"), gather_seconds=0)
    engine.start()
    yield LavinChat(engine)
    engine.close()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders by the names that the corpus has for them: uploads of a visitor, and what must not be read."""
    root = tmp_path_factory.mktemp("machine")
    mine = root / "uploads" / DIGEST
    (mine / "deep").mkdir(parents=True)
    (root / "folder").mkdir()
    (root / "uploads" / "other").mkdir()
    others = ("private.png", "folder/good.png", "uploads/loose.png", "uploads/other/good.png")
    for file in (mine / "good.png", mine / "deep" / "good.png", *(root / name for name in others)):
        shutil.copy(IMAGES / "12.png", file)
    good = (mine / "good.png").read_bytes()
    (mine / "broken.png").write_bytes(b"no image")
    (mine / "empty.png").write_bytes(b"")
    (mine / "cut.png").write_bytes(good[: len(good) // 2])
    (mine / "bomb.png").write_bytes(good[:16] + (60_000).to_bytes(4, "big") * 2 + good[24:])
    Image.new("RGB", (20_000, 1)).save(mine / "strip.png")
    with (mine / "large.png").open("wb") as file:
        file.truncate(uploads.MAX_UPLOAD_BYTES + 1)
    for link, target in (("link.png", root / "private.png"), ("zero.png", Path("/dev/zero"))):
        (mine / link).symlink_to(target)
    (root / "uploads" / LINKED).symlink_to(root / "folder")
    os.mkfifo(mine / "pipe")
    names = {"root": root, "uploads": root / "uploads", "mine": mine, "digest": DIGEST, "linked": LINKED}
    return {name: str(value) for name, value in names.items()} | {"upper": DIGEST.upper()}


def filled(value: Any, places: dict[str, str]) -> Any:
    """A value with the folders of the test in it."""
    if isinstance(value, str):
        for name, place in places.items():
            value = value.replace(f"{{{name}}}", place)
    return value


def visit(chat: LavinChat, places: dict[str, str], sent: dict[str, Any]) -> str:
    """What the page shows last; a reply must have its form, and no word about this machine.

    An answer about an image is one about a regular file of an upload.
    """
    said = USUAL_VISIT | sent
    image, question = filled(said["image"], places), said["question"]
    asked = Handlers(chat, places["uploads"], LONGEST).ask(question, [("Hello", "Hi")], image, *said["options"])
    *_, (box, turns, shown) = asked
    assert all(message.keys() == {"role", "content"} and isinstance(message["content"], str) for message in shown)
    last = str(shown[-1]["content"]) if shown else ""
    failed = last.startswith("Error: ")
    assert len(turns) == (1 if failed else 2)
    assert box == ((question or "").encode("utf-8", "replace").decode() if failed else "")
    if failed:
        assert not [word for word in (*PRIVATE, places["root"]) if word in last.removeprefix("Error: ")], last
    elif image is not None:
        file = Path(os.path.abspath(image))
        assert file.parent == Path(places["mine"]), "an answer about what the visitor has not uploaded"
        assert stat.S_ISREG(os.lstat(file).st_mode)
    return last if failed else ""


@pytest.mark.parametrize("entry", CORPUS, ids=[entry["name"] for entry in CORPUS])
def test_corpus(entry: dict[str, Any], chat: LavinChat, places: dict[str, str]) -> None:
    sent = {key: entry[key] for key in USUAL_VISIT if key in entry}
    if "times" in entry:
        sent["question"] *= entry["times"]
    error = visit(chat, places, sent)
    assert (entry["says"] is None) == (error == ""), error
    assert (entry["says"] or "") in error


def mutation(draw: random.Random) -> dict[str, Any]:
    """A visit of the corpus with one to three changes."""
    entry = draw.choice(CORPUS)
    sent = {key: entry.get(key, usual) for key, usual in USUAL_VISIT.items()}
    for _ in range(draw.randint(1, 3)):
        part = draw.choice(("question", "image", "image", "options"))
        if part == "options":
            options = list(sent["options"])
            options[draw.randrange(4)] = draw.choice(VALUES)
            sent["options"] = options
        elif isinstance(sent[part], str) and draw.random() < 0.8:
            text = sent[part]
            at = draw.randint(0, len(text))
            sent[part] = text[:at] + draw.choice(SPANS) + text[at + draw.choice((0, 0, 1, 5)) :]
        elif part == "image":
            sent[part] = draw.choice((*VALUES, "{mine}/good.png", "{mine}/good.png"))
        else:
            sent[part] = draw.choice([value for value in VALUES if value is None or isinstance(value, str)])
    return sent


def test_mutations(chat: LavinChat, places: dict[str, str]) -> None:
    """Then the page answers as before."""
    draw = random.Random(SEED)
    kinds = {"answered": 0, "image": 0, "refused": 0}
    for number in range(amount(MOST, USUAL)):
        sent = mutation(draw)
        try:
            error = visit(chat, places, sent)
        except Exception as failure:
            raise AssertionError(f"visit {number}: {sent!r:.1000}") from failure
        kinds["refused" if error else "answered" if sent["image"] is None else "image"] += 1
    assert min(kinds.values()) > 0, kinds
    assert visit(chat, places, {"image": "{mine}/good.png"}) == ""


@pytest.mark.parametrize("fault", ["reads anything", "fails", "names its folders"])
def test_faults_are_found(fault: str, chat: LavinChat, places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls: what was wrong before, and an error without words."""

    def anything(path: Any, folder: Any) -> Path:
        if fault == "fails":
            raise ValueError("no such thing")
        if fault == "names its folders":
            raise uploads.BadImageError(f"{path} is not in {folder}")
        return Path(path)

    monkeypatch.setattr("mma.lavin.page.uploaded_file", anything)
    with pytest.raises((AssertionError, ValueError)):
        visit(chat, places, {"image": "{root}/private.png"})
