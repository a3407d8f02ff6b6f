"""What the commit that is checked out has, read without running or obeying anything of the checkout's `.git`.

`git status` runs filters, hooks and file monitors that a repository's own settings name. Here git reads objects only,
through an empty repository in a temporary folder, so no setting of the checkout applies.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

SHA256_DIGITS = 64
"""Length of a commit's name in a repository whose objects are named by SHA-256."""


class Commit:
    """The commit of a folder's repository.

    Args:
        root: a folder in the working tree.

    Attributes:
        id: its name in hexadecimal; None if there is no git, no repository or no commit.
    """

    def __init__(self, root: Path) -> None:
        self.id: str | None = None
        if not any((folder / ".git").exists() for folder in (root, *root.parents)):
            return
        # `rev-parse` reads references; it opens neither the index nor a file of the working tree.
        answer = _git(["-C", str(root), "rev-parse", "--show-prefix", "--git-path", "objects", "HEAD"])
        if answer is None:
            return
        prefix, objects, self.id = (os.fsdecode(line) for line in answer.splitlines())
        self._prefix, self._objects = prefix, root / objects

    def contents(self, names: Iterable[str]) -> dict[str, bytes]:
        """Content in the commit of those files that it has, by path relative to the folder."""
        wanted = list(names)
        if self.id is None or not wanted:
            return {}
        request = "".join(f"{self.id}:{self._prefix}{name}\n" for name in wanted)
        with tempfile.TemporaryDirectory(prefix="moe_patch-") as temporary:
            _write_empty_repository(Path(temporary), len(self.id) == SHA256_DIGITS)
            places = {"GIT_DIR": temporary, "GIT_OBJECT_DIRECTORY": str(self._objects)}
            alone = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
            answer = _git(["cat-file", "--batch"], os.fsencode(request), places | alone)
        return {} if answer is None else _parse_batch(answer, wanted)


def is_same(content: bytes | None, committed: bytes | None) -> bool:
    """True if a file is as the commit has it; git may have changed the ends of lines when it was checked out."""
    if content is None or committed is None:
        return content is committed
    return content.replace(b"\r\n", b"\n") == committed.replace(b"\r\n", b"\n")


def _write_empty_repository(folder: Path, sha256: bool) -> None:
    """What git needs to take a folder for a repository: no settings, hooks, remotes or attributes."""
    for name in ("objects", "refs"):
        (folder / name).mkdir()
    (folder / "HEAD").write_text("ref: refs/heads/none\n", encoding="utf-8")
    settings = "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tobjectformat = sha256\n" if sha256 else ""
    (folder / "config").write_text(settings, encoding="utf-8")


def _parse_batch(answer: bytes, names: list[str]) -> dict[str, bytes]:
    """Contents from the output of `git cat-file --batch`, which answers in the order of the request."""
    found: dict[str, bytes] = {}
    start = 0
    for name in names:
        end = answer.index(b"\n", start)
        words = answer[start:end].split(b" ")
        start = end + 1
        if words[-1] == b"missing":
            continue
        size = int(words[-1])
        if words[-2] == b"blob":
            found[name] = answer[start : start + size]
        start += size + 1
    return found


def _git(arguments: list[str], given: bytes = b"", environment: dict[str, str] | None = None) -> bytes | None:
    """Output of a git command; None if git is missing or does not succeed."""
    # Variables such as GIT_DIR, which a hook of the caller's may have set, would lead to another repository.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-pager", *arguments]
    try:
        done = subprocess.run(command, input=given, capture_output=True, check=False, env=clean | (environment or {}))
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
