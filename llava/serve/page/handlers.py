"""What happens when something is pressed on the page: from the values of its fields to new ones.

Knows the values, not the parts. Every error that a visitor can fix is shown in words, and what was typed stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import FlagError, LlavaError
from llava.serve.page.client import Sampling, stream_answer
from llava.serve.page.conversation import Conversation, data_url, read_upload
from llava.serve.page.drawing import details_html, words_html
from llava.serve.page.feedback import Feedback
from llava.serve.page.models import NONE, ModelList

if TYPE_CHECKING:
    from PIL import Image

LONGEST_QUESTION = 20_000
"""Characters."""

FIELDS = ("Temperature", "Top p", "Longest answer in tokens")
"""Labels of the numbers that say how answers are generated."""

RANGES = ((0.0, 2.0), (0.0, 1.0), (1.0, 2.0**31))
"""What they may be; a server may take less."""

DECODED_AT_ONCE = 4
"""Uploads that are decoded at the same time, by all visitors together; each may take a gigabyte."""

Shown = list[dict[str, str]]
Column = tuple[Conversation, Shown, str]
"""What changes in a column while it answers: the conversation, what is shown of it, the drawing of its last answer."""


def chosen_sampling(values: Sequence[object]) -> Sampling:
    """How answers are generated, from the values of the fields `FIELDS`; None is a field that was cleared.

    Raises:
        FlagError: a field is empty, no number, or out of range.
    """
    numbers = []
    for label, value, (least, most) in zip(FIELDS, values, RANGES, strict=True):
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            shown = "empty" if value is None else repr(value)[:40]
            raise FlagError(f"the field '{label}' is {shown}; it takes {least:g} to {most:g}")
        numbers.append(value)
    return Sampling(float(numbers[0]), float(numbers[1]), int(numbers[2]))


class Handlers:
    """The handlers of one page.

    Args:
        models: that visitors may choose.
        uploads: folder of the files that visitors upload.
        feedback: where votes go; None: there are none.
    """

    def __init__(self, models: ModelList, uploads: str | Path, feedback: Feedback | None) -> None:
        self.models, self.uploads, self.feedback = models, uploads, feedback
        self._decoding = asyncio.Semaphore(DECODED_AT_ONCE)

    async def _read(self, image: object) -> tuple[bytes, Image.Image]:
        """`read_upload` outside the event loop, a few at a time."""
        async with self._decoding:
            return await asyncio.to_thread(read_upload, image, self.uploads)

    async def look(self) -> tuple[list[str], str]:
        """The choices of models now, and what is wrong with servers."""
        await self.models.look()
        return self.models.choices, _notice(*self.models.problems)

    async def ask(
        self, question: object, image: object, choices: Sequence[object], conversations: Sequence[Conversation]
    ) -> tuple[str, str, list[Conversation]]:
        """A question to every column that has a model: the text box, a notice, and the conversations with it.

        Another image than that of a conversation begins a new one. What is wrong with a question is the notice, and
        nothing changes.
        """
        # Half a surrogate pair, which no reply to the browser can hold, becomes a question mark.
        text = question.encode("utf-8", "replace").decode() if isinstance(question, str) else ""
        path = image if isinstance(image, str) else None
        try:
            _refuse_open([conversation for conversation in conversations if conversation.image == path])
            if not text.strip():
                raise FlagError("there is no question; type one")
            if len(text) > LONGEST_QUESTION:
                raise FlagError(f"the question has {len(text)} characters; the most is {LONGEST_QUESTION}")
            if all(choice == NONE for choice in choices):
                raise FlagError("no model is chosen; choose one")
            # Decoded here, in a thread, so that a wrong file is refused before any server is asked.
            if image is not None:
                await self._read(image)
        except LlavaError as error:
            return text, _notice(error), list(conversations)
        asked = [
            conversation
            if choice == NONE
            else Conversation(conversation.about(path).turns, path).ask(text.strip(), str(choice))
            for choice, conversation in zip(choices, conversations, strict=True)
        ]
        return "", "", asked

    @staticmethod
    def new_image(image: object, conversations: Sequence[Conversation]) -> list[Conversation | None]:
        """New conversations for those that are not about the image that is there now; None for the others.

        Whenever this step comes, also behind a question about the new image: nothing of that is lost.
        """
        path = image if isinstance(image, str) else None
        return [None if conversation.image == path else conversation.about(path) for conversation in conversations]

    def again(self, choices: Sequence[object], conversations: Sequence[Conversation]) -> tuple[str, list[Conversation]]:
        """The last question of every column once more: a notice and the conversations."""
        try:
            _refuse_open(conversations)
            if not any(conversation.turns for conversation in conversations):
                raise FlagError("nothing was asked yet")
        except LlavaError as error:
            return _notice(error), list(conversations)
        asked = []
        for choice, conversation in zip(choices, conversations, strict=True):
            if choice == NONE or not conversation.turns:
                asked.append(conversation)
                continue
            *before, last = conversation.turns
            asked.append(Conversation(tuple(before), conversation.image).ask(last.question, str(choice)))
        return "", asked

    async def answer(
        self, conversation: Conversation, values: Sequence[object], wants_details: object
    ) -> AsyncIterator[Column]:
        """The answer to the open question of a column as it grows; what is wrong ends it in words.

        Nothing comes if somebody else generates it already: a question or `again` that was refused meanwhile is
        followed by this step, too. It ends without a word once the conversation is abandoned.
        """
        last = conversation.turns[-1] if conversation.turns else None
        if last is not None and last.start.abandoned and not last.ended:
            return
        if not conversation.is_open:
            yield conversation, conversation.shown(), _drawing(conversation)
            return
        if not conversation.turns[-1].start.take():
            return
        yield conversation, conversation.shown(), ""
        try:
            sampling, turn = chosen_sampling(values), conversation.turns[-1]
            model = self.models.find(turn.model)
            url = None
            if conversation.image is not None:
                content, _ = await self._read(conversation.image)
                url = await asyncio.to_thread(data_url, content)
            async for piece in stream_answer(model, conversation.messages(url), sampling, details=bool(wants_details)):
                last = conversation.turns[-1]
                details = last.details if piece.details is None else piece.details
                conversation = conversation.last(answer=last.answer + piece.text, details=details)
                if conversation.turns[-1].start.abandoned:
                    return
                if piece.text:
                    yield conversation, conversation.shown(), ""
        except LlavaError as error:
            conversation = conversation.last(ended=True, problem=str(error))
        else:
            conversation = conversation.last(ended=True)
        if conversation.turns[-1].start.abandoned:
            return
        yield conversation, conversation.shown(), _drawing(conversation)

    async def vote(self, kind: str, conversation: Conversation, visitor: str) -> tuple[Conversation, str]:
        """The conversation with a vote on its last answer, and what is said of it."""
        if self.feedback is None or not conversation.turns or conversation.is_open:
            return conversation, _notice(FlagError("there is no answer to vote on yet"))
        last = conversation.turns[-1]
        if last.problem is not None:
            return conversation, _notice(FlagError("there is no answer to vote on: the last question has none"))
        if last.voted is not None:
            return conversation, _notice(FlagError(f"this answer has your vote already: {last.voted}"))
        try:
            image = None
            if conversation.image is not None:
                _, image = await self._read(conversation.image)
            await asyncio.to_thread(self.feedback.vote, kind, conversation, image, visitor)
        except LlavaError as error:
            return conversation, _notice(error)
        return conversation.last(voted=kind), f"Saved: {kind} for {last.model}. Thank you."


def stopped(conversations: Sequence[Conversation]) -> list[Any]:
    """The conversations with as much of their answers as has come, then what is shown of them."""
    ended = [conversation.stopped() for conversation in conversations]
    return [*ended, *(conversation.shown() for conversation in ended)]


def _refuse_open(conversations: Sequence[Conversation]) -> None:
    """Raise while an answer is under way."""
    if any(conversation.is_open for conversation in conversations):
        raise FlagError("an answer is still coming; wait for it, or press Stop")


def _notice(*errors: LlavaError) -> str:
    return "\n\n".join(f"**Error:** {error}" for error in errors)


def _drawing(conversation: Conversation) -> str:
    """The drawing of the last answer; what cannot be drawn is said in its place."""
    if not conversation.turns:
        return ""
    try:
        return details_html(conversation.turns[-1].details)
    except LlavaError as error:
        return words_html(str(error))
