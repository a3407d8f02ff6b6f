"""Writing results of programs so that they appear whole or not at all: new ones, or in the place of older ones."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llava.errors import CheckpointError


@contextlib.contextmanager
def new_path(output: str | Path) -> Iterator[Path]:
    """A path to write a file or folder at, which gets its real name when the block ends without an error.

    Raises:
        CheckpointError: `output` exists already.
    """
    output = Path(output)
    if output.exists():
        raise CheckpointError(f"{output}: exists already; choose a name that does not")
    partial = output.with_name(output.name + ".partial")
    _remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.rename(output)
    finally:
        _remove(partial)


def replace_text(path: str | Path, text: str) -> Path:
    """Write a text file in one step that cannot leave half a file, over an older one if there is one.

    Returns:
        the path; its folder is made if needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
