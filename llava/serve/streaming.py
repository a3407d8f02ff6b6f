"""The end of a text at a stop string, as the text comes; shared by the terminal and the server.

It is fed, so that one thread may serve many rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class _Search:
    """Looks for one string in a text that comes character by character, in a step or two for each.

    Args:
        stop: what is looked for, at least one character.

    Attributes:
        matched: length of the longest beginning of `stop` that the text ends with.
    """

    def __init__(self, stop: str) -> None:
        self.stop, self.matched = stop, 0
        # shorter[n]: the longest beginning that stop[:n] ends with, other than itself (Knuth, Morris and Pratt)
        self._shorter = [0, 0]
        for char in stop[1:]:
            self._shorter.append(self._longer(self._shorter[-1], char))

    def push(self, char: str) -> bool:
        """True if the text now ends with `stop`."""
        self.matched = self._longer(self.matched, char)
        return self.matched == len(self.stop)

    def _longer(self, matched: int, char: str) -> int:
        while matched and (matched == len(self.stop) or self.stop[matched] != char):
            matched = self._shorter[matched]
        return matched + (self.stop[matched] == char)


class StopFilter:
    """Lets a text pass up to the first stop string; what might begin one is held back until that is known.

    The time is linear in the text for each stop string, however long that is.

    Args:
        stops: strings of at least one character.

    Attributes:
        stopped: a stop string was found; nothing passes any more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._searches = [_Search(stop) for stop in stops]
        self._held = ""

    def push(self, piece: str) -> str:
        """The part of the text that is known to stand before any stop string."""
        if self.stopped:
            return ""
        known = len(self._held)
        self._held += piece
        begins = []
        for search in self._searches:
            found = next((place for place, char in enumerate(piece, start=known + 1) if search.push(char)), None)
            begins += [] if found is None else [found - len(search.stop)]
        self.stopped = bool(begins)
        longest = max((search.matched for search in self._searches), default=0)
        return self._pass(min(begins) if begins else len(self._held) - longest)

    def rest(self) -> str:
        """What was held back; the text has ended."""
        return "" if self.stopped else self._pass(len(self._held))

    def _pass(self, end: int) -> str:
        passed, self._held = self._held[:end], self._held[end:]
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
