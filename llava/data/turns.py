"""The turns of a data file as the pieces of a prompt, each known to be trained on or not.

Corresponds to the text half of the `preprocess_*` functions in upstream's `llava/train/train.py`; token ids and labels
follow in `llava/data/labels.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import SYSTEM_TURN, TAGGED_IMAGE, Conversation, Piece, SeparatorStyle
from llava.errors import BadSampleError

SPEAKERS = ("human", "gpt")
"""Values of `from` in a data file, in the order in which they take turns."""

Turn = Mapping[str, Any]
"""`{"from": "human" | "gpt", "value": text}`."""


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


def turn_text(turn: Turn, number: int) -> str:
    """The text of a turn whose form was checked."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise BadSampleError(f'turn {number} is not {{"from": ..., "value": <text>}}: {turn!r}')
    if turn.get("from") not in SPEAKERS:
        raise BadSampleError(f"turn {number} is from {turn.get('from')!r}; speakers are {' and '.join(SPEAKERS)}")
    text = turn["value"]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError(
            f"turn {number} holds half a surrogate pair, which no tokenizer can spell: {text!r}"
        ) from error
    return text


def training_pieces(speakers: list[str], texts: list[str], template: Conversation) -> list[Piece]:
    """The prompt of a whole conversation.

    Raises:
        BadSampleError: the speakers do not alternate, or the template cannot write these turns.
    """
    if template.sep_style is SeparatorStyle.PLAIN:
        return _caption_pieces(speakers, texts, template)
    if template.sep_style is SeparatorStyle.SINGLE:
        return _headed_pieces(speakers, texts, template)
    first = int(bool(speakers) and speakers[0] != SPEAKERS[0])  # a greeting of the assistant is left out
    conversation = template.copy()
    for position, (speaker, text) in enumerate(zip(speakers[first:], texts[first:], strict=True)):
        if speaker != SPEAKERS[position % 2]:
            raise BadSampleError(
                f"turn {first + position} is from {speaker!r} but {SPEAKERS[position % 2]!r} is due: "
                f"{excerpt(text, 0)}; the speakers are {speakers}"
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


def _headed_pieces(speakers: list[str], texts: list[str], template: Conversation) -> list[Piece]:
    """Prompt of the Vicuna v0 family: each turn on lines of its own under `### Name:`, in any order of speakers.

    This is the form that the original trains on, although the prompts of this family are written without the blanks
    and line feeds. The separator that follows an answer is trained, for it is where the model has to stop.
    """
    pieces = [Piece(f"{template.system}\n\n{template.sep}", False, SYSTEM_TURN)]
    for turn, (speaker, text) in enumerate(zip(speakers, texts, strict=True)):
        index = SPEAKERS.index(speaker)
        pieces.append(Piece(f" {template.roles[index]}:", False, turn))
        pieces.append(Piece(f" {text}\n{template.sep}", index == 1 and bool(text), turn))
    pieces.append(Piece(" ", False, len(texts)))
    return pieces


def excerpt(prompt: str, position: int, width: int = 80) -> str:
    """The prompt around a position, quoted."""
    start, end = max(0, position - width), position + width
    return f"{'...' if start else ''}{prompt[start:end]!r}{'...' if end < len(prompt) else ''}"
