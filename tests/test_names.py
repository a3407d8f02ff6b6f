"""One word for one thing, one signature for one job, and a reason above each step of a long body."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import dynamic.model
import hydralora.model
import mma.model
from tests.test_repository import MODULES, ROOT

SOURCES = sorted({*MODULES, *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")})
LONG_BODY = 40
"""Lines of code in a body, from which on it explains its steps."""
LINES_PER_COMMENT = 12


def named(pattern: str, text: str) -> list[str]:
    """Names in a source that match; words of comments and strings are not names."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type == tokenize.NAME and re.search(pattern, token.string)]


def test_an_input_is_an_image_everywhere() -> None:
    assert named("(?i)picture", "open_picture(image)  # a picture") == ["open_picture"]
    found = {
        path.relative_to(ROOT).as_posix(): named("(?i)picture", path.read_text(encoding="utf-8")) for path in SOURCES
    }
    assert not {path: names for path, names in found.items() if names}


def classes_called(name: str) -> list[str]:
    """Modules that define a class of this name."""
    return [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name == name
    ]


def test_a_run_is_a_training_run_of_llava() -> None:
    assert classes_called("Run") == ["llava/train/run.py"]


@pytest.mark.parametrize("method", [hydralora.model, dynamic.model, mma.model], ids=lambda method: method.__name__)
def test_every_method_is_attached_alike(method: ModuleType) -> None:
    """`attach(model, config, dtype=torch.float32)`; what a method needs besides is given by keyword, or left out."""
    parameters = list(inspect.signature(method.attach).parameters.values())
    assert [(one.name, str(one.default)) for one in parameters[1:3]] == [
        ("config", str(inspect.Parameter.empty)),
        ("dtype", "torch.float32"),
    ]
    assert parameters[0].name == "model"
    assert all(one.kind is one.KEYWORD_ONLY and one.default is not one.empty for one in parameters[3:])


def bodies(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, lines of code and comments of every function; docstrings, comments and blank lines are not code."""
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    alone = {number for number in comments if text.splitlines()[number - 1].lstrip().startswith("#")}
    blank = {number for number, line in enumerate(text.splitlines(), start=1) if not line.strip()}
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        documented = ast.get_docstring(node) is not None
        start = (node.body[0].end_lineno or 0) + 1 if documented else node.body[0].lineno
        # A comment may stand above the first statement.
        while start - 1 in alone:
            start -= 1
        lines = set(range(start, (node.end_lineno or 0) + 1))
        yield node.name, len(lines - alone - blank), len(lines & comments)


def unexplained(text: str) -> list[str]:
    """Long bodies with too few comments."""
    return [
        f"{name}: {lines} lines, {comments} comments"
        for name, lines, comments in bodies(text)
        if lines > LONG_BODY and comments * LINES_PER_COMMENT < lines
    ]


def test_the_rule_of_long_bodies() -> None:
    """It counts code alone, tells comments from strings, and lets short bodies be."""
    step = "    # why\n" + "    x = '# no reason'\n" * LINES_PER_COMMENT
    silent = "    x = '# no reason'\n" * (LONG_BODY + 1)
    assert unexplained("def f():\n" + step * 4) == []
    assert unexplained("def f():\n" + silent) == ["f: 41 lines, 0 comments"]
    assert unexplained('def f():\n    """# What.\n\n    # It does.\n    """\n' + silent) == ["f: 41 lines, 0 comments"]
    assert unexplained("def f():\n" + "    x = 1\n\n" * LONG_BODY) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: Path(path).relative_to(ROOT).as_posix())
def test_long_bodies_give_their_reasons(path: Path) -> None:
    assert not unexplained(path.read_text(encoding="utf-8"))
