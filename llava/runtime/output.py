"""Writing results so that they appear whole or not at all, under temporary names that nobody else can have.

Everything that is written in this project gets its real name by `put_in_place`, most of it through `new_path` (a file
or folder that must not exist yet), `replacing` (a file that may be replaced) or `replace_text`.

A temporary file has a random name and is created exclusively. A temporary folder contains `MARKER`, which says that a
program of this project made it: only folders with the marker are ever deleted, so a folder of a user is left alone
whatever its name is. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from llava.errors import CheckpointError, FlagError
from llava.runtime.places import Input, refuse_file, refuse_folder
from llava.runtime.recognize import foreign_message, refuse_foreign

MARKER = ".unfinished-llava-output"
"""File in a temporary folder; says which process made it."""


def _random() -> str:
    return uuid.uuid4().hex[:12]


def put_in_place(made: str | Path, target: str | Path) -> None:
    """Give a complete file or folder its real name, in one step that cannot be seen half done.

    Args:
        made: on the same file system as `target`, which is why temporary names are in the same folder.
        target: a file that is there is replaced, and so is an empty folder by a folder; nothing else is.

    Raises:
        OSError: something else has the name; both are left as they are.
    """
    os.replace(made, target)


def flush(path: Path) -> None:
    """Wait until a file, or all files of a folder, are on the disk."""
    for entry in [path, *(path.rglob("*") if path.is_dir() else ())]:
        _flush_entry(entry)


def flush_name(path: Path) -> None:
    """Wait until the name of a file or folder is on the disk."""
    _flush_entry(path.parent)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Folders


def is_ours(folder: Path) -> bool:
    """Whether a program of this project made a temporary folder; False for links and for anything else."""
    return folder.is_dir() and not folder.is_symlink() and (folder / MARKER).is_file()


def claim(folder: Path) -> Path:
    """Make a temporary folder, or take the one that a fellow process of this run has made.

    The marker is in the folder from the first moment on, so a kill leaves nothing that could not be recognized.

    Raises:
        FlagError: something else has the name; it is left as it is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if is_ours(folder):
        return folder
    if os.path.lexists(folder) and not _is_empty_folder(folder) and not is_ours(folder):
        raise FlagError(
            f"{folder}: is in the way: a run writes under this name first, and what is there "
            f"({describe_entry(folder)}) was not written by one. It is left as it is; move it away, or choose another "
            "output folder"
        )
    private = folder.with_name(f".{folder.name}.{_random()}")
    private.mkdir()
    (private / MARKER).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
    try:
        put_in_place(private, folder)
    except OSError:
        discard(private)
        if not is_ours(folder):
            raise
    return folder


def describe_entry(path: Path) -> str:
    """A word for what is at a path, also where it is a link to nothing."""
    return "a link" if path.is_symlink() else "a folder" if path.is_dir() else "a file"


def _is_empty_folder(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def discard(folder: Path) -> bool:
    """Delete a temporary folder if a program of this project made it; the marker goes last.

    Returns:
        Whether it was deleted.
    """
    if not is_ours(folder):
        return False
    for entry in folder.iterdir():
        if entry.name == MARKER:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    (folder / MARKER).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a fellow process still writes into it
        folder.rmdir()
    return True


def _is_abandoned(folder: Path) -> bool:
    """Whether the process that made a temporary folder is gone; False where that cannot be seen from here."""
    try:
        maker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if maker["host"] != socket.gethostname():
            return False
        os.kill(int(maker["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


@contextlib.contextmanager
def new_path(output: str | Path, reads: Iterable[str | Path | None] = (), *, file: bool = False) -> Iterator[Path]:
    """A path to write a file or folder at, which gets its real name when the block ends without an error.

    What a killed program left half-written for the same output is removed; nothing else is.

    Args:
        output: must not exist.
        reads: what the program reads; a folder must not fall on any of it, a file must not be any of it.
        file: whether a file is written.

    Raises:
        CheckpointError: `output` already exists.
        FlagError: `output` is empty, or falls on what the program reads.
    """
    check_new(output, reads, file=file)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    for old in output.parent.glob(f".{_escaped(output.name)}.*.partial"):
        if is_ours(old) and _is_abandoned(old):
            discard(old)
    folder = claim(output.with_name(f".{output.name}.{_random()}.partial"))
    try:
        partial = folder / output.name
        yield partial
        refuse_existing(output)  # it may have appeared meanwhile
        put_in_place(partial, output)
    finally:
        discard(folder)


def check_new(output: str | Path, reads: Iterable[str | Path | None] = (), *, file: bool = False) -> None:
    """The checks of `new_path`, for a program that wants to make them before its work.

    Raises:
        CheckpointError, FlagError: as of `new_path`.
    """
    if str(output).strip() and str(output) != ".":
        refuse_existing(Path(output))
    inputs = [Input("the input", path) for path in reads]
    if file:
        refuse_file("the output", output, inputs)
    else:
        refuse_folder("the output", output, inputs)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def refuse_existing(output: Path) -> None:
    """Raise for an output that must be new.

    Raises:
        CheckpointError: there is something already, be it a link to nothing.
    """
    if os.path.lexists(output):
        raise CheckpointError(f"{output}: already exists; choose another path")


# Files


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write a file at, which takes the place of `path` when the block ends without an error.

    The caller has made sure that a file there may be replaced.

    Raises:
        FlagError: `path` is something else than a file, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise FlagError(foreign_message(path))
    temporary = path.with_name(f".{path.name[:200]}.{_random()}{path.suffix if len(path.suffix) < 20 else ''}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise FlagError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        yield temporary
        flush(temporary)
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: str | Path, text: str, *, errors: str = "strict", check: bool = True) -> Path:
    """Write a text file in one step that cannot leave half a file, over an earlier result if there is one.

    Args:
        path: file to write; its folder is made if needed.
        text: the content.
        errors: what becomes of characters that UTF-8 cannot express; see `str.encode`.
        check: False where the caller knows the file that is there for its own.

    Returns:
        the path.

    Raises:
        FlagError: a file is there that is not a result of the same kind (`llava.runtime.recognize`), or it cannot be
            written.
    """
    if not str(path).strip() or str(path) == ".":
        raise FlagError("the output is an empty path (an unset variable?); name a file")
    path = Path(path)
    if check:
        refuse_foreign(path, text)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors=errors) as file:
        file.write(text)
    return path
