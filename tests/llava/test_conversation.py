"""Prompts of every template against the golden ones, and the pieces they are made of."""

from __future__ import annotations

import pytest

from llava.conversation import Conversation, conv_templates, default_conversation
from llava.data.templates import select_template
from llava.errors import BadSampleError, FlagError
from tests.golden import load_case

CASE, _ = load_case("llava", "conversation")

CASES = CASE["cases"]


def converse(template: str, dialog: str) -> Conversation:
    """The template with the messages of a golden dialog."""
    conversation = conv_templates[template].copy()
    for role, content in CASE["dialogs"][dialog]:
        message = (content["text"], None, content["mode"]) if isinstance(content, dict) else content
        conversation.append_message(conversation.roles[role], message)
    return conversation


def test_the_case_list_is_complete() -> None:
    assert len(CASES) == 216
    assert set(CASE["templates"]) == set(conv_templates)


@pytest.mark.parametrize("name", sorted(conv_templates))
def test_template_fields(name: str) -> None:
    golden = CASE["templates"][name]
    golden = CASE["templates"][golden.get("same_as", name)]
    template = conv_templates[name]
    fields = ("system", "sep", "sep2", "version", "offset")
    assert {key: getattr(template, key) for key in fields} == {key: golden[key] for key in fields}
    assert (list(template.roles), template.sep_style.name) == (golden["roles"], golden["sep_style"])
    assert template.messages == [[template.roles[role], text] for role, text in golden["initial_messages"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['template']}-{case['dialog']}")
def test_prompt(case: dict) -> None:
    conversation = converse(case["template"], case["dialog"])
    if "error" in case:
        with pytest.raises(BadSampleError):
            conversation.get_prompt()
        return
    assert conversation.get_prompt() == case["prompt"]


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        ("v1", [" Hello, how can I help?</s>", " 1, 2, 3.</s>", " You're welcome.</s>"]),
        ("llava_v0", [" Hello, how can I help?###", " 1, 2, 3.###", " You're welcome.###"]),
        ("mpt", ["Hello, how can I help?<|im_end|>", "1, 2, 3.<|im_end|>", "You're welcome.<|im_end|>"]),
        ("llava_llama_2", [" Hello, how can I help? </s>", " 1, 2, 3. </s>", " You're welcome. </s>"]),
    ],
)
def test_answers_with_their_separators_are_the_trained_pieces(template: str, trained: list[str]) -> None:
    pieces = converse(template, "r3_text_full").pieces()
    assert [piece.text for piece in pieces if piece.trained] == trained
    assert [piece.turn for piece in pieces if piece.trained] == [1, 3, 5]


def test_an_answer_to_be_generated_is_not_trained() -> None:
    assert not any(piece.trained for piece in converse("v1", "r1_text_gen").pieces())


def test_a_copy_does_not_share_messages() -> None:
    conversation = converse("v1", "r1_text_gen")
    copy = conversation.copy()
    copy.messages[-1][1] = "Water."
    copy.append_message("USER", "More?")
    assert conversation.messages == converse("v1", "r1_text_gen").messages
    assert conv_templates["v1"].messages == []


@pytest.mark.parametrize("version", ["v0", "v0.5", "vicuna_v1"])
def test_versions_that_mean_the_default_template(version: str) -> None:
    assert select_template(version) == default_conversation
    assert select_template("plain") != default_conversation


def test_an_unknown_version_is_refused_with_the_known_ones() -> None:
    with pytest.raises(FlagError, match=r"--version v7: .* known: .*plain.*vicuna_v1"):
        select_template("v7")
