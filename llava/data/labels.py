"""Turns of a conversation as token ids and labels.

The prompt is built as pieces that are known to be trained on or not (`llava/conversation.py`) and tokenized once; a
token is a target if its characters belong to a trained piece. Upstream (`preprocess` in `llava/train/train.py`)
tokenizes parts again and compares lengths, and drops a conversation without error where they disagree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import TAGGED_IMAGE, Conversation, Piece, SeparatorStyle
from llava.errors import BadSampleError, FlagError
from llava.extension import Span
from llava.tokenizer import encode_with_spans, starts_with_bos

SPEAKERS = ("human", "gpt")
"""Values of `from` in a data file, in the order in which they take turns."""

Turn = Mapping[str, Any]
"""`{"from": "human" | "gpt", "value": text}`."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """A tokenized conversation.

    Attributes:
        input_ids: int64 (T,); each image is one `IMAGE_TOKEN_INDEX`.
        labels: int64 (T,); the id where it is a target, else `IGNORE_INDEX`, also at images.
        prompt: the text that was tokenized.
    """

    input_ids: Tensor
    labels: Tensor
    prompt: str


def tokenize_conversation(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    template: Conversation,
    *,
    image_count: int,
    mm_use_im_start_end: bool = False,
    max_length: int | None = None,
    patches_per_image: int = 1,
) -> TokenizedPrompt:
    """Tokenize a conversation and mark what is trained on.

    Args:
        turns: turns in the order of the data file.
        tokenizer: see `load_tokenizer`.
        template: template without messages.
        image_count: number of images of the sample; with 0 `<image>` is a word like any other.
        mm_use_im_start_end: write `<im_start>` and `<im_end>` around each image.
        max_length: longest sample in tokens. One without image is cut here; one with images is cut later, by the
            collator and once more when each image has become `patches_per_image` embeddings.
        patches_per_image: embeddings per image.

    Raises:
        BadSampleError: the turns are malformed or do not alternate, the number of `<image>` differs from the number
            of images, a token lies across the border of an answer, or no target lies within `max_length`.
        FlagError: the template is for inference only.
    """
    texts = [_text(turn, number) for number, turn in enumerate(turns)]
    if image_count:
        texts = [place_image(text, image_count, template, mm_use_im_start_end) for text in texts]
    pieces = _training_pieces([turn["from"] for turn in turns], texts, template)
    prompt = "".join(piece.text for piece in pieces)
    has_images = image_count > 0 or template.sep_style is SeparatorStyle.PLAIN
    found = prompt.count(DEFAULT_IMAGE_TOKEN) if has_images else 0
    if found != image_count:
        raise BadSampleError(
            f"{found} {DEFAULT_IMAGE_TOKEN} in the text but {image_count} image(s) in the sample; write one "
            f"{DEFAULT_IMAGE_TOKEN} for each image. The prompt is: {_excerpt(prompt, prompt.find(DEFAULT_IMAGE_TOKEN))}"
        )
    ids, spans = _encode(prompt, tokenizer, has_images)
    labels = _labels(ids, spans, pieces, prompt)
    _check_target(ids, labels, prompt, max_length, patches_per_image)
    end = None if has_images else max_length
    return TokenizedPrompt(torch.tensor(ids[:end]), torch.tensor(labels[:end]), prompt)


def place_image(text: str, image_count: int, template: Conversation, mm_use_im_start_end: bool) -> str:
    """Write the images of one turn as the template wants them (upstream `preprocess_multimodal`).

    A sample with one image gets it in front of the turn, however often and wherever the turn says `<image>`; the
    images of a sample with several stay where they stand.
    """
    if DEFAULT_IMAGE_TOKEN not in text:
        return text
    if image_count == 1:
        text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
    if template.uses_image_tags:
        text = text.replace(DEFAULT_IMAGE_TOKEN, TAGGED_IMAGE)
    if mm_use_im_start_end:
        wrapped = f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}"
        text = text.replace(DEFAULT_IMAGE_TOKEN, wrapped)
    return text


def _text(turn: Turn, number: int) -> str:
    """The text of a turn whose form was checked."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise BadSampleError(f'turn {number} is not {{"from": ..., "value": <text>}}: {turn!r}')
    if turn.get("from") not in SPEAKERS:
        raise BadSampleError(f"turn {number} is from {turn.get('from')!r}; speakers are {' and '.join(SPEAKERS)}")
    text = turn["value"]
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadSampleError(f"turn {number} holds half a surrogate pair, which no tokenizer can spell: {text!r}")
    return text


def _training_pieces(speakers: list[str], texts: list[str], template: Conversation) -> list[Piece]:
    """The prompt of a whole conversation.

    Raises:
        BadSampleError: the speakers do not alternate, or the template cannot write these turns.
        FlagError: the template is for inference only.
    """
    if template.sep_style is SeparatorStyle.PLAIN:
        return _caption_pieces(speakers, texts, template)
    if template.sep_style is SeparatorStyle.SINGLE:
        raise FlagError("--version: templates of the Vicuna v0 family are for inference; train with v1 or plain")
    first = int(bool(speakers) and speakers[0] != SPEAKERS[0])  # a greeting of the assistant is left out
    conversation = template.copy()
    for position, (speaker, text) in enumerate(zip(speakers[first:], texts[first:], strict=True)):
        if speaker != SPEAKERS[position % 2]:
            raise BadSampleError(
                f"turn {first + position} is from {speaker!r} but {SPEAKERS[position % 2]!r} is due: "
                f"{_excerpt(text, 0)}; the speakers are {speakers}"
            )
        conversation.append_message(conversation.roles[position % 2], text)
    return conversation.pieces()


def _caption_pieces(speakers: list[str], texts: list[str], template: Conversation) -> list[Piece]:
    """Prompt of the first stage: the image and its caption; the words around `<image>` are left out."""
    if len(texts) != 2 or DEFAULT_IMAGE_TOKEN not in texts[0]:
        raise BadSampleError(
            f"the plain template wants two turns, an image and its caption; there are {len(texts)} turn(s), the first "
            f"with {texts[0].count(DEFAULT_IMAGE_TOKEN) if texts else 0} {DEFAULT_IMAGE_TOKEN}: {texts!r:.200}"
        )
    return [Piece(DEFAULT_IMAGE_TOKEN, False, 0), Piece(texts[1] + template.sep, True, 1)]


def _encode(prompt: str, tokenizer: PreTrainedTokenizerBase, has_images: bool) -> tuple[list[int], list[Span]]:
    """Ids of the prompt and the characters that each one covers; see `tokenizer_image_token` for those of an image."""
    ids, spans = ([tokenizer.bos_token_id], [Span(0, 0)]) if starts_with_bos(tokenizer) else ([], [])
    parts = re.split(f"({DEFAULT_IMAGE_TOKEN})", prompt) if has_images else [prompt]
    start = 0
    for part in parts:
        if has_images and part == DEFAULT_IMAGE_TOKEN:
            part_ids, part_spans = [IMAGE_TOKEN_INDEX], [Span(0, len(part))]
        else:
            part_ids, part_spans = encode_with_spans(tokenizer, part)
        ids += part_ids
        spans += [Span(start + span.start, start + span.end) for span in part_spans]
        start += len(part)
    return ids, spans


def _labels(ids: list[int], spans: list[Span], pieces: list[Piece], prompt: str) -> list[int]:
    """Label of each token: its id if its characters are trained on.

    A token without characters (a dummy prefix, the first bytes of a character) goes with the character that follows.
    """
    trained = [piece.trained for piece in pieces for _ in piece.text]
    labels = []
    for index, span in zip(ids, spans, strict=True):
        kinds = set(trained[span.start : max(span.end, span.start + 1)])
        if len(kinds) == 2:
            raise BadSampleError(
                f"the token {prompt[span.start : span.end]!r} lies across the border of an answer, so it can neither "
                f"be trained on nor left out: {_excerpt(prompt, span.start)}"
            )
        labels.append(index if kinds == {True} and index != IMAGE_TOKEN_INDEX else IGNORE_INDEX)
    return labels


def _check_target(
    ids: list[int], labels: list[int], prompt: str, max_length: int | None, patches_per_image: int
) -> None:
    """Refuse a sample without target, or one that is cut before its first target."""
    first = next((position for position, label in enumerate(labels) if label != IGNORE_INDEX), None)
    if first is None:
        raise BadSampleError(f"there is no answer to train on; the prompt is: {_excerpt(prompt, len(prompt))}")
    position = first + ids[:first].count(IMAGE_TOKEN_INDEX) * (patches_per_image - 1)
    if max_length is not None and position >= max_length:
        raise BadSampleError(
            f"the first answer begins at position {position}, but a sample is cut at {max_length} "
            f"(--model_max_length); the prompt is: {_excerpt(prompt, len(prompt))}"
        )


def _excerpt(prompt: str, position: int, width: int = 80) -> str:
    """The prompt around a position, quoted."""
    start, end = max(0, position - width), position + width
    return f"{'...' if start else ''}{prompt[start:end]!r}{'...' if end < len(prompt) else ''}"
