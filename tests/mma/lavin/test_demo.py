"""LaVIN's demo: its prompts, its page's handlers, and the page itself over HTTP. No browser takes part."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import BadImageError, FlagError, LlavaError
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.processes import Processes
from llava.serve.engine import Engine
from llava.serve.uploads import MAX_UPLOAD_BYTES, NoProxy, uploaded_file
from mma.lavin import demo
from mma.lavin.adapter_files import export_file
from mma.lavin.answering import find_folders, given_options, load_lavin
from mma.lavin.chat import LavinChat, chat_prompt, shown_answer
from mma.lavin.page import Handlers, build_page, chosen_options
from tests.golden import load_case
from tests.mma.lavin.lavin_files import LavinFiles
from tests.mma.lavin.test_data import IMAGES

SCENARIOS = load_case("lavin", "chat_prompts")[0]["scenarios"]
FLAGS = load_case("lavin", "cli_flags")[0]["demo_py"]
IMAGE = str(IMAGES / "12.png")
GREEDY = GenerationOptions(temperature=0, max_new_tokens=6)
SETTINGS = (0.0, 0.75, 6, 0)
DIGEST = "0" * 64


def test_options_are_those_of_the_original() -> None:
    ours = {action.option_strings[0]: action for action in demo.build_parser()._actions}
    for flag in FLAGS:
        action = ours[flag["flags"][0]]
        assert action.default == flag["default"], flag["flags"]
        assert not action.required
    assert demo.build_parser().parse_args(["--use_vicuna"]).use_vicuna


# Prompts


@pytest.mark.parametrize("scenario", SCENARIOS, ids=["image", "text"])
def test_prompts_of_the_original(scenario: dict[str, Any]) -> None:
    said: list[tuple[str, str]] = []
    for turn in scenario["turns"]:
        prompt = chat_prompt(said, turn["user"], has_image=scenario["image_uploaded"], as_original=True)
        assert prompt == turn["call"]["prompt"]
        assert shown_answer(turn["model_text"]) == turn["shown_answer"]
        said.append((turn["user"], shown_answer(turn["model_text"])))


def test_prompts_are_those_of_the_training() -> None:
    assert chat_prompt([], "Why?", has_image=True) == "Instruction: Why?\nResponse:"
    said = [("What is this?", " A red bus. ")]
    expected = "Instruction: What is this?\nResponse: A red bus.\nInstruction: Why?\nResponse:"
    assert chat_prompt(said, "Why?", has_image=True) == expected


def test_the_routing_of_a_silent_file_is_as_in_the_originals_demo(
    lavin_files: LavinFiles, lavin_checkpoint: Path, tmp_path: Path
) -> None:
    """Published files do not say the temperature; the demo's default is another than that of the evaluation."""
    file = export_file(lavin_checkpoint, tmp_path / "15-eph-pretrain.pth")
    content = torch.load(file, weights_only=False)  # ours: holds `args` too
    del content["args"]
    torch.save(content, file)
    words = ["--ckpt_dir", str(lavin_files.weights), "--llm_model", "7B", "--adapter_path", str(file)]
    words += ["--vision_tower", str(lavin_files.tower)]
    args, given = demo.build_parser().parse_args(words), given_options(demo.build_parser(), words)
    folder = find_folders(args, given, Processes()).adapters
    assert json.loads((folder / "extensions" / "mma" / "config.json").read_text())["temperature"] == 5.0


# Conversations


@pytest.fixture(scope="module")
def chat(lavin_files: LavinFiles, lavin_checkpoint: Path) -> Iterator[LavinChat]:
    words = ["--ckpt_dir", str(lavin_files.weights), "--llm_model", "7B", "--adapter_path", str(lavin_checkpoint)]
    parser, words = demo.build_parser(), [*words, "--device", "cpu"]
    args, given = parser.parse_args(words), given_options(demo.build_parser(), words)
    engine = Engine(load_lavin(args, given, find_folders(args, given, Processes()), "cpu"))
    engine.start()
    yield LavinChat(engine)
    engine.close()


@pytest.mark.parametrize("image", [None, IMAGE], ids=["text", "image"])
def test_an_answer_comes_in_pieces(chat: LavinChat, image: str | None) -> None:
    grown = list(chat.ask([], "What is this?", image, GREEDY))
    assert len(grown) > 1
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(grown))
    assert list(chat.ask([], "What is this?", image, GREEDY)) == grown


def test_the_image_reaches_the_model(chat: LavinChat) -> None:
    """Another image, another answer. The projector is made to matter: after four updates images hardly do."""
    options = GenerationOptions(temperature=0, max_new_tokens=24)
    last = list(chat.engine.loaded.model.get_model().mm_projector.modules())[-1].weight

    def answers() -> list[str]:
        return [list(chat.ask([], "?", str(IMAGES / name), options))[-1] for name in ("12.png", "2.png", "22.png")]

    with torch.no_grad():
        before = last.clone()
        try:
            last.mul_(100)
            found = answers()
            last.zero_()
            blind = answers()
        finally:
            last.copy_(before)
    assert len(set(found)) == 3
    assert len(set(blind)) == 1, "nothing but the images made them differ"


def test_whoever_leaves_is_not_answered_any_further(chat: LavinChat) -> None:
    pieces = chat.ask([], "Hello", None, GenerationOptions(temperature=0, max_new_tokens=400))
    next(pieces)
    (row,) = chat.engine.answering
    pieces.close()
    assert row.cancelled
    assert list(chat.ask([], "Hello", None, GREEDY))  # the engine goes on


# Handlers


def test_the_conversation_goes_on(chat: LavinChat, tmp_path: Path) -> None:
    handlers = Handlers(chat, tmp_path, 64)
    *_, (box, turns, shown) = handlers.ask("Hello", [], None, *SETTINGS)
    assert box == ""
    assert [message["role"] for message in shown] == ["user", "assistant"]
    *_, (_, turns, shown) = handlers.ask("And then?", turns, None, *SETTINGS)
    assert [question for question, _ in turns] == ["Hello", "And then?"]
    assert len(shown) == 4
    assert handlers.begin() == ([], [])


@pytest.mark.parametrize(
    ("question", "upload", "settings", "message"),
    [
        (" ", None, SETTINGS, "there is no question"),
        ("What?", "broken.png", SETTINGS, "the image cannot be read: UnidentifiedImageError: it is of no"),
        ("What?", "gone.png", SETTINGS, "the image is on this server no more; upload it again"),
        ("What?", None, (0.0, 0.75, 600, 0), "longer than the 511"),
        ("What?", None, (-1.0, 0.75, 6, 0), "--temperature -1.0"),
        ("What?", None, (0.0, 0.75, 6, None), "no number in the field 'Seed'"),  # gradio's value of a cleared field
        ("What?", None, (0.0, None, 6, 0), "no number in the field 'Top p'"),
        ("What?", None, (0.0, 0.75, 601, 0), "an answer of 601 tokens is longer than the 600"),
    ],
)
def test_errors_are_shown_in_the_conversation(
    chat: LavinChat, tmp_path: Path, question: str, upload: str | None, settings: tuple, message: str
) -> None:
    folder = tmp_path / DIGEST
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"no image")
    image = None if upload is None else str(folder / upload)
    before = [("Hello", "Hi")]
    ((box, turns, shown),) = Handlers(chat, tmp_path, 600).ask(question, before, image, *settings)
    assert (box, turns) == (question, before)  # nothing is lost, and the conversation is as it was
    assert shown[-1]["content"].startswith("Error: ")
    assert message in shown[-1]["content"]
    assert "Traceback" not in shown[-1]["content"]
    assert str(tmp_path) not in shown[-1]["content"], "where the server keeps its files is not the visitor's business"
    assert len(shown) == 3 + bool(question.strip())


def test_a_failing_model_is_an_error_in_the_conversation(
    chat: LavinChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("secret details")

    monkeypatch.setattr(chat.engine.loaded.model, "generate", fail)
    *_, (_, _, shown) = Handlers(chat, tmp_path, 64).ask("Hello", [], None, *SETTINGS)
    assert "the model failed" in shown[-1]["content"]
    assert "secret" not in shown[-1]["content"]


# What a request without a browser may send


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("value", [None, "1", "", True, float("nan"), float("inf"), 10**400, [1], {"a": 1}])
def test_numbers_that_are_none_are_refused(position: int, value: object) -> None:
    values: list[object] = [0.5, 0.75, 6, 0]
    assert chosen_options(values, 64).seed == 0
    values[position] = value
    with pytest.raises(FlagError, match="no number in the field"):
        chosen_options(values, 64)


@pytest.mark.parametrize("temperature", [1, 2, 1.0])
def test_numbers_may_be_integers(temperature: float, chat: LavinChat, tmp_path: Path) -> None:
    *_, (box, _, shown) = Handlers(chat, tmp_path, 64).ask("Hello", [], None, temperature, 1, 6, 0)
    assert box == ""
    assert "Error" not in shown[-1]["content"]


def _elsewhere(root: Path) -> Iterator[object]:
    """Paths that are no upload: other files, devices, folders, links, ways around the folder, no paths."""
    uploads = root / "uploads"
    (uploads / DIGEST / "deep").mkdir(parents=True)
    for file in (root / "private.png", uploads / "loose.png", uploads / DIGEST / "deep" / "a.png"):
        shutil.copy(IMAGE, file)
        yield str(file)
    (uploads / "other").mkdir()
    shutil.copy(IMAGE, uploads / "other" / "a.png")
    yield str(uploads / "other" / "a.png")
    (uploads / DIGEST / "link.png").symlink_to(root / "private.png")
    yield str(uploads / DIGEST / "link.png")
    (root / "folder").mkdir()
    shutil.copy(IMAGE, root / "folder" / "a.png")
    (uploads / ("1" * 64)).symlink_to(root / "folder")
    yield str(uploads / ("1" * 64) / "a.png")
    os.mkfifo(uploads / DIGEST / "pipe")
    yield str(uploads / DIGEST / "pipe")
    yield str(uploads / DIGEST / ".." / ".." / "private.png")
    yield from (str(uploads / DIGEST), str(uploads), str(uploads / DIGEST / "absent.png"))
    yield from (
        "/dev/zero",
        "/etc/passwd",
        "",
        ".",
        "a\0b",
        "~",
        "http://localhost/a.png",
        3,
        ["a"],
        {"path": "/dev/zero"},
    )


def test_a_request_reads_uploads_alone(tmp_path: Path) -> None:
    """The same words whatever is there, so that nobody learns which files the machine has."""
    paths = list(_elsewhere(tmp_path))
    assert len(paths) > 20
    for path in paths:
        with pytest.raises(BadImageError, match=r"^the image is on this server no more; upload it again$"):
            uploaded_file(path, tmp_path / "uploads")
    mine = tmp_path / "uploads" / DIGEST / "mine.png"
    shutil.copy(IMAGE, mine)
    assert uploaded_file(str(mine), tmp_path / "uploads") == mine
    (tmp_path / "by-a-link").symlink_to(tmp_path / "uploads")
    assert uploaded_file(str(tmp_path / "by-a-link" / DIGEST / "mine.png"), tmp_path / "by-a-link").samefile(mine)
    with (tmp_path / "uploads" / DIGEST / "large.png").open("wb") as file:
        file.truncate(MAX_UPLOAD_BYTES + 1)
    with pytest.raises(BadImageError, match=f"the most is {MAX_UPLOAD_BYTES}"):
        uploaded_file(file.name, tmp_path / "uploads")


# The page


def test_the_page_over_http(chat: LavinChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A visitor without a browser uploads an image, asks twice, and sees an error as text."""
    pytest.importorskip("gradio", reason="the extra `serve` is not installed")
    gradio_client = pytest.importorskip("gradio_client")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    page = build_page(chat, max_new_tokens=64)
    _, address, _ = page.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, max_file_size=MAX_UPLOAD_BYTES
    )
    try:
        visitor = gradio_client.Client(address, verbose=False)
        shutil.copy(IMAGE, tmp_path / "mine.png")
        image = gradio_client.handle_file(tmp_path / "mine.png")
        box, shown = visitor.predict("What is this?", image, *SETTINGS, api_name="/ask")
        assert box == ""
        assert len(shown) == 2
        _, shown = visitor.predict("Why?", image, *SETTINGS, api_name="/ask")
        assert len(shown) == 4  # the page remembers its visitor
        (tmp_path / "broken.png").write_bytes(b"no image")
        broken = gradio_client.handle_file(tmp_path / "broken.png")
        box, shown = visitor.predict("What?", broken, *SETTINGS, api_name="/ask")
        assert box == "What?"
        assert "the image cannot be read" in str(shown[-1])
        assert "Traceback" not in str(shown)
        shutil.copy(IMAGE, tmp_path / "private.png")
        for path in (str(tmp_path / "private.png"), str(tmp_path / "gone.png"), "/dev/zero"):
            box, shown = visitor.predict("What?", {"path": path}, *SETTINGS, api_name="/ask")
            assert box == "What?"
            assert "upload it again" in str(shown[-1])
        _, shown = visitor.predict("Why?", image, 1, *SETTINGS[1:], api_name="/ask")
        assert "Error" not in str(shown[-1])
        shown = visitor.predict(api_name="/begin")
        assert not shown
        (tmp_path / "large.png").write_bytes(bytes(MAX_UPLOAD_BYTES + 1))
        with pytest.raises(Exception, match=f"maximum file size of {MAX_UPLOAD_BYTES} bytes"):
            visitor.predict("What?", gradio_client.handle_file(tmp_path / "large.png"), *SETTINGS, api_name="/ask")
        assert len(list((tmp_path / "uploads").rglob("*.png"))) == 2
    finally:
        page.close()
    assert not list((tmp_path / "uploads").rglob("*.png")), "the images of visitors go with the page"


def test_what_cannot_be_served_is_refused(lavin_files: LavinFiles, lavin_checkpoint: Path) -> None:
    words = ["--ckpt_dir", str(lavin_files.weights), "--llm_model", "7B", "--adapter_path", str(lavin_checkpoint)]
    with pytest.raises(FlagError, match="--options"):
        demo.main([*words, "--options", "a=b"])
    with pytest.raises(LlavaError, match="no such checkpoint folder"):
        demo.main([*words[:-1], "missing", "--device", "cpu"])


def test_the_original_command_starts_the_page(
    lavin_files: LavinFiles, lavin_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio", reason="the extra `serve` is not installed")
    import demo as original_program

    launched = {}

    class Page:
        def launch(self, **options: Any) -> None:
            launched.update(options, answer=list(self.chat.ask([], "Hello", None, GREEDY)))

    def build(chat: LavinChat, max_new_tokens: int) -> Page:
        Page.chat = chat
        return Page()

    monkeypatch.setattr("mma.lavin.page.build_page", build)
    words = ["--ckpt_dir", str(lavin_files.weights), "--llm_model", "7B", "--adapter_path", str(lavin_checkpoint)]
    original_program.main([*words, "--server_name", "127.0.0.1", "--device", "cpu"])
    assert launched["server_name"] == "127.0.0.1"
    assert launched["max_file_size"] == MAX_UPLOAD_BYTES
    assert [each.cls for each in launched["app_kwargs"]["middleware"]] == [NoProxy]
    assert launched["answer"]
    assert not Page.chat.engine.alive  # ended with the program
