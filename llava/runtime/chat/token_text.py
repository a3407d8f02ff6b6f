"""Text from tokens as they come, in linear time; shared by answers that are streamed and by words of kept tokens.

transformers' `TextStreamer` decodes every line by itself, so that SentencePiece tokenizers lose a blank at its
beginning; here each token is decoded behind the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST_HELD = 64
"""Tokens without a whole character after which the text is taken as it is, so that the time stays linear."""


class TokenDecoder:
    """Turns the ids of one answer into text, piece by piece.

    Args:
        tokenizer: of the model.
        skip_special_tokens: leave them out.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skips = tokenizer, skip_special_tokens
        self.ids: list[int] = []
        self._start, self._shown = 0, 0  # ids[start:shown] are the context of what comes

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; empty while a character lacks some of its bytes."""
        self.ids += ids
        before, text = self._decode(self.ids[self._start : self._shown]), self._decode(self.ids[self._start :])
        is_whole = len(text) > len(before) and not text.endswith("\ufffd")
        if not is_whole and len(self.ids) - self._shown < MOST_HELD:
            return ""
        self._start, self._shown = self._shown, len(self.ids)
        return text[len(before) :]

    def rest(self) -> str:
        """What was held back; the answer has ended."""
        shown = self._decode(self.ids[self._start : self._shown])
        return self._decode(self.ids[self._start :])[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.skips) if ids else ""
