"""A conversation with LaVIN about one image or none, as in its demo (`conversation/conversation.py`, `demo.py`).

The turns stand in front of a question as text. The original writes `Responese:` in front of an answer and a blank too
many behind the image, although it trains on `Response:`; here the words are those of the training.
"""

from __future__ import annotations

import io
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.images import ProcessedImage, read_rgb
from llava.data.pixels import process_images
from llava.errors import BadImageError, BadSampleError, LlavaError
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import LoadedModel
from llava.serve.engine import End, Engine, Job, Row
from mma.lavin.data.prompts import RESPONSE
from mma.lavin.data.tokens import prompt_ids

QUESTION = "Instruction:"
MISSPELT = "Responese:"

CHARS_PER_POSITION = 32
"""A token of LLaMA has 16 characters at most; longer conversations are refused before they are tokenized."""

Turn = tuple[str, str]
"""A question and its answer."""


def chat_prompt(turns: Sequence[Turn], question: str, *, has_image: bool, as_original: bool = False) -> str:
    """What the model continues.

    Args:
        turns: what was said before.
        question: what is asked now.
        has_image: the conversation is about an image.
        as_original: the words of the original's demo.
    """
    word = MISSPELT if as_original else RESPONSE
    questions = [asked for asked, _ in turns] + [question]
    if as_original and has_image:
        questions[0] = f" {questions[0]}"
    answers = [answer.strip() for _, answer in turns]
    said = [f"{QUESTION} {asked}\n{word} {answer}\n" for asked, answer in zip(questions, answers, strict=False)]
    return "".join(said) + f"{QUESTION} {questions[-1]}\n{word}"


def shown_answer(text: str) -> str:
    """What of a generated text is the answer: it may begin with the word again."""
    for word in (MISSPELT, RESPONSE):
        text = text.rpartition(word)[2]
    return text.strip()


def load_chat_image(path: str | Path, loaded: LoadedModel) -> ProcessedImage:
    """Pixels of an uploaded file.

    Raises:
        BadImageError: it is no image, broken, or too large, or not there any more. No message names the path: it is
            the server's, and a visitor reads it.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise BadImageError("the image is on this server no more; upload it again") from error
    image = read_rgb(io.BytesIO(content), "the image")
    pixels = process_images([image], loaded.image_processor, loaded.model.config, name="the image")[0]
    return ProcessedImage(pixels, image.size)


def stream(engine: Engine, job: Job) -> Iterator[str]:
    """The answer to a job, piece by piece; closing the iterator ends its generation.

    Raises:
        LlavaError: the engine could not answer.
    """
    pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    ends: list[End | LlavaError] = []

    def end(reason: End | LlavaError, _: Row) -> None:
        ends.append(reason)
        pieces.put(None)

    row = Row(job, pieces.put, end)
    engine.submit(row)
    try:
        yield from iter(pieces.get, None)
    finally:
        row.cancel()
    if isinstance(ends[0], LlavaError):
        raise ends[0]


@dataclass(frozen=True)
class LavinChat:
    """What answers questions in a conversation.

    Attributes:
        engine: with a LaVIN.
        as_original: see `chat_prompt`.
    """

    engine: Engine
    as_original: bool = False

    def ask(
        self, turns: Sequence[Turn], question: str, image: str | Path | None, options: GenerationOptions
    ) -> Iterator[str]:
        """The answer as it grows.

        Args:
            turns: what was said before.
            question: what is asked now.
            image: file of the image that the conversation is about.
            options: how the answer is generated.

        Raises:
            BadImageError: the image cannot be read.
            BadSampleError: the question is empty, or the conversation longer than the model takes.
            LlavaError: the engine could not answer.
        """
        if not question.strip():
            raise BadSampleError("there is no question")
        loaded = self.engine.loaded
        images = [] if image is None else [load_chat_image(image, loaded)]
        prompt = chat_prompt(turns, question.strip(), has_image=bool(images), as_original=self.as_original)
        longest = CHARS_PER_POSITION * loaded.model.config.tokenizer_model_max_length
        if len(prompt) > longest:
            raise BadSampleError(
                f"the conversation has {len(prompt)} characters, and this page takes up to {longest}; begin a new one, "
                "or ask a shorter question"
            )
        ids = prompt_ids(loaded.tokenizer, prompt, bool(images))
        self._check_length(ids, len(images), options)
        text = ""
        for piece in stream(self.engine, Job(ids, images, options, stops=(f"\n{QUESTION}",))):
            text += piece
            yield shown_answer(text)

    def _check_length(self, ids: Tensor, images: int, options: GenerationOptions) -> None:
        loaded = self.engine.loaded
        features = loaded.patches_per_image * int((ids == IMAGE_TOKEN_INDEX).sum())
        length, limit = len(ids) - images + features, loaded.model.config.tokenizer_model_max_length
        if length + options.max_new_tokens > limit:
            raise BadSampleError(
                f"the conversation has {length} positions, and with an answer of {options.max_new_tokens} it would be "
                f"longer than the {limit} that the model was trained on; begin a new one, or ask for a shorter answer"
            )
