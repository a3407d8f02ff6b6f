"""`docs/moved.md`: every name is where the table says, and no longer defined where it was."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.structure import ROOT

ROW = re.compile(r"^\| `([\w.]+):(\w+)` \| `([\w.]+):(\w+)` \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "moved.md").read_text(encoding="utf-8"))


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    found = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in found if file.is_file()), None)


@cache
def defined(module: str) -> frozenset[str]:
    """Names that a module defines itself; none if there is no such module."""
    file = _file(module)
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body if file else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name))
    return frozenset(names)


def test_the_table_is_read() -> None:
    assert len(ROWS) > 1000
    assert len({row[:2] for row in ROWS}) == len(ROWS), "a name is listed twice"
    assert not defined("llava.no_such_module")


@pytest.mark.parametrize("module", sorted({row[2] for row in ROWS}))
def test_each_name_is_where_the_table_says(module: str) -> None:
    wanted = {name for _, _, new, name in ROWS if new == module}
    assert wanted <= defined(module), sorted(wanted - defined(module))


def test_no_name_is_still_where_it_was() -> None:
    assert not [f"{old}:{name}" for old, name, _, _ in ROWS if name in defined(old)]
