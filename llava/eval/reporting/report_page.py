"""The page of `llava.eval.report`: tables, and questions on which two runs disagree, with their images.

One HTML file with everything inside, small copies of the images included; it needs no network and runs no script.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llava.errors import FlagError
from llava.eval.answering.answers import Task
from llava.eval.answering.runner import OpenImage
from llava.eval.benchmarks import find
from llava.eval.reporting.comparison import Group, Key, Scored, disagreements

SIDE = 240
"""Longest side of a shown image, in pixels."""

STYLE = """
body { font-family: sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } td, th { padding: 3px 12px; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; } .note { color: #8a5a00; }
.question { display: flex; gap: 16px; padding: 12px 0; border-top: 1px solid #ddd; }
.question img { max-width: 240px; display: block; margin-bottom: 6px; } .text { white-space: pre-wrap; }
.answer { padding: 4px 8px; margin: 4px 0; background: #f4f4f4; } .better { background: #dff2e0; }
"""


class _Questions:
    """The questions of a run, to be shown: text and images."""

    def __init__(self, run: Scored) -> None:
        arguments = run.result["arguments"]
        benchmark = find(run.result["benchmark"])
        source = Path(arguments["question_file"])
        if not source.exists():
            raise FlagError(
                f"{run.path}: the questions are no longer at {source}; run this where they are, or pass --no-images"
            )
        seen: Counter[str] = Counter()
        self.tasks: dict[Key, Task] = {}
        for task in benchmark.read(source):
            name = str(task.question_id)
            self.tasks[name, seen[name]] = task
            seen[name] += 1
        self.open_image: OpenImage = benchmark.open_images(Path(arguments["image_folder"]))

    def images(self, key: Key) -> Iterator[str]:
        """The images of a question as HTML."""
        task = self.tasks.get(key)
        for name in task.images if task else ():
            image = self.open_image(name, task.where if task else "")
            image.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=80)
            yield f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'

    def text(self, key: Key) -> str:
        """The question as it was asked."""
        return self.tasks[key].question if key in self.tasks else ""


def page(groups: Sequence[Group], tables: Sequence[list[list[str]]], samples: int, images: bool) -> str:
    """The whole page.

    Args:
        groups: runs by benchmark.
        tables: head and rows of each group.
        samples: the most questions that are shown for a pair of runs.
        images: show questions' images; without, only what the runs wrote is read.

    Raises:
        FlagError: the questions are not where they were.
        BadImageError: an image cannot be read.
    """
    parts = ['<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison</title>']
    parts.append(f"<style>{STYLE}</style><body>\n<h1>Comparison</h1>\n")
    for group, rows in zip(groups, tables, strict=True):
        parts.append(f"<h2>{escape(group.title)} ({escape(group.split)})</h2>\n")
        parts += _table(rows)
        parts += [f'<p class="note">{escape(note)}</p>\n' for note in group.notes]
        for other in group.runs[1:]:
            parts += _pair(group.runs[0], other, samples, images)
    return "".join(parts) + "</body></html>\n"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "<table>"
    for number, row in enumerate(rows):
        cell = "th" if number == 0 else "td"
        yield "<tr>" + "".join(f"<{cell}>{escape(value)}</{cell}>" for value in row) + "</tr>\n"
    yield "</table>\n<p>Brackets: 95 % bootstrap intervals over the questions; differences are paired.</p>\n"


def _pair(first: Scored, second: Scored, samples: int, images: bool) -> Iterator[str]:
    keys = disagreements(first, second)
    yield f"<h3>{escape(first.name)} and {escape(second.name)} disagree on {len(keys)} questions"
    yield f", {samples} shown</h3>\n" if len(keys) > samples else "</h3>\n"
    questions = _Questions(first) if images and keys and samples else None
    for key in keys[:samples]:
        one, other = first.samples[key], second.samples[key]
        yield '<div class="question"><div>'
        if questions is not None:
            yield from questions.images(key)
        text = (questions.text(key) if questions else "") or str(one.get("prompt", ""))
        yield f'</div><div><div class="text"><b>{escape(str(key[0]))}</b> {escape(text)}</div>'
        if one.get("label") is not None:
            yield f"<div>expected: {escape(_label(one['label']))}</div>"
        for run, row, rival in ((first, one, other), (second, other, one)):
            better = " better" if row["score"] > rival["score"] else ""
            yield f'<div class="answer{better}">{escape(run.name)} ({row["score"]:g}): {escape(_answer(row))}</div>'
        yield "</div></div>\n"


def _label(label: Any) -> str:
    return " / ".join(dict.fromkeys(map(str, label))) if isinstance(label, list) else str(label)


def _answer(row: dict[str, Any]) -> str:
    """The answer's text; ScienceQA's log calls it otherwise."""
    return str(row["text"] if "text" in row else row.get("pred", ""))
