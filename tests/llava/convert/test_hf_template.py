"""Conversation templates as chat templates of transformers: equal prompts, recognized again, kept there and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, AutoTokenizer

from llava.conversation import SeparatorStyle, conv_templates
from llava.convert.__main__ import main
from llava.convert.hf import from_hf, to_hf
from llava.convert.hf_format import SETTINGS_KEY
from llava.convert.hf_processor import hf_tokenizer
from llava.convert.hf_template import chat_template, recognized_mode, takes_texts
from llava.data.templates import select_template
from llava.data.trained_template import trained_template
from llava.errors import FlagError
from llava.eval.answering.prompts import build_prompt
from llava.model.builder import load_pretrained_model
from tests.golden import golden_dir
from tests.llava.data.test_chat_template import CHATML, WITH_BLANKS, WITH_BLOCKS, byte_tokenizer
from tests.llava.runtime.tokenizers import make_tokenizer

pytestmark = pytest.mark.versions

BASE = golden_dir("llava") / "tiny-llava-v1.5"
Messages = list[dict[str, Any]]

NAMES = [name for name, template in conv_templates.items() if template.sep_style is not SeparatorStyle.PLAIN]
INDENTED = "  \n" + CHATML.replace("{% endfor %}", "{% endfor %}\n  ") + "\n"
"""Blanks and line feeds around, some of which Jinja drops where they are at the beginning of a line or at the end."""

OWN = {"ChatML": CHATML, "blocks": WITH_BLOCKS, "blanks before answers": WITH_BLANKS, "indented": INDENTED}


def in_parts(text: str) -> list[dict[str, str]]:
    image, mark, rest = text.partition("<image>\n")
    return (
        [{"type": "image"}, {"type": "text", "text": rest}] if mark and not image else [{"type": "text", "text": text}]
    )


TURNS = [("user", "<image>\nWhat's shown?\n"), ("assistant", "A ship."), ("user", "{{ why }}")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_named_templates(name: str, system: str | None, tmp_path: Path) -> None:
    fast = hf_tokenizer(make_tokenizer(), tmp_path)
    conversation = conv_templates[name].copy()
    messages: Messages = [{"role": role, "content": in_parts(text)} for role, text in TURNS]
    if system is not None:
        marker = "<|im_start|>system\n" if conversation.sep_style is SeparatorStyle.MPT else ""
        conversation.system = marker + system
        messages.insert(0, {"role": "system", "content": system})
    for role, text in TURNS:
        conversation.append_message(conversation.roles[role == "assistant"], text)
    template = chat_template(conv_templates[name], False)
    assert fast.apply_chat_template(messages, chat_template=template, tokenize=False) == conversation.get_prompt()
    conversation.append_message(conversation.roles[1], None)
    opened = fast.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert opened == conversation.get_prompt()


def test_the_template_of_stage_one(tmp_path: Path) -> None:
    """It has no second turn."""
    fast, template = hf_tokenizer(make_tokenizer(), tmp_path), chat_template(conv_templates["plain"], False)
    messages = [{"role": "user", "content": in_parts("<image>\nWhat?")}]
    opened = fast.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert opened == build_prompt("<image>\nWhat?", "plain")


@pytest.mark.parametrize("own", OWN)
def test_the_tokenizers_own(own: str) -> None:
    tokenizer = byte_tokenizer(OWN[own])
    template = chat_template(select_template("tokenizer", tokenizer), False)
    conversation = select_template("tokenizer", tokenizer)
    for number, (role, text) in enumerate(TURNS):
        conversation.append_message(role, text)
        messages: Messages = [{"role": role, "content": in_parts(text)} for role, text in TURNS[: number + 1]]
        closed = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert closed == conversation.get_prompt()
    conversation.append_message("assistant", None)
    opened = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert opened == conversation.get_prompt()
    assert opened.count("<image>\n") == 1
    assert takes_texts(template, tokenizer)


def test_image_tokens_around_an_image() -> None:
    tokenizer = byte_tokenizer(CHATML)
    template = chat_template(select_template("tokenizer", tokenizer), True)
    messages = [{"role": "user", "content": in_parts("<image>\nWhat?")}]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert text == "<|im_start|>user\n<im_start><image><im_end>\nWhat?<|im_end|>\n"


PARTS = (
    "{% for message in messages %}HEAD{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}END{% endfor %}"
)
"""As published folders write content of parts; of one text it writes nothing."""

VICUNA = (
    PARTS.replace("HEAD", "{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message.role] }}").replace(
        "END", "{{ ' ' }}"
    )
    + "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MISTRAL = PARTS.replace("HEAD", "{% if message.role == 'user' %}[INST] {% else %} {% endif %}").replace(
    "END", "{% if message.role == 'user' %} [/INST]{% else %}</s>{% endif %}"
)
QWEN = PARTS.replace("HEAD", "<|im_start|>{{ message.role }} ").replace("END", "<|im_end|>")

FOREIGN = {
    "Vicuna, with the system text as a message": (VICUNA, "v1"),
    "Mistral": (MISTRAL, "mistral_instruct"),
    "unknown": (QWEN, None),
    "texts": (CHATML, "tokenizer"),
    "damaged": ("{{ raise_exception('no') }}", None),
    "a call of what is none": ("{{ messages[0].content.nothing() }}", None),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_templates_of_others_are_recognized(case: str) -> None:
    text, expected = FOREIGN[case]
    if case == "texts":
        text = chat_template(select_template("tokenizer", byte_tokenizer(CHATML)), False)
    assert recognized_mode(text, byte_tokenizer(None)) == expected


@pytest.mark.parametrize("name", [name for name, one in conv_templates.items() if not one.uses_image_tags])
def test_our_own_are_recognized(name: str) -> None:
    """By the first name of the template; one with an example in front has no counterpart."""
    template = conv_templates[name]
    found = recognized_mode(chat_template(template, False), byte_tokenizer(None))
    assert found is not None
    if not template.messages:
        assert build_prompt("What?", found) == build_prompt("What?", name)


def trained_with(folder: Path, template: str | None, jinja: str | None = None) -> Path:
    """A copy of the golden model as a run left it."""
    shutil.copytree(BASE, folder, copy_function=shutil.copyfile)
    content = json.loads((folder / "config.json").read_text())
    if template is not None:
        content["conversation_template"] = template
    content["mm_vision_tower"] = str(golden_dir("llava") / "tiny-clip")
    (folder / "config.json").write_text(json.dumps(content))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


def exported_prompt(folder: Path) -> str:
    messages = [{"role": "user", "content": in_parts("<image>\nWhat?")}]
    return AutoProcessor.from_pretrained(folder).apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("mode", ["v1", "llava_llama_2", "mpt", "tokenizer"])
def test_there_and_back(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder whose name means another template."""
    jinja = WITH_BLANKS if mode == "tokenizer" else CHATML
    ours = trained_with(tmp_path / "llava-explain-v1-mistral", mode, jinja)
    to_hf(ours, tmp_path / "hf")
    assert f"chat template: the prompts of --conv-mode {mode}\n" in capsys.readouterr().out
    tokenizer, *_ = load_pretrained_model(str(ours), device="cpu")
    assert exported_prompt(tmp_path / "hf") == build_prompt("<image>\nWhat?", mode, tokenizer)
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert "WARNING" not in capsys.readouterr().out
    found = trained_template(tmp_path / "back")
    assert found is not None
    assert found.name == mode
    back, *_ = load_pretrained_model(str(tmp_path / "back"), device="cpu")
    assert back.chat_template == jinja
    assert build_prompt("What?", mode, back) == build_prompt("What?", mode, tokenizer)


def test_another_template_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = trained_with(tmp_path / "mine", "tokenizer", WITH_BLANKS)
    to_hf(ours, tmp_path / "hf", conv_mode="v1")
    assert "was trained with the template 'tokenizer'" in capsys.readouterr().out
    assert exported_prompt(tmp_path / "hf") == build_prompt("<image>\nWhat?", "v1")
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == WITH_BLANKS
    found = trained_template(tmp_path / "back")
    assert found is not None
    assert found.name == "tokenizer"
    from_hf(tmp_path / "hf", tmp_path / "other", conv_mode="mpt")
    assert "was trained with the template 'tokenizer', but --conv-mode asks for 'mpt'" in capsys.readouterr().out
    found = trained_template(tmp_path / "other")
    assert found is not None
    assert found.name == "mpt"


@pytest.mark.parametrize(
    ("name", "mode"),
    [("mine", "vicuna_v1"), ("llava-v1.5-7b", "vicuna_v1"), ("llava-v1.6-mistral-7b", "mistral_instruct")],
)
def test_a_folder_that_does_not_say_is_exported_by_its_name(
    name: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["to-hf", str(trained_with(tmp_path / name, None)), str(tmp_path / "hf")])
    assert f"chat template: the prompts of --conv-mode {mode}\n" in capsys.readouterr().out
    assert exported_prompt(tmp_path / "hf") == build_prompt("<image>\nWhat?", mode)
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert trained_template(tmp_path / "back") is None, "a guess does not become a record"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder without a record of ours."""
    folder = to_hf(trained_with(tmp_path / "mine", "v1"), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    del config[SETTINGS_KEY]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", ["Vicuna, with the system text as a message", "Mistral", "texts"])
@pytest.mark.parametrize("older", [False, True], ids=["chat_template.jinja", "chat_template.json"])
def test_a_folder_of_others_is_asked_as_its_chat_template_asks(
    case: str, older: bool, foreign: Path, tmp_path: Path
) -> None:
    text, mode = FOREIGN[case]
    if case == "texts":
        text = chat_template(select_template("tokenizer", byte_tokenizer(CHATML)), False)
    (foreign / "chat_template.jinja").write_text(text)
    if older:
        (foreign / "chat_template.jinja").unlink()
        (foreign / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    from_hf(foreign, tmp_path / "back")
    found = trained_template(tmp_path / "back")
    assert found is not None
    assert found.name == mode
    tokenizer, *_ = load_pretrained_model(str(tmp_path / "back"), device="cpu")
    prompt = build_prompt("<image>\nWhat?", found.name, tokenizer)
    assert ("[INST]" in prompt, "<|im_start|>" in prompt) == (case == "Mistral", case == "texts")


def test_a_chat_template_that_is_none_of_ours(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (foreign / "chat_template.jinja").write_text(QWEN)
    from_hf(foreign, tmp_path / "back")
    assert "name the template by --conv-mode" in capsys.readouterr().out
    assert trained_template(tmp_path / "back") is None
    main(["from-hf", str(foreign), str(tmp_path / "told"), "--conv-mode", "chatml_direct"])
    found = trained_template(tmp_path / "told")
    assert found is not None
    assert found.name == "chatml_direct"
    with pytest.raises(FlagError, match="has no chat template that takes messages of one text"):
        from_hf(foreign, tmp_path / "own", conv_mode="tokenizer")
    with pytest.raises(FlagError, match="--conv-mode v9: no such template"):
        from_hf(foreign, tmp_path / "own", conv_mode="v9")
    assert not (tmp_path / "own").exists()
