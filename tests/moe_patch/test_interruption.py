"""A run that is killed at any file operation: the next command leaves what an undisturbed one would have left."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_patch import operations, sources
from moe_patch.checkout import Checkout
from moe_patch.extensions import EXTENSIONS, Extension, chosen
from tests.moe_patch import miniature

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate"}


class Killed(BaseException):
    """In place of the end of the process."""


class Killer:
    """Ends the run at the n-th operation that changes a file below a folder, and at every one after it.

    A handler of the program can therefore not clean up, as after a kill. Python calls it before each operation.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self.left = 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or not self._changes_files(event, arguments):
            return
        self.left -= 1
        if self.left < 0:
            raise Killed

    def _changes_files(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event not in CHANGES and not (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return False
        return isinstance(arguments[0], (str, os.PathLike)) and os.fspath(arguments[0]).startswith(str(self.folder))

    def run(self, folder: Path, operations_left: int, action: Callable[[], object]) -> bool:
        """True if the action was killed."""
        self.folder, self.left = str(folder), operations_left
        try:
            action()
            return False
        except Killed:
            return True
        finally:
            self.folder = None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that come in are prepared once for each choice, and nothing waits for the disk."""
    prepared = functools.cache(sources.files)
    monkeypatch.setattr(sources, "files", lambda modules: prepared(tuple(modules)))
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def killer() -> Killer:
    return Killer()


def other_version() -> list[Extension]:
    """Another version whose files are all there."""
    entry = EXTENSIONS["hydralora"]
    first, *others = entry.edits
    return [replace(entry, edits=(replace(first, text=("from llava import extensions_moe as other",)), *others))]


def everything(folder: Path) -> dict[str, tuple[bytes, int] | None]:
    """Files with their bytes and permissions, and folders."""
    folders = {f"{p.relative_to(folder).as_posix()}/": None for p in folder.rglob("*") if p.is_dir()}
    return {**miniature.snapshot(folder), **folders}


def apply(folder: Path) -> None:
    operations.apply(Checkout(folder), chosen(["hydralora"]))


def apply_other(folder: Path) -> None:
    operations.apply(Checkout(folder), other_version())


def apply_all(folder: Path) -> None:
    operations.apply(Checkout(folder), chosen(list(EXTENSIONS)))


def revert(folder: Path) -> None:
    operations.revert(Checkout(folder))


PREPARED: dict[str, tuple[Callable[[Path], None], ...]] = {
    "apply": (apply,),
    "renewal": (apply_other, apply),
    "fewer extensions": (apply_all, apply),
    "revert": (apply, revert),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """The checkout untouched, and after `apply`; without git, which takes most of the time."""
    folder = tmp_path_factory.mktemp("whole")
    miniature.write_files(folder)
    before = everything(folder)
    apply(folder)
    return before, everything(folder)


@pytest.mark.parametrize("then", [apply, revert])
@pytest.mark.parametrize("steps", PREPARED.values(), ids=list(PREPARED))
def test_killed_at_every_file_operation(
    steps: tuple[Callable[[Path], None], ...],
    then: Callable[[Path], None],
    tmp_path: Path,
    killer: Killer,
    whole: tuple[dict, dict],
) -> None:
    *prepare, killed = steps
    expected = whole[1] if then is apply else whole[0]
    states = set()
    prepared = tmp_path / "prepared"
    miniature.write_files(prepared)
    for step in prepare:
        step(prepared)
    for number in itertools.count():
        folder = shutil.copytree(prepared, tmp_path / str(number))
        if not killer.run(folder, number, lambda folder=folder: killed(folder)):
            break
        states.add(operations.state(Checkout(folder))[0])
        unfinished = folder / ".moe_patch" / "next"
        if unfinished.exists():
            unfinished.write_bytes(unfinished.read_bytes()[:5])  # killed while it was written
        then(folder)
        assert everything(folder) == expected, f"killed at operation {number}"
        shutil.rmtree(folder)
    assert number > 15, "too few operations were seen for this to be a test"
    assert "drifted" in states


def test_killed_twice(tmp_path: Path, killer: Killer, whole: tuple[dict, dict]) -> None:
    """The command that fixes an interruption may be interrupted too."""
    for number in range(0, 60, 7):
        folder = tmp_path / str(number)
        miniature.write_files(folder)
        assert killer.run(folder, number, lambda folder=folder: apply(folder))
        killer.run(folder, number // 2, lambda folder=folder: revert(folder))
        killer.run(folder, number // 3, lambda folder=folder: apply(folder))
        revert(folder)
        assert everything(folder) == whole[0]
