"""The page of the demo: an image or none, a conversation, and how answers are generated (LaVIN's `demo.py`).

Every error that a user can mend is shown in the conversation. gradio is imported when a page is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import FlagError, LlavaError
from llava.eval.answering.generation import GenerationOptions
from llava.serve.uploads import accept_uploads_alone, uploaded_file
from mma.lavin.chat import LavinChat, Turn

if TYPE_CHECKING:
    import gradio as gr

TITLE = "LaVIN"
WORDS = "Ask about an image, or without one. Another image begins a new conversation."

FIELDS = ("Temperature", "Top p", "Longest answer in tokens", "Seed")
"""Labels of the numbers that say how answers are generated."""

UPLOADS_LOOKED_AT, UPLOADS_KEPT = 3600, 24 * 3600
"""Seconds: every hour, images of visitors that are older than a day are deleted; all of them when the page ends."""

LARGEST = 2**63
"""No number of the page is larger."""

Messages = list[dict[str, str]]
"""What the page shows: `{"role": "user" | "assistant", "content": text}`."""


def messages_of(turns: list[Turn]) -> Messages:
    """The turns of a conversation as the page shows them."""
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
        if text.strip()
    ]


def chosen_options(values: Sequence[object], max_new_tokens: int) -> GenerationOptions:
    """How answers are generated, from the values of the fields `FIELDS`; None is a field that was cleared.

    Args:
        values: as a browser, or a request without one, sends them.
        max_new_tokens: longest answer that the page offers.

    Raises:
        FlagError: a field is empty or no finite number, or a value is out of range.
    """
    numbers = []
    for label, value in zip(FIELDS, values, strict=True):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not -LARGEST <= value <= LARGEST:
            shown = "" if value is None else f", but {str(value)[:40]!r}"
            raise FlagError(f"there is no number in the field '{label}'{shown}; type one")
        numbers.append(value)
    temperature, top_p, length, seed = numbers
    if length > max_new_tokens:
        raise FlagError(f"an answer of {length:g} tokens is longer than the {max_new_tokens} that this page offers")
    return GenerationOptions(float(temperature), float(top_p), max_new_tokens=int(length), seed=int(seed))


class Handlers:
    """What happens when a button is pressed; knows the page's values, not its parts.

    Args:
        chat: answers.
        uploads: folder of the files that visitors upload.
        max_new_tokens: longest answer that may be chosen.
    """

    def __init__(self, chat: LavinChat, uploads: str | Path, max_new_tokens: int) -> None:
        self.chat, self.uploads, self.max_new_tokens = chat, uploads, max_new_tokens

    def ask(
        self,
        question: str | None,
        turns: list[Turn],
        image: str | None,
        temperature: float | None,
        top_p: float | None,
        max_new_tokens: float | None,
        seed: float | None,
    ) -> Iterator[tuple[str, list[Turn], Messages]]:
        """The text box, the conversation, and what is shown of it, as the answer grows; an answer may be empty.

        A question that cannot be answered stays in the text box, and the reason is shown in place of an answer. An
        answer that is stopped stays in the conversation as far as it came.
        """
        # A request without a browser may send no text at all, or half of a character, which no answer could show.
        question = (question or "").encode("utf-8", "replace").decode()
        said = [*turns, (question, "")]
        try:
            options = chosen_options((temperature, top_p, max_new_tokens, seed), self.max_new_tokens)
            file = None if image is None else uploaded_file(image, self.uploads)
            for answer in self.chat.ask(turns, question, file, options):
                said = [*turns, (question, answer)]
                yield "", said, messages_of(said)
        except LlavaError as error:
            yield question, turns, messages_of([*turns, (question, f"Error: {error}")])
        else:
            yield "", said, messages_of(said)

    def begin(self) -> tuple[list[Turn], Messages]:
        """An empty conversation."""
        return [], []


def build_page(chat: LavinChat, max_new_tokens: int) -> gr.Blocks:
    """The page.

    Args:
        chat: answers.
        max_new_tokens: longest answer that may be chosen.
    """
    # An extra of the installation, imported where the page is made.
    import gradio as gr

    cleaning = (UPLOADS_LOOKED_AT, UPLOADS_KEPT)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=cleaning) as page:
        gr.Markdown(f"# {TITLE}\n{WORDS}")
        # The conversation belongs to the tab of the visitor; the server keeps nothing between two questions.
        turns = gr.State([])
        with gr.Row():
            with gr.Column(scale=1):
                image = gr.Image(type="filepath", label="Image", sources=["upload", "clipboard"])
                # The file as it was uploaded: gradio would encode it again, and fail on a broken one without a word.
                image.preprocess = lambda payload: None if payload is None else payload.path or ""  # type: ignore[method-assign]
                with gr.Accordion("Answers", open=False):
                    settings: list[Any] = [
                        gr.Slider(0, 2, 0.1, step=0.05, label=FIELDS[0], info="0: always the most probable word"),
                        gr.Slider(0.05, 1, 0.75, step=0.05, label=FIELDS[1]),
                        gr.Slider(1, max_new_tokens, min(128, max_new_tokens), step=1, label=FIELDS[2]),
                        gr.Number(0, label=FIELDS[3], precision=0),
                    ]
            with gr.Column(scale=2):
                shown = gr.Chatbot(label="Conversation", height=480, buttons=["copy"])
                question = gr.Textbox(label="Question", placeholder="Ask something", autofocus=True)
                with gr.Row():
                    send, stop, clear = gr.Button("Send", variant="primary"), gr.Button("Stop"), gr.Button("New")
        handlers = Handlers(chat, image.GRADIO_CACHE, max_new_tokens)
        # The button and the Enter key ask alike. The API has the same two names, for visitors without a browser.
        asked = gr.on(
            [send.click, question.submit],
            handlers.ask,
            [question, turns, image, *settings],
            [question, turns, shown],
            api_name="ask",
        )
        gr.on(
            # Another image or an emptied window begins a conversation; an answer that is still written stops.
            [clear.click, shown.clear, image.upload, image.clear],
            handlers.begin,
            None,
            [turns, shown],
            cancels=[asked],
            api_name="begin",
        )
        stop.click(None, None, None, cancels=[asked])
    accept_uploads_alone(page)
    return page.queue(default_concurrency_limit=None)
