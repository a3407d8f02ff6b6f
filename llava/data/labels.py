"""Turns of a conversation as token ids and labels.

The prompt is built as pieces that are known to be trained on or not (`llava/conversation.py`) and tokenized once; a
token is a target if its characters belong to a trained piece. Upstream (`preprocess` in `llava/train/train.py`)
tokenizes parts again and compares lengths, and drops a conversation without error where they disagree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, Piece, SeparatorStyle
from llava.data.image_names import is_mark
from llava.data.turns import SPEAKERS, Turn, excerpt, place_image, training_pieces, turn_text
from llava.errors import ImageCountError, ImageCutError, NoTargetError, TokenBorderError
from llava.runtime.tokenizer import encode_with_spans, starts_with_bos
from llava.segments import Span


@dataclass(frozen=True)
class TokenizedPrompt:
    """A tokenized conversation.

    Attributes:
        input_ids: int64 (T,); each image is one `IMAGE_TOKEN_INDEX`.
        labels: int64 (T,); the id where it is a target, else `IGNORE_INDEX`, also at images.
        prompt: the text that was tokenized.
        spans: the characters of `prompt` that each token covers.
    """

    input_ids: Tensor
    labels: Tensor
    prompt: str
    spans: list[Span]


def tokenize_conversation(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    template: Conversation,
    *,
    image_count: int,
    mm_use_im_start_end: bool = False,
    max_length: int | None = None,
    patches_per_image: int | Sequence[int] = 1,
) -> TokenizedPrompt:
    """Tokenize a conversation and mark what is trained on.

    Args:
        turns: turns in the order of the data file.
        tokenizer: see `load_tokenizer`.
        template: template without messages.
        image_count: number of images of the sample; with 0 `<image>` is a word like any other, unless it stands where a
            mark does (`is_mark`).
        mm_use_im_start_end: write `<im_start>` and `<im_end>` around each image.
        max_length: longest sample in tokens. One without image is cut here; one with images is cut later, by the
            collator and once more when each image has become `patches_per_image` embeddings.
        patches_per_image: embeddings per image, or those of each image.

    Raises:
        BadSampleError: the turns are malformed or do not alternate, the number of `<image>` differs from the number
            of images, a token lies across the border of an answer, no target lies within `max_length`, or an image
            begins after it.
    """
    texts = [turn_text(turn, number) for number, turn in enumerate(turns)]
    if not image_count:
        refuse_blind_marks(turns, texts)
    else:
        texts = [place_image(text, image_count, template, mm_use_im_start_end) for text in texts]
    pieces = training_pieces([turn["from"] for turn in turns], texts, template)
    prompt = "".join(piece.text for piece in pieces)
    has_images = image_count > 0 or template.sep_style is SeparatorStyle.PLAIN
    found = prompt.count(DEFAULT_IMAGE_TOKEN) if has_images else 0
    if found != image_count:
        raise ImageCountError(
            f"{found} {DEFAULT_IMAGE_TOKEN} in the text but {image_count} image(s) in the sample; write one "
            f"{DEFAULT_IMAGE_TOKEN} for each image. The prompt is: {excerpt(prompt, prompt.find(DEFAULT_IMAGE_TOKEN))}"
        )
    ids, spans = _encode(prompt, tokenizer, has_images, not template.writes_bos)
    labels = _labels(ids, spans, pieces, prompt)
    _check_target(ids, labels, prompt, max_length, patches_per_image)
    if max_length is not None:
        refuse_cut_images(image_starts(ids, patches_per_image), max_length)
    end = None if has_images else max_length
    return TokenizedPrompt(torch.tensor(ids[:end]), torch.tensor(labels[:end]), prompt, spans[:end])


def refuse_blind_marks(turns: Sequence[Turn], texts: Sequence[str]) -> None:
    """Refuse marks in a row without image.

    Raises:
        ImageCountError: a turn of the user begins or ends with `<image>`.
    """
    for number, (turn, text) in enumerate(zip(turns, texts, strict=True)):
        if turn["from"] == SPEAKERS[0] and is_mark(text):
            raise ImageCountError(
                f"{text.count(DEFAULT_IMAGE_TOKEN)} {DEFAULT_IMAGE_TOKEN} in turn {number} but 0 image(s) in the "
                f"sample; name the image as 'image', or remove {DEFAULT_IMAGE_TOKEN}. The turn is: {excerpt(text, 0)}"
            )


def image_starts(ids: Sequence[int], patches_per_image: int | Sequence[int]) -> list[int]:
    """Position at which each image of a prompt begins, once every image has its full length.

    Args:
        ids: T token ids; each image is one `IMAGE_TOKEN_INDEX`.
        patches_per_image: embeddings per image, or those of each image.
    """
    marks = [position for position, index in enumerate(ids) if index == IMAGE_TOKEN_INDEX]
    lengths = [patches_per_image] * len(marks) if isinstance(patches_per_image, int) else list(patches_per_image)
    return [mark - number + sum(lengths[:number]) for number, mark in enumerate(marks)]


def refuse_cut_images(starts: Sequence[int], max_length: int) -> None:
    """Refuse a sample that ends before one of its images begins.

    Raises:
        ImageCutError: it does; the message says which image.
    """
    for number, start in enumerate(starts, start=1):
        if start >= max_length:
            raise ImageCutError(
                f"image {number} of {len(starts)} begins at position {start}, but a sample is cut at {max_length} "
                "(--model_max_length), so it would be cut off"
            )


def _encode(
    prompt: str, tokenizer: PreTrainedTokenizerBase, has_images: bool, add_bos: bool
) -> tuple[list[int], list[Span]]:
    """Ids of the prompt and the characters that each one covers; see `tokenizer_image_token` for those of an image."""
    ids, spans = ([tokenizer.bos_token_id], [Span(0, 0)]) if add_bos and starts_with_bos(tokenizer) else ([], [])
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
            raise TokenBorderError(
                f"the token {prompt[span.start : span.end]!r} lies across the border of an answer, so it can neither "
                f"be trained on nor left out; add the markers of the template to the tokenizer as special tokens: "
                f"{excerpt(prompt, span.start)}"
            )
        labels.append(index if kinds == {True} and index != IMAGE_TOKEN_INDEX else IGNORE_INDEX)
    return labels


def _check_target(
    ids: list[int], labels: list[int], prompt: str, max_length: int | None, patches_per_image: int | Sequence[int]
) -> None:
    """Refuse a sample without target, or one that is cut before its first target."""
    first = next((position for position, label in enumerate(labels) if label != IGNORE_INDEX), None)
    if first is None:
        raise NoTargetError(f"there is no answer to train on; the prompt is: {excerpt(prompt, len(prompt))}")
    images = ids[:first].count(IMAGE_TOKEN_INDEX)
    lengths = [patches_per_image] * images if isinstance(patches_per_image, int) else patches_per_image[:images]
    position = first - images + sum(lengths)
    if max_length is not None and position >= max_length:
        raise NoTargetError(
            f"the first answer begins at position {position}, but a sample is cut at {max_length} "
            f"(--model_max_length); the prompt is: {excerpt(prompt, len(prompt))}"
        )
