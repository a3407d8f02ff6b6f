"""Instruction records as token ids and labels (`HydraLoRA/build_dataset.py` of the original).

A record has `instruction`, `input` (may be empty or null), `output` and, for statistics only, `task_type`. The model
sees instruction, line break and input, the end-of-sequence token, and learns the output and one more of it. A record
may have `messages` instead, which the chat template writes (`messages.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from hydralora.text.messages import asked, conversation, encode, messages_problem, renderer
from hydralora.tuner.batch import IGNORED
from llava.errors import BadSampleError
from llava.runtime.files import data_text

NO_TASK = -1


class Example(NamedTuple):
    """One record, tokenized.

    Attributes:
        input_ids: at most `max_seq_length` ids.
        source_length: how many of them are the source and not trained on.
        task: the record's `task_type`, a number or a text; -1 without one.
        asked_later: from and to of the ids behind the source that are not trained on either: later questions.
    """

    input_ids: list[int]
    source_length: int
    task: int | str = NO_TASK
    asked_later: tuple[tuple[int, int], ...] = ()

    @property
    def labels(self) -> list[int]:
        """The ids, with -100 in place of all that is not trained on."""
        labels = [IGNORED] * self.source_length + self.input_ids[self.source_length :]
        for start, end in self.asked_later:
            labels[start:end] = [IGNORED] * (end - start)
        return labels

    @property
    def has_target(self) -> bool:
        """Something is left of the answer: a token that the model predicts from those before it."""
        asked = sum(end - start for start, end in self.asked_later)
        return len(self.input_ids) > max(self.source_length, 1) + asked


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON list, or of a file with one record in each line (`.jsonl`).

    Raises:
        BadSampleError: the file holds something else, or a record lacks a field or has one of another type; the
            message names file and row.
    """
    text = data_text(path)
    rows = _lines(text, path) if path.suffix == ".jsonl" else _list(text, path)
    for number, row in enumerate(rows):
        problem = _problem(row) or _unspellable(row)
        if problem:
            raise BadSampleError(f"{path}, row {number}: {problem}")
    return rows


def _list(text: str, path: Path) -> list[Any]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise BadSampleError(f"{path}: is no valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise BadSampleError(f"{path}: holds a {type(rows).__name__}, expected a list of records")
    return rows


def _lines(text: str, path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise BadSampleError(f"{path}, line {number}: is no valid JSON ({error})") from error
    return rows


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}, expected an object with instruction, input and output"
    task = row.get("task_type")
    if task is not None and (isinstance(task, bool) or not isinstance(task, int | str)):
        return f"'task_type' is {task!r:.60}, expected a number, text or null"
    if "messages" in row:
        return messages_problem(row["messages"])
    for name in ("instruction", "output"):
        if not isinstance(row.get(name), str):
            return f"'{name}' is {row.get(name)!r:.60}, expected text"
    if not isinstance(row.get("input"), str | None):
        return f"'input' is {row['input']!r:.60}, expected text or null"
    return None


def _unspellable(row: Mapping[str, Any]) -> str | None:
    for message in conversation(row):
        if any("\ud800" <= character <= "\udfff" for character in message["content"]):
            return f"holds half a surrogate pair, which no tokenizer can spell: {message['content']!r:.60}"
    return None


def task_of(record: Mapping[str, Any]) -> int | str:
    """The task of a record; an empty text and null are none."""
    task = record.get("task_type")
    return NO_TASK if task is None or task == "" else task


def source_and_target(record: Mapping[str, Any], end: str) -> tuple[str, str]:
    """The two texts of a record; `end` is the end-of-sequence token as text, for example `</s>`."""
    return asked(record) + end, record["output"] + end


def tokenize(
    records: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int, chat: bool = False
) -> list[Example]:
    """Tokenize records, and cut them.

    Instructions: the source with the tokenizer's first token (`<s>`), the target without. `messages`: by the
    tokenizer's chat template.

    Args:
        records: checked by `read_samples`.
        tokenizer: of the model.
        max_length: longest sequence in tokens.
        chat: instructions by the chat template too.

    Raises:
        BadSampleError: the tokenizer has no end-of-sequence token, or its chat template does not take a record.
        FlagError: it has no chat template.
    """
    examples: list[Example] = []
    for by_template, group in groupby(records, lambda record: chat or "messages" in record):
        rows = list(group)
        examples += _of_chats(rows, tokenizer, max_length) if by_template else _of_texts(rows, tokenizer, max_length)
    return examples


def _of_texts(records: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int) -> list[Example]:
    if tokenizer.eos_token is None:
        raise BadSampleError(f"{tokenizer.name_or_path}: this tokenizer has no end-of-sequence token to end answers by")
    texts = [source_and_target(record, tokenizer.eos_token) for record in records]
    sources = tokenizer([source for source, _ in texts])["input_ids"]
    targets = tokenizer([target for _, target in texts], add_special_tokens=False)["input_ids"]
    return [
        Example((source + target)[:max_length], min(len(source), max_length), task_of(record))
        for source, target, record in zip(sources, targets, records, strict=True)
    ]


def _of_chats(records: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int) -> list[Example]:
    chat, examples = renderer(tokenizer), []
    for record in records:
        ids, trained = encode(conversation(record), chat, tokenizer)
        ids, trained = ids[:max_length], trained[:max_length]
        source = trained.index(True) if True in trained else len(ids)
        places = [
            (is_answer, list(group)) for is_answer, group in groupby(range(source, len(ids)), trained.__getitem__)
        ]
        later = tuple((group[0], group[-1] + 1) for is_answer, group in places if not is_answer)
        examples.append(Example(ids, source, task_of(record), later))
    return examples
