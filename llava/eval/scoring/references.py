"""Reading conversations with reference answers, on which long answers are measured.

The file is a JSON list in LLaVA's training format (`id`, `image`, `conversations` of `human` and `gpt` turns), as the
LVIS evaluations of Dynamic-LLaVA read it (upstream `dynamic_eval/model_lvis_for_ppl.py` and its siblings).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import BadSampleError
from llava.eval.answering.questions import images_of
from llava.runtime.files import data_text


@dataclass(frozen=True)
class Turn:
    """A question and the answer that a model's is compared with."""

    question: str
    reference: str


@dataclass(frozen=True)
class ReferenceConversation:
    """One row.

    Attributes:
        question_id: the row's `id`, or its index if it has none.
        images: file names inside the image folder.
        turns: at least one.
        where: `file: row i`, for error messages.
    """

    question_id: int | str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    where: str


def read_conversations(path: str | Path) -> list[ReferenceConversation]:
    """All rows of a file, in file order.

    Raises:
        BadSampleError: the file is missing, empty or not a JSON list, or a row is not as described; names file and row.
    """
    path = Path(path)
    if not path.is_file():
        raise BadSampleError(f"{path}: no such file")
    text = data_text(path)
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise BadSampleError(f"{path}: not valid JSON ({error}); expected a list of conversations") from error
    if not isinstance(rows, list) or not rows:
        raise BadSampleError(f"{path}: expected a JSON list of at least one conversation, found {type(rows).__name__}")
    return [_conversation(row, index, f"{path}: row {index}") for index, row in enumerate(rows)]


def _conversation(row: Any, index: int, where: str) -> ReferenceConversation:
    """One row, checked."""
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise BadSampleError(f"{where}: expected an object with a list 'conversations'")
    turns = row["conversations"]
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise BadSampleError(f"{where}: 'conversations' must alternate human, gpt, ...; found {speakers}")
    texts = [turn.get("value") for turn in turns]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadSampleError(f"{where}: a turn has no text in 'value'")
    images = images_of(row, where)
    # The marker is put where the program wants it, whatever place the file gives it.
    plain = [text.replace(DEFAULT_IMAGE_TOKEN, "").strip() for text in texts]
    pairs = tuple(Turn(question, reference) for question, reference in zip(plain[::2], plain[1::2], strict=True))
    return ReferenceConversation(row.get("id", index), images, pairs, where)
