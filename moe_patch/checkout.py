"""The user's LLaVA folder: its files, its commit, and what of it the user has changed.

Nothing outside the folder is ever written: a path that leads out of it through a symbolic link is refused.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from moe_patch.errors import PatchError

UNKNOWN = "unknown (no git)"


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


class Checkout:
    """A folder with upstream's `llava` package in it.

    Args:
        root: the folder.

    Raises:
        PatchError: it is no such folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        if not (self.root / "llava" / "__init__.py").is_file():
            raise PatchError(f"{root}: is no LLaVA checkout: llava/__init__.py is missing; give its top folder")
        if (self.root / "llava" / "extension.py").is_file() and (self.root / "moe_patch").is_dir():
            raise PatchError(f"{root}: is llava-extensions itself; give an upstream checkout")

    def path(self, name: str) -> Path:
        """The file of that name within the checkout.

        Raises:
            PatchError: a symbolic link stands on the way.
        """
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
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask()
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> None:
        """Delete a file if it is there, with what Python compiled of it, and the folders that this leaves empty."""
        path = self.path(name)
        path.unlink(missing_ok=True)
        cache = path.parent / "__pycache__"
        if cache.is_dir():
            for compiled in cache.glob(f"{path.stem}.*.pyc"):
                compiled.unlink()
        for folder in (cache, *path.parents):
            if folder == self.root or (folder.is_dir() and any(folder.iterdir())):
                break
            if folder.is_dir():
                folder.rmdir()

    def commit(self) -> str:
        """The commit that is checked out, for messages and the manifest."""
        done = self._git("rev-parse", "HEAD")
        return done.strip() if done is not None else UNKNOWN

    def changed_by_user(self, names: Iterable[str]) -> list[str]:
        """Those files that differ from the commit; without git nobody can tell, and the list is empty.

        Raises:
            PatchError: git does not answer about its own folder.
        """
        done = self._git("status", "--porcelain", "-z", "--untracked-files=all", "--", *names)
        if done is None:
            if (self.root / ".git").exists():
                raise PatchError(f"{self.root}: git does not answer, so nobody knows what you changed; try git status")
            return []
        return [entry[3:] for entry in done.split("\0") if entry]

    def is_committed(self, name: str) -> bool:
        """True if git knows the file and it is as the commit has it."""
        known = self._git("ls-files", "--error-unmatch", "--", name)
        return known is not None and self._git("status", "--porcelain", "--", name) == ""

    def _git(self, *arguments: str) -> str | None:
        """Output of a git command in the checkout; None if there is no git or no repository."""
        command = ["git", "-c", "core.fsmonitor=false", "-C", str(self.root), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout if done.returncode == 0 else None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
