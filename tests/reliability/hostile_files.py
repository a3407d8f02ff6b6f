"""A seeded corpus of files that a program may meet where its answers should be."""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

SEED = 1608
DRAWS = 8
"""Members of each kind whose content is drawn."""

WORDS = ("red", "cup", "a cat", "two", "3", "no", "Ja", "été", "图")

Make = Callable[[random.Random], bytes]


def _text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _question(draw: random.Random) -> dict[str, Any]:
    return {"question_id": draw.randint(0, 99), "image": "a.png", "text": _text(draw), "category": "default"}


def _conversation(draw: random.Random) -> dict[str, Any]:
    turns = [{"from": "human", "value": _text(draw)}, {"from": "gpt", "value": _text(draw)}]
    return {"id": str(draw.randint(0, 99)), "image": "a.png", "conversations": turns}


def _image(kind: str) -> Make:
    def make(draw: random.Random) -> bytes:
        size = draw.randint(1, 60), draw.randint(1, 60)
        buffer = io.BytesIO()
        Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).save(buffer, kind)
        return buffer.getvalue()

    return make


def _table(separator: str) -> Make:
    def make(draw: random.Random) -> bytes:
        rows = [["index", "question", "answer"]] + [[str(n), _text(draw), _text(draw)] for n in range(4)]
        ending = draw.choice(["\n", ""])
        return ("\n".join(separator.join(row) for row in rows) + ending).encode()

    return make


def _zip(draw: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", draw.randbytes(50))
    return buffer.getvalue()


FOREIGN: dict[str, Make] = {
    "JSON list": lambda draw: json.dumps([_conversation(draw) for _ in range(3)]).encode(),
    "indented JSON list": lambda draw: json.dumps([_question(draw)], indent=2).encode() + b"\n",
    "JSON object": lambda draw: json.dumps({"model_type": _text(draw), "hidden_size": draw.randint(1, 99)}).encode(),
    "indented JSON object": lambda draw: json.dumps({"a": _text(draw), "b": [1, 2]}, indent=2).encode(),
    "JSON number": lambda draw: str(draw.random()).encode(),
    "JSON string": lambda draw: json.dumps(_text(draw)).encode() + b"\n",
    "questions": lambda draw: _lines([_question(draw) for _ in range(3)]),
    "questions, the last one torn": lambda draw: _lines([_question(draw) for _ in range(3)])[: -draw.randint(2, 20)],
    "one question, torn": lambda draw: _lines([_question(draw)])[: draw.randint(30, 40)],
    "conversations as lines": lambda draw: _lines([_conversation(draw) for _ in range(3)]),
    "lists as lines": lambda draw: _lines([[1, _text(draw)], [2, _text(draw)]]),
    "scores as lines": lambda draw: _lines([{"epoch": n, "loss": draw.random()} for n in range(3)]),
    "CSV": _table(","),
    "TSV": _table("\t"),
    "prose": lambda draw: "\n".join(_text(draw) for _ in range(5)).encode(),
    "PNG": _image("PNG"),
    "JPEG": _image("JPEG"),
    "ZIP": _zip,
    "UTF-16": lambda draw: json.dumps({"question_id": 1, "text": _text(draw)}).encode("utf-16"),
    "Latin-1": lambda draw: ("\xe9t\xe9 " + _text(draw)).encode("latin-1", "ignore"),
    "NUL bytes": lambda draw: b"\0" * draw.randint(1, 5000),
    "random bytes": lambda draw: b"\x80" + draw.randbytes(draw.randint(1, 5000)),
    "a huge line": lambda draw: b"x" * (3_000_000 + draw.randint(0, 99)),
    "a huge line of JSON": lambda draw: b"[" * (200_000 + draw.randint(0, 99)),
    "Git LFS pointer": lambda draw: b"version https://git-lfs.github.com/spec/v1\nsize %d\n" % draw.randint(1, 99),
    "HTML": lambda draw: f"<!doctype html><title>{_text(draw)}</title>".encode(),
    "safetensors": lambda draw: (8).to_bytes(8, "little") + b"{}      " + draw.randbytes(16),
}
"""Content that is not an answers file, by name."""


def spoiled_answers(answers: bytes) -> dict[str, bytes]:
    """Real answers with something behind or among them that no kill leaves there."""
    lines = answers.splitlines(keepends=True)
    half = len(lines[0]) // 2
    return {
        "NUL bytes behind": answers + b"\0" * 512,
        "a table behind": answers + b"index,question\n1,What?\n",
        "a question behind": answers + b'{"question_id": 7, "image": "a.png", "te',
        "prose behind": answers + b"the end",
        "a list behind": answers + b'[{"question_id": 1}',
        "a broken line in the middle": lines[0][:half] + b"\n" + b"".join(lines[1:]),
        "a question in the middle": lines[0] + b'{"question_id": 7, "image": "a", "text": "b"}\n' + lines[1],
        "invalid UTF-8 in the tail": answers + lines[0][:half] + b"\xff\xfe",
        "NUL bytes in the tail": answers + lines[0][:half] + b"\0\0",
    }


def _link_to_image(path: Path) -> None:
    image = path.with_suffix(".png")
    image.write_bytes(b"\x89PNG\r\n\x1a\n")
    path.symlink_to(image)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "directory": lambda path: path.mkdir(),
    "named pipe": lambda path: os.mkfifo(path),
    "link to a directory": lambda path: path.symlink_to(path.parent),
    "link to an image": _link_to_image,
}
"""What is at the path in place of a file."""


def corpus() -> dict[str, bytes]:
    """Every kind of foreign content, `DRAWS` times each."""
    found = {}
    for name, make in FOREIGN.items():
        draw = random.Random(f"{SEED} {name}")
        found |= {f"{name} {number}": make(draw) for number in range(DRAWS)}
    return found
