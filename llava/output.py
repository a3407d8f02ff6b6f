"""Writing results of programs so that they appear whole or not at all, and never over something that is there."""

from __future__ import annotations

import contextlib
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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
