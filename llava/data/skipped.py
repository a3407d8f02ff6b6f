"""The list of rows that a run left out (`--on_bad_sample skip`): a JSONL file that several processes write to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llava.runtime.recognize import refuse_foreign

ENTRY = ("file", "row", "id", "reason")


def append_skipped(path: str | os.PathLike[str], source: tuple[Path, int], sample_id: Any, reason: str) -> None:
    """Add a row, given by its data file and its number there.

    One system call, so that lines of different data-loader workers do not mix.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    entry = dict(zip(ENTRY, (str(source[0]), source[1], sample_id, reason), strict=True))
    line = json.dumps(entry, ensure_ascii=False, default=str) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode("utf-8", "backslashreplace"))
    finally:
        os.close(descriptor)


def read_skipped(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows that were left out, `{"file", "row", "id", "reason"}`, each once and in order; none if there is no file.

    A row that several workers or epochs met stands in the file several times.
    """
    if not Path(path).exists():
        return []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    skipped = {(entry["file"], entry["row"]): entry for entry in reversed([json.loads(line) for line in lines])}
    return [skipped[row] for row in sorted(skipped)]


def remove_skipped(path: str | os.PathLike[str]) -> None:
    """Delete the list of an earlier run.

    Raises:
        FlagError: a file of that name holds something else; it is left as it is.
    """
    if os.path.lexists(path):
        refuse_foreign(Path(path), json.dumps(dict.fromkeys(ENTRY)) + "\n")
        Path(path).unlink()


def count_skipped(path: str | os.PathLike[str]) -> int:
    """Number of different rows that were left out."""
    return len(read_skipped(path))
