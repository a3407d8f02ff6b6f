"""Ids that open a later user turn, by template, as they stand in a tokenised conversation."""

from __future__ import annotations

import pytest

from llava.data.markers import user_marker_ids
from llava.data.templates import select_template
from tests.llava.runtime.tokenizers import make_tokenizer

OPENINGS = {"v1": "USER:", "vicuna_v1": "USER:", "llama_2": "[INST]", "mpt": "<|im_start|>user"}


@pytest.mark.parametrize("version", OPENINGS)
def test_marker_stands_before_the_second_question(version: str) -> None:
    template, tokenizer = select_template(version), make_tokenizer()
    marker = user_marker_ids(template, tokenizer)
    assert tokenizer.decode(marker).strip().endswith(OPENINGS[version])
    conversation = template.copy()
    user, assistant = conversation.roles
    for role, text in ((user, "What?"), (assistant, "This."), (user, "Why?"), (assistant, "So.")):
        conversation.append_message(role, text)
    ids = tokenizer(conversation.get_prompt()).input_ids
    places = [start for start in range(len(ids)) if ids[start : start + len(marker)] == marker]
    assert places, "the marker must be found in a conversation"
    until = tokenizer.decode(ids[: places[-1] + len(marker)], skip_special_tokens=True)
    answer = until.rstrip().removesuffix(OPENINGS[version]).rstrip().removesuffix("<|im_end|>").rstrip("# ")
    assert answer.endswith("This.")


def test_nothing_marks_a_turn_of_plain_text() -> None:
    assert user_marker_ids(select_template("plain"), make_tokenizer()) == []
