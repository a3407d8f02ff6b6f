"""The repository as its structural tests see it: modules by name, and who imports whom."""

from __future__ import annotations

import ast
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
