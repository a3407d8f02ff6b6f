"""The user's LLaVA folder: its files, its commit, and what of it the user has changed.

Nothing outside the folder is ever read or written by name: a path that leads out of it, by its words or through a
symbolic link, is refused.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from moe_patch.commit import Commit, is_same
from moe_patch.errors import PatchError

UNKNOWN = "unknown (no git)"

FOLDER = ".moe_patch"
"""Where the patch keeps its own record within the checkout."""

NEXT = f"{FOLDER}/next"
"""A file while it is being written; an interrupted run may leave it, and the next one replaces or removes it."""


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def is_inside(name: str) -> bool:
    """True for a relative path of plain parts, with `/` between them."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") or "\\" in part or "\0" in part or ":" in part for part in parts)


class Checkout:
    """A folder with upstream's `llava` package in it.

    Args:
        root: the folder.

    Raises:
        PatchError: it is not such a folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        if not (self.root / "llava" / "__init__.py").is_file():
            raise PatchError(
                f"{self.root}: is not a LLaVA checkout (no llava/__init__.py); pass the top folder of one, or change "
                "into it"
            )
        if (self.root / "llava" / "extension.py").is_file() and (self.root / "moe_patch").is_dir():
            raise PatchError(f"{self.root}: is llava-extensions itself; pass the folder of an upstream checkout")

    def path(self, name: str) -> Path:
        """The file of that name within the checkout.

        Raises:
            PatchError: the name leads out of the checkout, by itself or through a symbolic link.
        """
        if not is_inside(name):
            raise PatchError(f"{self.root}: '{name}' is not the name of a file inside the checkout")
        path = self.root
        for part in name.split("/"):
            path = path / part
            if path.is_symlink():
                raise PatchError(f"{path}: is a symbolic link; only files inside the checkout are changed")
        return path

    def read(self, name: str) -> bytes | None:
        """Content of a file; None if there is none."""
        path = self.path(name)
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, content: bytes) -> None:
        """Write a file in one step, keeping the permissions of the one it replaces."""
        path, unfinished = self.path(name), self.path(NEXT)
        for parent in (path.parent, unfinished.parent):
            parent.mkdir(parents=True, exist_ok=True)
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask()
        # Always the same name in the same folder: whatever stops this run, the next one knows what it left.
        unfinished.unlink(missing_ok=True)
        with open(unfinished, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, mode)
        os.replace(unfinished, path)
        _flush_folder(path.parent)

    def remove(self, name: str) -> None:
        """Delete a file if it is there, with what Python compiled of it, and the folders that this leaves empty."""
        path = self.path(name)
        path.unlink(missing_ok=True)
        cache = path.parent / "__pycache__"
        if cache.is_dir() and not cache.is_symlink():
            for compiled in sorted(cache.iterdir()):
                if compiled.suffix == ".pyc" and compiled.name.partition(".")[0] == path.stem:
                    compiled.unlink()
        for folder in (cache, *path.parents):
            if folder == self.root or folder.is_symlink() or (folder.is_dir() and any(folder.iterdir())):
                break
            if folder.is_dir():
                folder.rmdir()

    def commit(self) -> str:
        """The commit that is checked out, for messages and the manifest."""
        return self._commit.id or UNKNOWN

    def committed(self, names: Iterable[str]) -> dict[str, bytes]:
        """Content in the commit of those files that it has."""
        return self._commit.contents(names)

    def changed_by_user(self, names: Iterable[str]) -> list[str]:
        """Those files that differ from the commit; without git nobody can tell, and the list is empty.

        Raises:
            PatchError: git does not answer about its own folder.
        """
        if self._commit.id is None:
            if (self.root / ".git").exists():
                raise PatchError(
                    f"{self.root}: git names no commit, so nobody knows what you changed; try git log there, or pass "
                    "--force"
                )
            return []
        wanted = list(names)
        committed = self._commit.contents(wanted)
        return [name for name in wanted if not is_same(self.read(name), committed.get(name))]

    def is_committed(self, name: str) -> bool:
        """True if git knows the file and it is as the commit has it."""
        committed = self._commit.contents([name]).get(name)
        return committed is not None and is_same(self.read(name), committed)

    @functools.cached_property
    def _commit(self) -> Commit:
        return Commit(self.root)


def _flush_folder(folder: Path) -> None:
    """Let the new name of a file reach the disk before anything that relies on it; POSIX systems alone have this."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
