"""The repository as its structural tests see it: modules by name, and who imports whom."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


PACKAGES = ("llava", "hydralora", "dynamic", "mma", "moe_patch", "playground")


MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


PROGRAMS = [path for folder in ("tests", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere, inside functions and `if TYPE_CHECKING` included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays inside the package of the file.
            module = (node.module or "") if node.level == 0 else path.relative_to(ROOT).parts[0]
            found.update(module_of(module, alias.name) for alias in node.names)
    return found


def module_of(package: str, name: str) -> str:
    """The module that `from package import name` imports: `package.name` if that is one of ours."""
    inner = ROOT.joinpath(*package.split("."), name)
    return f"{package}.{name}" if inner.with_suffix(".py").is_file() or inner.is_dir() else package


def is_door(path: Path) -> bool:
    """Whether a module is nothing but another name of a program."""
    return not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(ast.parse(path.read_text())))


def import_graph() -> dict[str, set[str]]:
    """Who imports whom among our modules, anywhere in a file."""
    names = {module_name(path): path for path in MODULES + PROGRAMS}
    return {name: imported_modules(path) & set(names) - {name} for name, path in names.items()}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, in their order; empty if there is none."""
    sorter = graphlib.TopologicalSorter(graph)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


BY_HAND = {
    "os": {"replace", "rename", "renames"},
    "shutil": {"move"},
    "tempfile": {"mkstemp", "mkdtemp"},
}
"""Functions with which a file or folder is replaced, or a temporary one is made that nobody removes, by module."""


def replaced_by_hand(text: str) -> list[int]:
    """Lines of a source file that replace a file or folder by a call of their own, or prepare to.

    `Path.rename` and `Path.replace` are calls of a method with one argument: `str.replace` has two, and what else is
    named `replace` takes keywords.
    """
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and BY_HAND.get(node.module or "", set()) & {a.name for a in node.names}:
            found.append(node.lineno)
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = node.func.value, node.func.attr
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if isinstance(owner, ast.Name) and owner.id in BY_HAND:
            if name in BY_HAND[owner.id] or (name == "NamedTemporaryFile" and keywords.get("delete") == "False"):
                found.append(node.lineno)
        elif name in ("rename", "replace") and len(node.args) + len(keywords) == 1 and keywords.keys() <= {"target"}:
            found.append(node.lineno)
    return found
