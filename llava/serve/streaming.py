"""Text from tokens as they come, and its end at a stop string; shared by the terminal and the server.

Both are fed, so that one thread may serve many rows. transformers' `TextStreamer` decodes every line by itself, so that
SentencePiece tokenizers lose a blank at its beginning; here each token is decoded behind the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any


class TokenDecoder:
    """Turns the ids of one answer into text, piece by piece.

    Args:
        tokenizer: of the model; special tokens are left out.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._start, self._shown = 0, 0  # ids[start:shown] are the context of what comes

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; empty while a character lacks some of its bytes."""
        self.ids += ids
        before, text = self._decode(self.ids[self._start : self._shown]), self._decode(self.ids[self._start :])
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self.ids)
        return text[len(before) :]

    def rest(self) -> str:
        """What was held back; the answer has ended."""
        shown = self._decode(self.ids[self._start : self._shown])
        return self._decode(self.ids[self._start :])[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


class StopFilter:
    """Lets a text pass up to the first stop string; what might begin one is held back until that is known.

    Attributes:
        stopped: a stop string was found; nothing passes any more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.stopped = False
        self._text, self._done = "", 0

    def push(self, piece: str) -> str:
        """The part of the text that is known to stand before any stop string."""
        if self.stopped:
            return ""
        self._text += piece
        ends = [place for place in (self._text.find(stop) for stop in self.stops) if place >= 0]
        self.stopped = bool(ends)
        held = max((_overlap(self._text, stop) for stop in self.stops), default=0)
        return self._pass(min(ends) if ends else len(self._text) - held)

    def rest(self) -> str:
        """What was held back; the text has ended."""
        return "" if self.stopped else self._pass(len(self._text))

    def _pass(self, end: int) -> str:
        passed = self._text[self._done : end]
        self._done = max(self._done, end)
        return passed


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the first of `stops`."""
    text = StopFilter(stops)
    for piece in pieces:
        if passed := text.push(piece):
            yield passed
        if text.stopped:
            return
    if passed := text.rest():
        yield passed


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)
