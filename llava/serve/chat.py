"""A conversation with a model about any number of images, answered piece by piece (upstream `llava/serve/cli.py`).

Knows nothing of a terminal; `llava/serve/cli.py` is the program.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.data.images import ProcessedImage
from llava.errors import BadSampleError, NotFiniteError
from llava.eval.answering.answers import Task
from llava.eval.answering.generation import GenerationOptions, ending_arguments
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.prompts import add_image_markers, new_conversation, prompt_ids
from llava.eval.answering.runner import OpenImage, image_arguments, load_images
from llava.runtime.chat.token_text import TokenDecoder
from llava.runtime.finite_logits import LogitsWatch
from llava.serve.streaming import until_stop


class Interruption(StoppingCriteria):
    """Ends a generation that runs in another thread, after its next token."""

    def __init__(self) -> None:
        self.wanted = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """The same for every row: bool (B,)."""
        return torch.full((len(input_ids),), self.wanted.is_set(), dtype=torch.bool, device=input_ids.device)


class TokenQueue(BaseStreamer):
    """Ids of one row, from the thread that generates to the one that reads their text.

    Args:
        tokenizer: turns ids into text.
        ends: tokens that end an answer and are not part of its text.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int] = ()) -> None:
        self.tokenizer, self.ends = tokenizer, frozenset(ends)
        self.queue: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()

    def put(self, value: Tensor) -> None:
        """Take new ids, (n,) or (1, n); the prompt, which enters as embeddings, is none of them."""
        self.queue.put(value.flatten().tolist())

    def end(self) -> None:
        """Say that no more ids come."""
        self.queue.put(None)

    def __iter__(self) -> Iterator[str]:
        decoder = TokenDecoder(self.tokenizer)
        for new in iter(self.queue.get, None):
            if text := decoder.push([token for token in new if token not in self.ends]):
                yield text
        if rest := decoder.rest():
            yield rest


@dataclass
class Chat:
    """One conversation.

    Attributes:
        loaded: model, tokenizer, image processor.
        conv_mode: name of the conversation template.
        options: decoding options; a turn's random stream follows from their seed and the number of the turn.
        open_image: opens an image by its name.
        conversation: what was said so far.
        images: the images that were shown, in the order of their markers.
        waiting: images that the next message shows.
    """

    loaded: LoadedModel
    conv_mode: str
    options: GenerationOptions
    open_image: OpenImage
    conversation: Conversation = field(init=False)
    images: list[ProcessedImage] = field(init=False, default_factory=list)
    waiting: list[ProcessedImage] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said and shown."""
        self.conversation = new_conversation(self.conv_mode, self.loaded.tokenizer)
        self.images, self.waiting = [], []

    def show(self, names: Sequence[str]) -> None:
        """Have images shown with the next message.

        Raises:
            BadImageError: one cannot be opened; none is added then.
            CheckpointError: the model has no vision tower.
        """
        task = Task(0, "", "", tuple(names), where="image")
        self.waiting += load_images(task, self.loaded, self.open_image)

    def ask(self, message: str) -> Iterator[str]:
        """Say something; the result yields the answer as it comes.

        What was generated stays in the conversation, also if the caller closes the iterator before the answer ends.

        Raises:
            BadSampleError: the markers in the message do not fit the waiting images, or the conversation has become
                longer than the model takes; the conversation is as before then.
            NotFiniteError: while the answer comes: the logits are not numbers; the conversation is as before then.
        """
        wrap = bool(getattr(self.loaded.model.config, "mm_use_im_start_end", False))
        text = add_image_markers(message, len(self.waiting), mm_use_im_start_end=wrap, where="message")
        conversation, images = self.conversation.copy(), [*self.images, *self.waiting]
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        ids = prompt_ids(conversation, self.loaded.tokenizer)
        self._check_length(ids, images)
        return self._answer(ids, conversation, images)

    def _answer(self, ids: Tensor, conversation: Conversation, images: list[ProcessedImage]) -> Iterator[str]:
        before = self.conversation, self.images, self.waiting
        self.conversation, self.images, self.waiting = conversation, images, []
        answer: list[str] = []
        try:
            for piece in self._generate(ids):
                answer.append(piece)
                yield piece
        except NotFiniteError:
            self.conversation, self.images, self.waiting = before
            raise
        finally:
            conversation.messages[-1][1] = "".join(answer).strip()

    def _check_length(self, ids: Tensor, images: Sequence[ProcessedImage]) -> None:
        limit = getattr(self.loaded.model.config, "tokenizer_model_max_length", None)
        length = len(ids) - int((ids == IMAGE_TOKEN_INDEX).sum())
        if images:
            sizes = [image.size for image in images]
            length += sum(self.loaded.model.image_lengths([image.pixels for image in images], sizes))
        if limit is not None and length > limit:
            raise BadSampleError(
                f"the conversation has {length} positions now, and the model takes {limit}; begin a new one with /reset"
            )

    def _generate(self, ids: Tensor) -> Iterator[str]:
        """Pieces of the answer to a prompt (T,), without special tokens and what ends it."""
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        end, interruption = self.loaded.answer_end(self.conv_mode), Interruption()
        streamer = TokenQueue(tokenizer, end.ids)
        ending = ending_arguments(end, tokenizer)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        arguments: dict[str, Any] = {
            **image_arguments([self.images], self.loaded),
            **self.options.arguments([str(len(self.conversation.messages))]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.bool, device=model.device),
            **ending,
            "stopping_criteria": StoppingCriteriaList([interruption, *ending.get("stopping_criteria", [])]),
            "streamer": streamer,
            "pad_token_id": pad,
        }
        watch = LogitsWatch(at_once=True, dtype=model.dtype, where="your message")
        arguments["logits_processor"] = LogitsProcessorList([watch, *arguments.get("logits_processor", [])])
        failures: list[BaseException] = []

        def work() -> None:
            try:
                model.generate(ids[None].to(model.device), **arguments)
            except BaseException as error:  # handed to the thread that asked, below
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from until_stop(streamer, end.texts)
        finally:
            interruption.wanted.set()
            thread.join()
        if failures:
            raise failures[0]
