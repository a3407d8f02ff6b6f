"""`llava.serve.cli` and the conversation behind it, with scripted input."""

from __future__ import annotations

import builtins
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import BadSampleError, FlagError
from llava.eval.answering import loading
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import LoadedModel, load_model
from llava.eval.run_llava import eval_model, open_image
from llava.serve import chat as chat_module
from llava.serve import cli
from llava.serve.chat import Chat, TokenQueue
from llava.serve.streaming import until_stop
from tests.golden import golden_dir
from tests.llava.runtime.tokenizers import make_tokenizer

CHECKPOINT = golden_dir("llava") / "tiny-llava-v1.5"
IMAGES = golden_dir("llava") / "data" / "images"
GREEDY = GenerationOptions(temperature=0, max_new_tokens=8)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(CHECKPOINT), device="cpu")


@pytest.fixture
def chat(loaded: LoadedModel) -> Chat:
    return Chat(loaded, "vicuna_v1", GREEDY, open_image)


Talk = Callable[..., tuple[Chat, str]]


@pytest.fixture
def talk(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Run the program with lines of input; gives the conversation at the end and what was printed."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> tuple[Chat, str]:
        monkeypatch.setattr(loading, "load_model", lambda *_, **__: loaded)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        base = ("--model-path", str(CHECKPOINT), "--temperature", "0", "--max-new-tokens", "8", "--device", "cpu")
        result = cli.main([*base, "--conv-mode", "vicuna_v1", *options])
        return result, capsys.readouterr().out

    return run


def image(name: str) -> str:
    return str(IMAGES / name)


def say(chat: Chat, message: str) -> str:
    return "".join(chat.ask(message))


def said(chat: Chat) -> list[str]:
    return [message for _, message in chat.conversation.messages]


def test_the_first_answer_is_that_of_the_other_programs(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    class Args:
        model_path, model_base, conv_mode = str(CHECKPOINT), None, "vicuna_v1"
        query, image_file, sep = "What is shown?", f"{image('im2.png')},{image('im4.png')}", ","
        temperature, top_p, num_beams, max_new_tokens, device = 0, None, 1, 8, "cpu"

    expected = eval_model(Args)
    chat.show([image("im2.png"), image("im4.png")])
    assert say(chat, "What is shown?").strip() == expected
    assert said(chat) == ["<image>\n<image>\nWhat is shown?", expected]


def test_an_answer_comes_in_pieces(chat: Chat) -> None:
    pieces = list(chat.ask("Name a bird."))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == said(chat)[1]


def test_history_and_images_of_later_turns_reach_the_model(chat: Chat, loaded: LoadedModel) -> None:
    chat.show([image("im0.png")])
    say(chat, "What is it?")
    chat.show([image("im1.png"), image("im3.png")])
    say(chat, "And <image-placeholder> or <image-placeholder>?")
    prompt = chat.conversation.get_prompt()
    assert prompt.count("<image>") == len(chat.images) == 3
    assert (
        f"USER: <image>\nWhat is it? ASSISTANT: {said(chat)[1]}</s>USER: And <image> or <image>? ASSISTANT:" in prompt
    )
    fresh = Chat(loaded, "vicuna_v1", GREEDY, open_image)
    fresh.show([image("im1.png"), image("im3.png")])
    assert say(fresh, "And <image-placeholder> or <image-placeholder>?").strip() != said(chat)[3], "history matters"


def test_reset_forgets_everything(chat: Chat) -> None:
    first = say(chat, "Name a bird.")
    chat.show([image("im0.png")])
    say(chat, "What is it?")
    chat.reset()
    assert (said(chat), chat.images, chat.waiting) == ([], [], [])
    assert say(chat, "Name a bird.") == first


def test_a_message_that_cannot_be_said_changes_nothing(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    say(chat, "Name a bird.")
    before = said(chat)
    with pytest.raises(BadSampleError, match="1 '<image-placeholder>' in the question, but 0 image"):
        chat.ask("And <image-placeholder>?")
    monkeypatch.setattr(chat.loaded.model.config, "tokenizer_model_max_length", 60)
    with pytest.raises(BadSampleError, match=r"has \d+ positions now, and the model takes 60; .*/reset"):
        chat.ask("word " * 40)
    assert said(chat) == before


def test_closing_the_iterator_stops_the_model_and_keeps_the_beginning(loaded: LoadedModel) -> None:
    chat = Chat(loaded, "vicuna_v1", GenerationOptions(temperature=0, max_new_tokens=400), open_image)
    whole = say(chat, "Name a bird.")
    steps: list[int] = []
    handle = loaded.model.register_forward_hook(lambda *_: steps.append(1))
    chat.reset()
    pieces = chat.ask("Name a bird.")
    beginning = next(pieces)
    pieces.close()
    handle.remove()
    assert whole.startswith(beginning)
    assert said(chat)[1] == beginning.strip()
    assert len(steps) < 400, "the thread must have ended before the last token"


def test_an_error_of_the_model_reaches_the_caller(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(chat.loaded.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        say(chat, "Hi")


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["Hello", " you##", "#Human: x"], ["###"], ["Hello", " you"]),
        (["a#", "b", "##"], ["###"], ["a", "#b", "##"]),
        (["one", " two"], [], ["one", " two"]),
        (["x<|im", "_end|>y"], ["###", "<|im_end|>"], ["x"]),
        (["###"], ["###"], []),
    ],
)
def test_stop_strings_are_never_shown(pieces: list[str], stops: list[str], expected: list[str]) -> None:
    assert list(until_stop(pieces, stops)) == expected


def test_texts_that_end_an_answer_by_template(loaded: LoadedModel) -> None:
    found = [loaded.answer_end(mode).texts for mode in ("vicuna_v1", "llava_v0", "mpt", "llava_llama_2")]
    assert found == [(), ("###",), ("<|im_end|>",), ()]


def test_an_answer_ends_at_the_separator_of_the_template(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model never says `###`; so what it does say is declared to be the separator."""
    chat = Chat(loaded, "llava_v0", GREEDY, open_image)
    free = say(chat, "Name a bird.")
    stop = free[3:6]
    chat.reset()
    end = replace(loaded.answer_end("llava_v0"), texts=(stop,))
    monkeypatch.setattr(LoadedModel, "answer_end", lambda *_: end)
    assert say(chat, "Name a bird.") == free[: free.index(stop)]


def test_tokens_are_decoded_one_by_one_as_all_together() -> None:
    tokenizer = make_tokenizer()
    for text in ("a bus\n  and    a caf\u00e9 \u6c49 12:45\n\n  line two </s> end", "  \n  x"):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        stream = TokenQueue(tokenizer)
        for index in ids:
            stream.put(index[None])
        stream.end()
        pieces = list(stream)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_scripted_conversation(talk: Talk) -> None:
    chat, out = talk(
        "What is shown?",
        "/image absent.png",
        f"/image '{image('im1.png')}' {image('im3.png')}",
        "And these?",
        "Look at <image>",
        "/nonsense",
        "/exit",
        "never asked",
        options=("--image-file", image("im0.png")),
    )
    assert [message for role, message in chat.conversation.messages if role == "USER"] == [
        "<image>\nWhat is shown?",
        "<image>\n<image>\nAnd these?",
    ]
    assert f"ASSISTANT: {said(chat)[1]}" in out
    assert f"ASSISTANT: {said(chat)[3]}" in out
    assert "absent.png" in out.split("error: ")[1].splitlines()[0]
    assert "2 image(s) go with your next message." in out
    assert "error: message: the question holds a literal '<image>'" in out
    assert out.count(cli.HELP) == 2, "at the start and for an unknown command"
    assert out.endswith("exit...\n")


def test_reset_shows_the_first_images_again(talk: Talk) -> None:
    chat, out = talk("What?", "Why?", "/reset", "What?", options=("--image-file", image("im0.png")))
    assert [message for role, message in chat.conversation.messages if role == "USER"] == ["<image>\nWhat?"]
    first, _, again = (line for line in out.splitlines() if "ASSISTANT: " in line)
    assert again == first
    assert len(chat.images) == 1


def test_text_alone_and_the_end_of_input(talk: Talk) -> None:
    chat, out = talk("Name a bird.")
    assert len(said(chat)) == 2
    assert out.endswith("USER: \nexit...\n")
    assert said(talk("", "never asked")[0]) == []


def test_debug_shows_the_prompt(talk: Talk) -> None:
    _, out = talk("Name a bird.", options=("--debug",))
    assert "'conversation': " in out
    assert "USER: Name a bird. ASSISTANT:" in out


def test_control_c_stops_an_answer_and_then_the_program(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = said(talk("Name a bird.")[0])[1]
    original = chat_module.until_stop

    def interrupted(pieces: Iterator[str], stops: list[str]) -> Iterator[str]:
        for number, piece in enumerate(original(pieces, stops)):
            if number == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(chat_module, "until_stop", interrupted)
    lines = iter(["Name a bird."])

    def read(prompt: str) -> str:
        for line in lines:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "input", read)
    chat, out = talk()
    assert "[stopped]" in out
    assert whole.startswith(said(chat)[1])
    assert said(chat)[1] != whole
    assert out.endswith("exit...\n")


def test_sampling_follows_the_seed(talk: Talk) -> None:
    answers = [
        said(talk("Name a bird.", options=("--temperature", "1.0", "--seed", seed))[0])[1] for seed in ("1", "1", "2")
    ]
    assert answers[0] == answers[1] != answers[2]


def test_the_template_follows_the_name_and_the_speakers_are_named(loaded: LoadedModel) -> None:
    def names(mode: str) -> tuple[str, str]:
        return cli.speaker_names(Chat(loaded, mode, GREEDY, open_image).conversation)

    assert names("llava_v0") == ("Human", "Assistant")
    assert names("mpt") == ("user", "assistant")


def test_contradicting_options() -> None:
    with pytest.raises(FlagError, match="--load-8bit and --load-4bit exclude each other"):
        cli.main(["--load-8bit", "--load-4bit"])


def test_quantised_loading_is_passed_on(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(loading, "load_model", lambda *_, **options: seen.update(options) or loaded)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    cli.main(["--model-path", "x-v1", "--load-4bit"])
    assert (seen["load_4bit"], seen["load_8bit"]) == (True, False)


@pytest.mark.slow  # a second process imports everything anew
def test_the_program_from_the_shell(repository: Path) -> None:
    """A pipe instead of a terminal, and its end."""
    command = [sys.executable, "-m", "llava.serve.cli", "--model-path", str(CHECKPOINT), "--device", "cpu"]
    command += ["--image-file", image("im0.png"), "--temperature", "0", "--max-new-tokens", "4"]
    done = subprocess.run(command, input="What?\n", capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 0, done.stderr
    assert "ASSISTANT: " in done.stdout
    assert done.stdout.endswith("exit...\n")
    assert "Traceback" not in done.stderr


def test_an_interruption_is_the_same_for_every_row() -> None:
    interruption = chat_module.Interruption()
    assert interruption(torch.zeros(2, 3), torch.zeros(2, 5)).tolist() == [False, False]
    interruption.wanted.set()
    assert interruption(torch.zeros(2, 3), torch.zeros(2, 5)).tolist() == [True, True]
