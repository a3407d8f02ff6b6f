"""Byte-exact snapshots of a folder, to see that a refused program changed nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

Snapshot = dict[str, tuple[int, bytes]]


def snapshot(folder: Path) -> Snapshot:
    """Kind, permissions and content of everything below a folder; of a link, where it leads."""
    found: Snapshot = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) else b""
        if stat.S_ISLNK(mode):
            content = os.readlink(path).encode()
        found[path.relative_to(folder).as_posix()] = (mode, content)
    return found
