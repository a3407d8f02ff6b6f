"""Turns of a conversation as token ids and labels.

The prompt is built as pieces that are known to be trained on or not (`llava/conversation.py`) and tokenized once; a
token is a target if its characters belong to a trained piece. Upstream (`preprocess` in `llava/train/train.py`)
tokenizes parts again and compares lengths, and drops a conversation without error where they disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, Piece, SeparatorStyle
from llava.data.image_names import is_mark
from llava.data.turns import SPEAKERS, Turn, excerpt, place_image, training_pieces, turn_text
from llava.errors import ImageCountError, ImageCutError, NoTargetError, TokenBorderError
from llava.runtime.tokenizer import encode_covered, starts_with_bos
from llava.segments import Span


@dataclass(frozen=True)
class TokenizedPrompt:
    """A tokenized conversation.

    Attributes:
        input_ids: int64 (T,); each image is one `IMAGE_TOKEN_INDEX`.
        labels: int64 (T,); the id where it is a target, else `IGNORE_INDEX`, also at images.
        prompt: the text that was tokenized.
        covered: int64 (T, 2), the characters of `prompt` that each token covers, `[start, end)`.
    """

    input_ids: Tensor
    labels: Tensor
    prompt: str
    covered: Tensor

    @property
    def spans(self) -> list[Span]:
        """The characters of `prompt` that each token covers."""
        return [Span(*bounds) for bounds in self.covered.tolist()]


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
    ids, covered = _encode(prompt, tokenizer, has_images, not template.writes_bos)
    labels = _labels(ids, covered, pieces, prompt)
    _check_target(ids, labels, prompt, max_length, patches_per_image)
    if max_length is not None:
        refuse_cut_images(image_starts(ids, patches_per_image), max_length)
    end = None if has_images else max_length
    cut_ids, cut_labels, cut_covered = (torch.from_numpy(each[:end]) for each in (ids, labels, covered))
    return TokenizedPrompt(cut_ids, cut_labels, prompt, cut_covered)


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


def image_starts(ids: Sequence[int] | np.ndarray | Tensor, patches_per_image: int | Sequence[int]) -> list[int]:
    """Position at which each image of a prompt begins, once every image has its full length.

    Args:
        ids: T token ids; each image is one `IMAGE_TOKEN_INDEX`.
        patches_per_image: embeddings per image, or those of each image.
    """
    marks = np.flatnonzero(np.asarray(ids) == IMAGE_TOKEN_INDEX).tolist()
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
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the prompt, int64 (T,), and the characters that each one covers, int64 (T, 2).

    See `tokenizer_image_token` for the ids of a prompt with images.
    """
    texts = prompt.split(DEFAULT_IMAGE_TOKEN) if has_images else [prompt]
    begins = [tokenizer.bos_token_id] if add_bos and starts_with_bos(tokenizer) else []
    ids, covered = [np.array(begins, np.int64)], [np.zeros((len(begins), 2), np.int64)]
    start = 0
    for number, (text, part) in enumerate(zip(texts, encode_covered(tokenizer, texts), strict=True)):
        if number > 0:
            ids.append(np.array([IMAGE_TOKEN_INDEX]))
            covered.append(np.array([[start, start + len(DEFAULT_IMAGE_TOKEN)]]))
            start += len(DEFAULT_IMAGE_TOKEN)
        ids.append(np.array(part.ids, np.int64))
        bounds = np.fromiter(chain.from_iterable(part.spans), np.int64, 2 * len(part.spans))
        covered.append(bounds.reshape(-1, 2) + start)
        start += len(text)
    return np.concatenate(ids), np.concatenate(covered)


def _labels(ids: np.ndarray, covered: np.ndarray, pieces: list[Piece], prompt: str) -> np.ndarray:
    """Label of each token, int64 (T,): its id if its characters are trained on.

    A token without characters (a dummy prefix, the first bytes of a character) goes with the character that follows.
    """
    trained = np.repeat([piece.trained for piece in pieces], [len(piece.text) for piece in pieces])
    trained_before = np.concatenate([[0], np.cumsum(trained)])
    starts = np.minimum(covered[:, 0], len(prompt))
    ends = np.minimum(np.maximum(covered[:, 1], starts + 1), len(prompt))
    inside = trained_before[ends] - trained_before[starts]
    mixed = np.flatnonzero((inside > 0) & (inside < ends - starts))
    if len(mixed):
        start, end = covered[mixed[0]].tolist()
        raise TokenBorderError(
            f"the token {prompt[start:end]!r} lies across the border of an answer, so it can neither "
            f"be trained on nor left out; add the markers of the template to the tokenizer as special tokens: "
            f"{excerpt(prompt, start)}"
        )
    return np.where((inside > 0) & (ids != IMAGE_TOKEN_INDEX), ids, IGNORE_INDEX)


def _check_target(
    ids: np.ndarray, labels: np.ndarray, prompt: str, max_length: int | None, patches_per_image: int | Sequence[int]
) -> None:
    """Refuse a sample without target, or one that is cut before its first target."""
    targets = np.flatnonzero(labels != IGNORE_INDEX)
    first = int(targets[0]) if len(targets) else None
    if first is None:
        raise NoTargetError(f"there is no answer to train on; the prompt is: {excerpt(prompt, len(prompt))}")
    images = int((ids[:first] == IMAGE_TOKEN_INDEX).sum())
    lengths = [patches_per_image] * images if isinstance(patches_per_image, int) else patches_per_image[:images]
    position = first - images + sum(lengths)
    if max_length is not None and position >= max_length:
        raise NoTargetError(
            f"the first answer begins at position {position}, but a sample is cut at {max_length} "
            f"(--model_max_length); the prompt is: {excerpt(prompt, len(prompt))}"
        )
