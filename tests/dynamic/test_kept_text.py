"""The words of kept tokens: what each token adds to the text, in linear time."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from dynamic.kept_text import words
from llava.runtime.chat.token_text import MOST_HELD, TokenDecoder
from tests.golden import golden_dir


class Bytes:
    """A tokenizer of bytes that counts the tokens it decodes; 0 is a special token."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        self.decoded += len(ids)
        texts = b"".join(b"<s>" if token == 0 else bytes([token]) for token in ids if token or not skip_special_tokens)
        return texts.decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["Is it red?", "é — 漢字 😀 end", ""])
def test_the_words_are_the_text(text: str) -> None:
    ids = list(text.encode())
    found = words(ids, [index % 2 == 0 for index in range(len(ids))], Bytes())
    assert "".join(word.text for word in found) == text
    assert [word.kept for word in found] == [index % 2 == 0 for index in range(len(ids))]


def test_special_tokens_are_words() -> None:
    assert [word.text for word in words([0, 65], [True, True], Bytes())] == ["<s>", "A"]


def test_half_a_character_at_the_end_is_shown() -> None:
    assert [word.text for word in words([65, 0xE6], [True, False], Bytes())] == ["A", "�"]


def test_the_tokenizer_of_a_model() -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden_dir("llava") / "tiny-llava-v1.5")
    ids = tokenizer("Is it red?\nYes, it is.", add_special_tokens=False).input_ids
    assert "".join(word.text for word in words(ids, [True] * len(ids), tokenizer)) == tokenizer.decode(ids)


@pytest.mark.parametrize("token", [65, 0, 0x80], ids=["letters", "special tokens", "bytes that are no text"])
@pytest.mark.parametrize("skips", [True, False])
def test_the_time_is_linear(token: int, skips: bool) -> None:
    """Whatever the model generates: nothing at all, and halves of characters, too."""
    counts = []
    for length in (2000, 4000):
        tokenizer: Any = Bytes()
        decoder = TokenDecoder(tokenizer, skip_special_tokens=skips)
        text = "".join(decoder.push([token]) for _ in range(length)) + decoder.rest()
        assert text == Bytes().decode([token] * length, skip_special_tokens=skips)
        counts.append(tokenizer.decoded)
    assert counts[1] < 2.2 * counts[0]
    assert counts[1] < 4000 * 5 * MOST_HELD
