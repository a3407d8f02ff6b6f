"""Our own files as they stand in a checkout: the same files, with nothing but their imports pointing elsewhere.

There is one copy of every layer in the repository. On its way into a checkout `from hydralora.config import ...`
becomes `from llava.extensions_moe.hydralora.config import ...`; a test holds that all other lines stay equal. The
checkout has a `llava` of its own, upstream's: from ours `llava.runtime.options` becomes
`llava.extensions_moe.runtime.options`, and no carried file may import anything of either that does not come along.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from moe_patch.errors import PatchError
from moe_patch.extensions import PACKAGE

ROOT = Path(__file__).resolve().parent.parent
"""Where our packages lie: the repository, or site-packages."""

UNWRAPPED = ("moe_patch.payload", "llava")
"""Packages whose modules go into `PACKAGE` itself; those of others go into a folder with the package's name."""

FOLDER = PACKAGE.replace(".", "/")


def target_module(module: str) -> str:
    """Name in the checkout of one of our modules."""
    for package in UNWRAPPED:
        if module == package or module.startswith(f"{package}."):
            return PACKAGE + module[len(package) :]
    return f"{PACKAGE}.{module}"


def files(modules: Sequence[str]) -> dict[str, bytes]:
    """Content of the files in the checkout, by path, of our modules with their imports rewritten.

    Raises:
        PatchError: a module is not here, imports something of ours that does not come along, or has the place of
            another one.
    """
    found: dict[str, bytes] = {}
    for module in modules:
        source = _path(module)
        if not source.is_file():
            raise PatchError(f"{source}: not found; moe_patch takes the layers from the packages beside it")
        target = target_module(module).replace(".", "/")
        name = f"{target}/__init__.py" if source.name == "__init__.py" else f"{target}.py"
        if name in found:
            raise PatchError(f"{source}: {name} is the place of another module too; rename one of them")
        found[name] = rewritten(source, modules)
    for folder in sorted({path.rpartition("/")[0] for path in found} - {FOLDER}):
        text = f'"""Files of `{folder.rpartition("/")[2]}` of llava-extensions, put here by moe_patch."""\n'
        found.setdefault(f"{folder}/__init__.py", text.encode())
    return dict(sorted(found.items()))


def rewritten(source: Path, modules: Collection[str]) -> bytes:
    """One file with the imports of our modules pointing to their places in the checkout.

    Raises:
        PatchError: it imports a module of ours that is not among `modules`, or in a way that cannot be rewritten.
    """
    content = source.read_bytes()
    ours = {module.partition(".")[0] for module in modules}
    lines = content.splitlines(keepends=True)
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] in ours for alias in node.names):
            raise PatchError(f"{source}:{node.lineno}: write 'from ... import ...'; only that can be carried along")
        if not isinstance(node, ast.ImportFrom) or node.level or (node.module or "").partition(".")[0] not in ours:
            continue
        name = node.module or ""
        missing = {f"{name}.{alias.name}" for alias in node.names} - set(modules)
        if name not in modules and missing:
            raise PatchError(f"{source}:{node.lineno}: imports {sorted(missing)}, which does not go into the checkout")
        row, column = node.lineno - 1, node.col_offset
        head, tail = lines[row][:column], lines[row][column:]
        pattern = rb"from(\s+)" + re.escape(name.encode())
        lines[row] = head + re.sub(pattern, b"from\\g<1>" + target_module(name).encode(), tail, count=1)
    return b"".join(lines)


def _path(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
