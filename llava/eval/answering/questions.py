"""Reading question files: JSON lines with `question_id`, `text` and optionally `image`, `category`, `label`.

Corresponds to the question reading and the chunk helpers of upstream `llava/eval/model_vqa_loader.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llava.data.image_names import image_names
from llava.errors import BadSampleError, FlagError
from llava.runtime.files import data_bytes

T = TypeVar("T")

DEFAULT_CATEGORY = "default"
"""Category of a row that names none; the published question files write the same word."""


class MissingChunkError(FlagError, IndexError):
    """`--chunk-idx` names a chunk that the list of questions is too short to have."""


@dataclass(frozen=True)
class Question:
    """One row of a question file.

    Attributes:
        question_id: as written in the file; not necessarily unique (TextVQA uses the image's id).
        text: the question without any image marker.
        images: file names inside the image folder, in the order in which they are shown; empty for a text-only row.
        category: for scoring; `DEFAULT_CATEGORY` if the row has none.
        label: the right answer, or None if the row has none.
        where: `file:line`, for error messages.
    """

    question_id: int | str
    text: str
    images: tuple[str, ...]
    category: str
    label: str | None
    where: str


def read_jsonl(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file as `(file:line, object)`; blank lines are skipped.

    Raises:
        BadSampleError: the file is missing, or a line is not a JSON object; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise BadSampleError(f"{path}: no such file")
    rows = []
    for number, line in enumerate(data_bytes(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise BadSampleError(f"{where}: not valid JSON ({error}); mend or remove the line") from error
        if not isinstance(row, dict):
            raise BadSampleError(f"{where}: expected a JSON object, found {type(row).__name__}")
        rows.append((where, row))
    return rows


def read_json(path: str | Path, kind: type[T]) -> T:
    """The content of a JSON file.

    Args:
        path: the file.
        kind: `dict` or `list`: what it must hold.

    Raises:
        BadSampleError: the file is missing, no JSON, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise BadSampleError(f"{path}: no such file")
    raw = data_bytes(path)
    try:
        content = json.loads(raw)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise BadSampleError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, kind):
        raise BadSampleError(f"{path}: expected a JSON {kind.__name__}, found {type(content).__name__}")
    return content


def field(row: dict[str, Any], key: str, kinds: tuple[type, ...], where: str) -> Any:
    """The value of a required key.

    Raises:
        BadSampleError: the key is missing or its value is of none of `kinds`; names the row and the keys it has.
    """
    if key not in row:
        raise BadSampleError(f"{where}: the row has no '{key}'; its keys are {sorted(row)}")
    value = row[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise BadSampleError(f"{where}: '{key}' must be {names}, found {value!r}")
    return value


def read_questions(path: str | Path) -> list[Question]:
    """All rows of a question file, in file order.

    Raises:
        BadSampleError: the file is missing or empty, or a row is not as described in `Question`; names file and line.
    """
    questions = [_question(row, where) for where, row in read_jsonl(path)]
    if not questions:
        raise BadSampleError(f"{path}: the question file holds no rows")
    return questions


def _question(row: dict[str, Any], where: str) -> Question:
    label = None
    if row.get("label") is not None:
        label = str(field(row, "label", (str, int, float, bool), where))
    return Question(
        question_id=field(row, "question_id", (int, str), where),
        text=field(row, "text", (str,), where),
        images=images_of(row, where),
        category=str(row.get("category") or DEFAULT_CATEGORY),
        label=label,
        where=where,
    )


def images_of(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Names of the images of a row, by the keys that training reads (`llava/data/image_names.py`).

    Raises:
        BadSampleError: as `image_names`; the message names the row.
    """
    try:
        return tuple(image_names(row))
    except BadSampleError as error:
        raise BadSampleError(f"{where}: {error}") from error


def split_list(items: Sequence[T], num_chunks: int) -> list[Sequence[T]]:
    """Cut into consecutive chunks of `ceil(len(items) / num_chunks)` items; there may be fewer than `num_chunks`.

    Raises:
        FlagError: `num_chunks` is below 1, or there are no items.
    """
    if num_chunks < 1:
        raise FlagError(f"--num-chunks {num_chunks}: must be at least 1")
    if not items:
        raise FlagError(f"nothing to split into {num_chunks} chunk(s): the list of questions is empty")
    size = math.ceil(len(items) / num_chunks)
    return [items[start : start + size] for start in range(0, len(items), size)]


def get_chunk(items: Sequence[T], num_chunks: int, chunk_idx: int) -> Sequence[T]:
    """Chunk `chunk_idx` (from 0) of `split_list(items, num_chunks)`.

    Raises:
        FlagError: as `split_list`, or `chunk_idx` is not in `[0, num_chunks)`.
        MissingChunkError: rounding the size up left fewer chunks than asked for (5 items in 4: 3 chunks of 2, 2, 1).
    """
    chunks = split_list(items, num_chunks)
    if not 0 <= chunk_idx < num_chunks:
        raise FlagError(f"--chunk-idx {chunk_idx}: must be between 0 and --num-chunks - 1 = {num_chunks - 1}")
    if chunk_idx >= len(chunks):
        raise MissingChunkError(
            f"--chunk-idx {chunk_idx}: {len(items)} questions in chunks of {len(chunks[0])} make only {len(chunks)} of "
            f"the {num_chunks} chunks; use --num-chunks {len(chunks)}"
        )
    return chunks[chunk_idx]
