"""Instruction records as token ids and labels (`HydraLoRA/build_dataset.py` of the original).

A record has `instruction`, `input` (may be empty or null), `output` and, for statistics only, `task_type`. The model
sees instruction, line break and input, the end-of-sequence token, and learns the output and one more of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.errors import BadSampleError
from llava.runtime.files import data_text

IGNORED = -100


class Example(NamedTuple):
    """One record, tokenized.

    Attributes:
        input_ids: at most `max_seq_length` ids.
        source_length: how many of them are the source and not trained on.
        task: the record's `task_type`, -1 without one.
    """

    input_ids: list[int]
    source_length: int
    task: int

    @property
    def labels(self) -> list[int]:
        """The ids, with -100 in place of the source."""
        return [IGNORED] * self.source_length + self.input_ids[self.source_length :]


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON file.

    Raises:
        BadSampleError: the file is no JSON list of objects, or a record lacks a field or has one of another type; the
            message names file and row.
    """
    text = data_text(path)
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise BadSampleError(f"{path}: is no valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise BadSampleError(f"{path}: holds a {type(rows).__name__}, expected a list of records")
    for number, row in enumerate(rows):
        problem = _problem(row)
        if problem:
            raise BadSampleError(f"{path}, row {number}: {problem}")
    return rows


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}, expected an object with instruction, input and output"
    for name in ("instruction", "output"):
        if not isinstance(row.get(name), str):
            return f"'{name}' is {row.get(name)!r:.60}, expected text"
    if not isinstance(row.get("input"), str | None):
        return f"'input' is {row['input']!r:.60}, expected text or null"
    if not isinstance(row.get("task_type", 0), int):
        return f"'task_type' is {row['task_type']!r:.60}, expected a number"
    return None


def source_and_target(record: Mapping[str, Any], end: str) -> tuple[str, str]:
    """The two texts of a record; `end` is the end-of-sequence token as text, for example `</s>`."""
    asked = record["instruction"]
    if record.get("input"):
        asked += f"\n{record['input']}"
    return asked + end, record["output"] + end


def tokenize(records: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int) -> list[Example]:
    """Tokenize records: the source with the tokenizer's first token (`<s>`), the target without; then cut.

    Raises:
        BadSampleError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token is None:
        raise BadSampleError(f"{tokenizer.name_or_path}: this tokenizer has no end-of-sequence token to end answers by")
    if not records:
        return []
    texts = [source_and_target(record, tokenizer.eos_token) for record in records]
    sources = tokenizer([source for source, _ in texts])["input_ids"]
    targets = tokenizer([target for _, target in texts], add_special_tokens=False)["input_ids"]
    return [
        Example((source + target)[:max_length], min(len(source), max_length), record.get("task_type", -1))
        for source, target, record in zip(sources, targets, records, strict=True)
    ]
