"""The answers file: appended batch by batch, continued after an interruption, in question order at the end.

Rows are those of upstream `model_vqa_loader.py`. Beside the file lies `<answers file>.run.json`: the settings that
decide the answers, so that answers of another model or other options are never continued by mistake.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError, FlagError
from llava.eval.answering.recognition import (
    ANSWER_SHAPES,
    Shape,
    check_writable,
    recognize_rows,
    refuse_unless_rows,
    repair,
)
from llava.runtime.output import replace_text
from llava.runtime.program import package_versions
from llava.runtime.recognize import describe, is_plain_file

Row = dict[str, Any]

IDENTITY = ("question_id", "round_id", "prompt")
"""The keys that tell which question an answer belongs to. The id alone does not: TextVQA's is that of the image."""

QBENCH_IDENTITY = ("img_path", "question")
"""The same in the rows of Q-Bench, which have no id."""


@dataclass(frozen=True)
class Task:
    """One question to be answered.

    Attributes:
        question_id: copied into the answer row.
        question: what the user says, without image markers; the runner adds them.
        prompt: what the answer row shows as the prompt; not necessarily all of `question`.
        images: what the runner's `open_image` needs to open each image; empty for a text-only question.
        where: `file:line` of the question, for error messages.
        extra: what the answer row of a benchmark shows besides; not part of the prompt.
    """

    question_id: int | str
    question: str
    prompt: str
    images: tuple[str, ...]
    where: str
    extra: Mapping[str, Any] = field(default_factory=dict)


ToRow = Callable[[Task, str, str], Row]
"""From task, answer text and model id to the row that is written."""


def answer_row(task: Task, text: str, model_id: str) -> Row:
    """The row of upstream's programs.

    `answer_id` follows from the content, where upstream draws it at random: equal runs write equal files.
    """
    content = json.dumps([model_id, task.where.rpartition(":")[2], task.question_id, task.prompt, text])
    return {
        "question_id": task.question_id,
        "prompt": task.prompt,
        "text": text,
        "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, content).hex,
        "model_id": model_id,
        "metadata": {},
    }


def row_keys(rows: Iterable[Row]) -> list[str]:
    """A key for each row: its identity and, for the n-th row of the same identity, n."""
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        identity = json.dumps([row.get(key) for key in IDENTITY] + [row[key] for key in QBENCH_IDENTITY if key in row])
        keys.append(f"{identity}#{seen[identity]}")
        seen[identity] += 1
    return keys


def shapes_of(tasks: Iterable[Task], to_row: ToRow) -> tuple[Shape, ...]:
    """The rows that a program writes, which it may find in its answers file and continue."""
    return tuple(dict.fromkeys(tuple(to_row(task, "", "")) for task in tasks)) or ANSWER_SHAPES


def refuse_foreign_answers(path: Path, shapes: Collection[Shape] | None = None) -> None:
    """Raise if an answers file that is going to be replaced, or its settings, are something else; nothing is changed.

    Raises:
        FlagError: see `recognize_rows` and `stored_settings`.
    """
    refuse_unless_rows(path, ANSWER_SHAPES if shapes is None else shapes)
    stored_settings(path)


def settings_path(path: Path) -> Path:
    """Where the settings of the run that wrote an answers file are kept."""
    return path.with_name(f"{path.name}.run.json")


def stored_settings(path: Path) -> Row | None:
    """The settings next to an answers file; None if there are none.

    Raises:
        FlagError: the file of that name holds something else.
    """
    file = settings_path(path)
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8")) if is_plain_file(file) else None
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise FlagError(
            f"{file}: does not hold the settings of a run: it looks like {describe(file)}, and this is where the "
            f"settings of {path.name} are kept. It is left as it is; name another --answers-file, or move it away"
        )
    return dict(record["settings"])


def refuse_other_settings(path: Path, settings: Row, shapes: Collection[Shape] | None = None) -> None:
    """Compare the settings next to an answers file, if there are any, with those of this run.

    Args:
        path: the answers file.
        settings: of this run.
        shapes: rows that the file may hold; None: those of any program.

    Raises:
        FlagError: they differ, or one of the two files holds something else.
    """
    refuse_foreign_answers(path, shapes)
    before = stored_settings(path)
    if before is None or not path.exists() or not path.stat().st_size:
        return
    settings = json.loads(json.dumps(settings))
    changed = sorted(name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name))
    if changed:
        differences = ", ".join(f"{name}: {before.get(name)} then, {settings.get(name)} now" for name in changed)
        raise FlagError(
            f"{path} holds answers made with other settings ({differences}); name another --answers-file, or replace "
            f"this one with --restart"
        )


class AnswersFile:
    """The answers to a list of tasks in one file.

    Args:
        path: the answers file; its folder is made if needed.
        tasks: all tasks, in the order that the finished file will have.
        model_id: goes into each row.
        settings: JSON values that decide the answers; compared with those of the interrupted run.
        arguments: JSON values that are written beside the settings and compared with nothing.
        to_row: makes the row of an answer.
        restart: start again even if there are answers.

    Raises:
        FlagError: the file there was made by another model or with other settings.
        BadSampleError: two tasks cannot be told apart, or the file there holds a broken row or an answer to none of
            the tasks.
    """

    def __init__(
        self,
        path: str | Path,
        tasks: Sequence[Task],
        *,
        model_id: str,
        settings: dict[str, Any],
        arguments: dict[str, Any] | None = None,
        to_row: ToRow = answer_row,
        restart: bool = False,
    ) -> None:
        self.path = Path(path)
        self.model_id = model_id
        self.to_row = to_row
        self.settings = json.loads(json.dumps(settings))
        self.keys = dict(zip(row_keys(to_row(task, "", model_id) for task in tasks), tasks, strict=True))
        self.rows: dict[str, Row] = {}
        _refuse_ambiguous(self.keys)
        self.shapes = shapes_of(tasks, to_row)
        check_writable(self.path)
        if restart:  # of whatever model and settings the answers there are, they must be answers
            refuse_foreign_answers(self.path, (*ANSWER_SHAPES, *self.shapes))
            self.path.write_bytes(b"")
        else:
            self._resume()
            self.path.touch()
        record = {"settings": self.settings, "arguments": arguments or {}, "versions": package_versions()}
        replace_text(self.settings_path, json.dumps(record, indent=2) + "\n", check=False)

    @property
    def settings_path(self) -> Path:
        """Where the settings of the run are kept."""
        return settings_path(self.path)

    @property
    def pending(self) -> dict[str, Task]:
        """The tasks without an answer, by key, in question order."""
        return {key: task for key, task in self.keys.items() if key not in self.rows}

    def append(self, texts: dict[str, str]) -> None:
        """Write the answers of one batch, given by key, as whole lines."""
        rows = {key: self.to_row(self.keys[key], text, self.model_id) for key, text in texts.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(rows.values()))
        self.rows |= rows

    def finish(self) -> None:
        """Put the rows into question order, in one step that cannot leave half a file.

        Raises:
            RuntimeError: not every task has an answer.
        """
        if self.pending:
            raise RuntimeError(f"{self.path}: {len(self.pending)} of {len(self.keys)} questions have no answer yet")
        replace_text(self.path, _lines(self.rows[key] for key in self.keys), check=False)

    def _resume(self) -> None:
        """Take over the answers that are there; nothing is repaired before all of them were found to belong here."""
        refuse_other_settings(self.path, self.settings, self.shapes)
        found = recognize_rows(self.path, self.shapes)
        rows = found.rows
        for (where, row), key in zip(rows, row_keys(row for _, row in rows), strict=True):
            if row.get("model_id", self.model_id) != self.model_id:
                raise FlagError(
                    f"{where}: an answer of the model '{row['model_id']}', but this run asks '{self.model_id}'; name "
                    f"another --answers-file, or replace this one with --restart"
                )
            if key not in self.keys:
                raise BadSampleError(
                    f"{where}: an answer to question_id {row.get('question_id')!r} that is not, or not so often, among "
                    f"the {len(self.keys)} questions of this run (with the same prompt); name another --answers-file, "
                    f"or replace this one with --restart"
                )
            self.rows[key] = row
        repair(self.path, found)


def _refuse_ambiguous(tasks: dict[str, Task]) -> None:
    """Rows of equal id and prompt are numbered; that is only sound if they ask the same."""
    first: dict[str, Task] = {}
    for key, task in tasks.items():
        other = first.setdefault(key.rpartition("#")[0], task)
        if (other.images, other.question) != (task.images, task.question):
            raise BadSampleError(
                f"{task.where}: same question_id {task.question_id!r} and text as {other.where}, but other images; "
                f"their answers could not be told apart: give them different ids"
            )


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
