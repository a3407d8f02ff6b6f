"""One legend of letters for the shapes in comments and docstrings: the table in `docs/architecture.md`."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_repository import MODULES, ROOT

SOURCES = sorted({*MODULES, *(ROOT / "benchmarks").rglob("*.py")})
GUIDES = sorted({*(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md"), ROOT / "README.md"})
WORD = r"(?:[A-Za-z][A-Za-z_]*|\d+)"
AXIS = re.compile(rf"(?:\.\.\.|{WORD}(?:(?: ?[-+*/] ?| or | )(?:{WORD}))*)")
LETTER = re.compile(r"(?<![A-Za-z_])[A-Za-z](?:_[a-z]+)?(?![A-Za-z_])")
"""One letter, maybe of a kind (`D_vision`); longer words explain themselves."""


def legend() -> set[str]:
    """The letters of the table."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("## Letters of shapes\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    return {letter for row in rows for letter in re.findall(r"`(\w)`", row)}


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Comments and docstrings (attributes' too) of a source, with the number of their first line."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def shapes(text: str) -> list[str]:
    """What is written like a shape with a letter: `(B, L, D)`, `(B or 1, S + n)`, `(n,)`; no call, no `(e.g. one)`."""
    found = re.findall(r"(?<![\w`.])\(([^()`\"'=:\[\]]*,[^()`\"'=:\[\]]*)\)", text)
    axes = [[axis.strip() for axis in shape.split(",") if axis.strip()] for shape in found]
    return [
        shape
        for shape, parts in zip(found, axes, strict=True)
        if parts and all(AXIS.fullmatch(part) for part in parts) and any(LETTER.fullmatch(part) for part in parts)
    ]


def unknown(shape: str, letters: set[str]) -> set[str]:
    """Letters of a shape that the legend does not explain."""
    return {letter for letter in LETTER.findall(shape) if letter[0] not in letters}


def strangers(text: str, letters: set[str]) -> list[str]:
    return [f"({shape})" for shape in shapes(text) if unknown(shape, letters)]


def test_the_legend_is_complete() -> None:
    assert len(legend()) > 20
    assert {"B", "L", "D", "E", "H", "r"} <= legend()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("logits (B, L, D) of it", []),
        ("(B or 1, S + n, ...) and (N, 1 + tiles, 3, height, width)", []),
        ("(N, P + 1, D_vision)", []),
        ("pixels (N, 3, H, W)", ["(N, 3, H, W)"]),
        ("(B, Q)", ["(B, Q)"]),
        ("(B, L / Z)", ["(B, L / Z)"]),
        ("(q_vision, B)", ["(q_vision, B)"]),
        ("softmax(B, Q) is a call, (Llama, Mistral) are names, (a few, of a kind) are words", []),
    ],
)
def test_shapes_are_recognised(text: str, found: list[str]) -> None:
    """The negative control: letters outside the legend are noticed, in sums and quotients too."""
    assert strangers(text, legend()) == found


def test_there_are_shapes_to_compare() -> None:
    """Without this, a pattern that finds nothing would pass."""
    count = sum(len(shapes(part)) for path in SOURCES for _, part in prose(path.read_text(encoding="utf-8")))
    assert count > 400


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: Path(path).relative_to(ROOT).as_posix())
def test_shapes_use_the_letters_of_the_legend(path: Path) -> None:
    letters = legend()
    parts = prose(path.read_text(encoding="utf-8"))
    found = [f"{path.name}:{line}: {shape}" for line, part in parts for shape in strangers(part, letters)]
    assert not found, "; ".join(found)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: Path(path).relative_to(ROOT).as_posix())
def test_shapes_in_documents_use_the_letters_of_the_legend(path: Path) -> None:
    assert not strangers(path.read_text(encoding="utf-8"), legend())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: Path(path).relative_to(ROOT).as_posix())
def test_a_module_s_own_letters_are_those_of_the_legend(path: Path) -> None:
    """`Shape letters: B batch, ...` at the head of a module, for modules that are read without the documents."""
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    own = head.partition("Shape letters:")[2]
    assert not {letter for letter in LETTER.findall(own) if letter[0] not in {*legend(), "a"}}
