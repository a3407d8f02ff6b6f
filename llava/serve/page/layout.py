"""The page itself: one column for each model, side by side, under one question; made of gradio's parts.

Corresponds to upstream's `gradio_web_server.py: build_demo`. gradio is imported when a page is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from llava.serve.page.conversation import Conversation
from llava.serve.page.feedback import VOTES, Feedback
from llava.serve.page.handlers import FIELDS, LONGEST_QUESTION, Handlers, stopped
from llava.serve.page.models import ModelList
from llava.serve.uploads import accept_uploads_alone

if TYPE_CHECKING:
    import gradio as gr

TITLE = "LLaVA"
WORDS = "Ask about an image, or without one. Every column asks its own model; another image begins a new conversation."

UPLOADS_LOOKED_AT, UPLOADS_KEPT = 3600, 24 * 3600
"""Seconds: every hour, images of visitors that are older than a day are deleted; all of them when the page ends."""


def build_page(
    models: ModelList,
    columns: int,
    *,
    feedback: Feedback | None = None,
    reload: bool = False,
    embed: bool = False,
    concurrency: int = 16,
    max_new_tokens: int = 1024,
) -> gr.Blocks:
    """The page.

    Args:
        models: that visitors may choose; looked at before.
        columns: models side by side.
        feedback: where votes go; None: the page has no buttons for them.
        reload: ask the servers for their models for each visitor.
        embed: leave out the title, for a page within another one.
        concurrency: answers at the same time.
        max_new_tokens: longest answer that may be chosen.
    """
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(UPLOADS_LOOKED_AT, UPLOADS_KEPT)) as page:
        if not embed:
            gr.Markdown(f"# {TITLE}\n{WORDS}")
        notice = gr.Markdown(elem_id="notice")
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                image = gr.Image(type="filepath", label="Image", sources=["upload", "clipboard"], height=240)
                # The file as it was uploaded: gradio would encode it again, and fail on a broken one without a word.
                image.preprocess = lambda payload: None if payload is None else payload.path or ""  # type: ignore[method-assign]
                with gr.Accordion("Answers", open=False):
                    settings: list[Any] = [
                        gr.Slider(0, 2, 0.2, step=0.05, label=FIELDS[0], info="0: always the most probable token"),
                        gr.Slider(0, 1, 0.7, step=0.05, label=FIELDS[1]),
                        gr.Slider(1, max_new_tokens, min(512, max_new_tokens), step=1, label=FIELDS[2]),
                    ]
                details = gr.Checkbox(True, label="Show what the model did")
            with gr.Column(scale=4), gr.Row():
                parts = [_column(models, number, feedback is not None) for number in range(columns)]
        question = gr.Textbox(
            label="Question", placeholder="Ask something", autofocus=True, max_length=LONGEST_QUESTION
        )
        handlers = Handlers(models, image.GRADIO_CACHE, feedback)
        _connect(Parts(question, notice, image, [*settings, details], parts), handlers, concurrency)
        if feedback is not None:
            for number, part in enumerate(parts, start=1):
                for kind in VOTES:
                    outputs = [part["state"], part["said"]]
                    part[kind].click(_vote(handlers, kind), [part["state"]], outputs, api_name=f"{kind}_{number}")
        if reload:

            async def look() -> list[Any]:
                labels, words = await handlers.look()
                return [words, *(gr.Dropdown(labels, value=models.default(number)) for number in range(columns))]

            page.load(look, None, [notice, *(part["model"] for part in parts)], api_name="models")
    accept_uploads_alone(page)
    return page.queue(default_concurrency_limit=None)


class Parts(NamedTuple):
    """The parts of the page that asking and answering touches.

    Attributes:
        question: the text box.
        notice: where it is said what is wrong with a question.
        image: that is asked about.
        settings: how answers are generated, and whether details are wanted.
        columns: parts of each column, by name.
    """

    question: Any
    notice: Any
    image: Any
    settings: list[Any]
    columns: list[dict[str, Any]]


def _connect(parts: Parts, handlers: Handlers, concurrency: int) -> None:
    """Add the buttons, and say what happens when one is pressed."""
    import gradio as gr

    count = len(parts.columns)
    states, choices, shown, drawn = (
        [column[name] for column in parts.columns] for name in ("state", "model", "shown", "details")
    )

    async def ask(text: Any, image: Any, *rest: Any) -> list[Any]:
        box, words, conversations = await handlers.ask(text, image, rest[:count], rest[count:])
        return [box, words, *conversations]

    def again(*rest: Any) -> list[Any]:
        words, conversations = handlers.again(rest[:count], rest[count:])
        return [words, *conversations]

    async def answer(conversation: Conversation, *rest: Any) -> Any:
        column = None
        async for column in handlers.answer(conversation, rest[:-1], rest[-1]):
            yield column
        if column is None:  # gradio would empty the column of a step that says nothing
            yield [gr.skip()] * 3

    with gr.Row():
        send = gr.Button("Send", variant="primary")
        stop, regenerate, clear = (gr.Button(name) for name in ("Stop", "Regenerate", "Clear"))
    # Asking and answering are two steps, so that each column answers by itself: a slow model, or one that fails,
    # keeps no other one waiting.
    inputs = [parts.question, parts.image, *choices, *states]
    asked = gr.on(
        [send.click, parts.question.submit], ask, inputs, [parts.question, parts.notice, *states], api_name="ask"
    )
    asked_again = regenerate.click(again, [*choices, *states], [parts.notice, *states], api_name="regenerate")
    answers = [
        step.then(
            answer,
            [state, *parts.settings],
            [state, window, drawing],
            concurrency_limit=concurrency,
            concurrency_id="answers",
            api_name=f"{name}_{number}",
        )
        for step, name in ((asked, "answer"), (asked_again, "answer_again"))
        for number, (state, window, drawing) in enumerate(zip(states, shown, drawn, strict=True), start=1)
    ]
    # An answer that is stopped stays as far as it came; its server notices that nobody reads any more.
    stop.click(lambda *all_: stopped(all_), states, [*states, *shown], cancels=answers, api_name="stop")

    # A step that is late must not undo what came after it: another image begins new conversations only where they are
    # about the one before, since the question about it may have been quicker.
    def look_at(image: Any, *given: Any) -> list[Any]:
        found = handlers.new_image(image, given)
        emptied = [[gr.skip() if new is None else value for new in found] for value in ([], "")]
        return ["", *(gr.skip() if new is None else new for new in found), *emptied[0], *emptied[1]]

    everything = [parts.notice, *states, *shown, *drawn]
    gr.on(
        [parts.image.upload, parts.image.clear],
        look_at,
        [parts.image, *states],
        everything,
        cancels=[asked_again],
        api_name="new_image",
    )
    # Whoever empties the window wants to see nothing more, neither of what is answered nor of what is being asked.
    gr.on(
        [clear.click, *(window.clear for window in shown)],
        lambda *all_: ["", *(each.abandoned() for each in all_), *[[]] * count, *[""] * count],
        states,
        everything,
        cancels=[asked, asked_again, *answers],
        api_name="clear",
    )


def _column(models: ModelList, number: int, votes: bool) -> dict[str, Any]:
    """The parts of one column, by name."""
    import gradio as gr

    label = f"Model {number + 1}"
    with gr.Column(min_width=280, elem_id=f"column-{number + 1}"):
        parts: dict[str, Any] = {
            # The conversation belongs to the tab of the visitor; nothing of it is kept afterwards.
            "state": gr.State(Conversation()),
            "model": gr.Dropdown(models.choices, value=models.default(number), label=label),
            "shown": gr.Chatbot(label=f"Conversation {number + 1}", height=420, buttons=["copy"]),
        }
        if votes:
            with gr.Row():
                parts |= {kind: gr.Button(kind.capitalize(), size="sm", min_width=60) for kind in VOTES}
            parts["said"] = gr.Markdown()
        parts["details"] = gr.HTML(elem_id=f"details-{number + 1}")
    return parts


def _vote(handlers: Handlers, kind: str) -> Any:
    """A handler that is told who votes: gradio knows the argument by its annotation, which must be the class itself."""
    import gradio as gr

    async def vote(conversation: Conversation, request: Any) -> tuple[Conversation, str]:
        client = request.client
        return await handlers.vote(kind, conversation, client.host if client is not None else "")

    vote.__annotations__ = {"conversation": Conversation, "request": gr.Request}
    return vote
