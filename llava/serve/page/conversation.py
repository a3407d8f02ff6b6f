"""A conversation of the page: what was said, and the form that servers, the page and the log of feedback want.

Values that do not change: each step of an answer is a new one, which belongs to the tab of a visitor.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from llava.data.images import read_rgb
from llava.errors import BadImageError
from llava.serve.uploads import uploaded_file


class Start:
    """Whether an answer is generated already, or not wanted any more: one for a turn and all its later versions.

    It alone changes here. Several steps of a page may come to the same turn; the first one answers.
    """

    def __init__(self) -> None:
        self.begun = self.abandoned = False

    def take(self) -> bool:
        """True for the first one that asks."""
        begun, self.begun = self.begun, True
        return not begun and not self.abandoned


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: what was asked.
        model: label of the model that is asked.
        answer: as far as it has come.
        ended: nothing more comes.
        problem: why there is no answer, or no whole one.
        details: what the server says of the answer.
        voted: what the visitor said of it.
        start: taken by what generates the answer, and told when nobody wants it any more.
    """

    question: str
    model: str
    answer: str = ""
    ended: bool = False
    problem: str | None = None
    details: Any = None
    voted: str | None = None
    start: Start = field(default_factory=Start, compare=False, repr=False)

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes; also of a version from before the visitor pressed Stop."""
        return self.ended or self.start.abandoned


@dataclass(frozen=True)
class Conversation:
    """Turns about one image or none.

    Attributes:
        turns: what was said; the last one may be under way.
        image: path of the image, as the visitor's browser names it.
    """

    turns: tuple[Turn, ...] = ()
    image: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether an answer is under way."""
        return bool(self.turns) and not self.turns[-1].is_over

    def ask(self, question: str, model: str) -> Conversation:
        """With another question."""
        return replace(self, turns=(*self.turns, Turn(question, model)))

    def last(self, **changes: Any) -> Conversation:
        """With another last turn."""
        return replace(self, turns=(*self.turns[:-1], replace(self.turns[-1], **changes)))

    def stopped(self) -> Conversation:
        """With what has come of an answer that was under way; whoever is answering is told to end."""
        if not self.is_open:
            return self
        self.turns[-1].start.abandoned = True
        return self.last(ended=True)

    def about(self, image: str | None) -> Conversation:
        """Itself if it is about this image; else a new one, and whoever is answering here is told to end."""
        return self if self.image == image else self.abandoned()

    def abandoned(self) -> Conversation:
        """A new conversation; whoever is answering in this one is told to end."""
        for turn in self.turns:
            turn.start.abandoned = True
        return Conversation()

    def messages(self, image: str | None) -> list[dict[str, Any]]:
        """What a server is asked, as OpenAI's API has it; turns without an answer are left out, but for the open one.

        Args:
            image: address of the image, which comes with the first question.
        """
        said: list[dict[str, Any]] = []
        for turn in self.turns:
            if turn.is_over and turn.problem is not None:
                continue
            content: Any = turn.question
            if image is not None and not said:
                content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": turn.question}]
            said.append({"role": "user", "content": content})
            if turn.is_over:
                said.append({"role": "assistant", "content": turn.answer})
        return said

    def shown(self) -> list[dict[str, str]]:
        """What the page shows: `{"role": "user" | "assistant", "content": text}`."""
        said = []
        for turn in self.turns:
            said.append({"role": "user", "content": turn.question})
            text = turn.answer if turn.is_over else f"{turn.answer}▌"
            if turn.problem is not None:
                text = f"{text}\n\nError: {turn.problem}".strip()
            said.append({"role": "assistant", "content": text or "(an empty answer)"})
        return said


def read_upload(path: object, folder: str | Path) -> tuple[bytes, Image.Image]:
    """The file that a visitor has uploaded, as it came and decoded.

    Args:
        path: as the request names it.
        folder: where uploads are.

    Raises:
        BadImageError: it is not such a file, too large, or not an image. No message names the path, which is the
            server's.
    """
    file = uploaded_file(path, folder)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BadImageError("the image is no longer on this server; upload it again") from error
    return content, read_rgb(io.BytesIO(content), "the image")


def data_url(content: bytes) -> str:
    """An image file as an address that has all of it."""
    with Image.open(io.BytesIO(content)) as image:
        kind = (image.format or "png").lower()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
