"""Files before anything is made of them: is this the file itself, whole, and of the kind that its place says?

Everything that reads a checkpoint, a tokenizer, an image, data or a JSON file asks here first. A clone without git-lfs
leaves small text files ("pointers") in the place of large ones; other readers would call such a file damaged. The
libraries of weights are imported only where an error of theirs is told from another, so that scoring a file of answers
needs none of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError, CheckpointError, FlagError, LlavaError
from llava.runtime.recognize import POINTER

CHECKED_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".bin", ".safetensors", ".pt", ".pth"})
"""Files of a checkpoint folder that some reader opens."""


def read_errors() -> tuple[type[Exception], ...]:
    """What readers of other libraries raise for a damaged file. Bugs of ours look the same, so blocks stay short."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (
        *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError),
        *(OSError, RuntimeError, SafetensorError, StrictDataclassError, TypeError, ValueError),
        *(pickle.UnpicklingError, zipfile.BadZipFile),
    )


def is_out_of_memory(error: Exception) -> bool:
    """True for torch's error of a full memory, which is not the fault of a file."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def is_pointer(path: str | os.PathLike[str]) -> bool:
    """True if a file is a Git LFS pointer; False if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def pointer_problem(path: str | os.PathLike[str]) -> str:
    """What to say about a pointer."""
    return f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"


def refuse_pointer(path: str | os.PathLike[str], kind: type[LlavaError] = CheckpointError) -> None:
    """Refuse a Git LFS pointer.

    Args:
        path: the file; one that cannot be read passes.
        kind: class of the error.

    Raises:
        CheckpointError: the file is one.
    """
    if is_pointer(path):
        raise kind(pointer_problem(path))


def data_bytes(path: str | os.PathLike[str]) -> bytes:
    """Content of a file of data, questions, answers or annotations.

    Raises:
        BadSampleError: the file is missing, cannot be read, or is a Git LFS pointer.
    """
    refuse_pointer(path, BadSampleError)
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise BadSampleError(f"{path}: no such file") from error
    except OSError as error:
        raise BadSampleError(f"{path}: cannot be read ({error.strerror or error})") from error


def data_text(path: str | os.PathLike[str]) -> str:
    """The same as text in UTF-8; a byte order mark at its beginning stays.

    Raises:
        BadSampleError: as of `data_bytes`, or it is not such text.
    """
    try:
        return data_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSampleError(f"{path}: is not text in UTF-8 ({error})") from error


def refuse_pointers(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder with a Git LFS pointer among the files that are read; folders below it are not looked at.

    Raises:
        CheckpointError: names the file.
    """
    folder = Path(folder)
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix in CHECKED_SUFFIXES:
                refuse_pointer(path)


def check_torch_file(path: Path) -> None:
    """Refuse a file of `torch.save` that was cut off, or whose description of the tensors was changed.

    The tensors themselves are not read, so this is instant for files of any size.

    Raises:
        CheckpointError: names the file.
    """
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":  # a file of torch before 1.6 has no table of contents to look at
                return
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    archive.read(name)  # compares its checksum
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except read_errors() as error:
        raise CheckpointError(f"{path}: is damaged or was cut off ({error})") from error


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], problem: str = "cannot be read") -> Iterator[None]:
    """Turn what another library raises about a file into one line that names it.

    Args:
        path: the file, or the folder if it is not known which one.
        problem: what to say about it.

    Raises:
        CheckpointError: the block raised one of `read_errors`, or a bare `Exception`, as `tokenizers` does. Errors of
            ours and a full memory pass unchanged.
    """
    try:
        yield
    except LlavaError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or (not isinstance(error, read_errors()) and type(error) is not Exception):
            raise
        text = next((line for line in str(error).splitlines() if line.strip()), "no further message")
        if isinstance(error, ValueError) and str(path) in text:  # by a module of ours that needs nothing of llava
            raise CheckpointError(str(error)) from error
        raise CheckpointError(f"{path}: {problem} ({type(error).__name__}: {text[:300]})") from error


@contextlib.contextmanager
def naming(config_file: Path, *others: type[LlavaError]) -> Iterator[None]:
    """Say of a refused setting that it comes from a file, not from a flag of this program.

    Args:
        config_file: the file.
        others: kinds of errors to change in addition to `FlagError`.

    Raises:
        CheckpointError: the block raised one of them.
    """
    try:
        yield
    except (FlagError, *others) as error:
        if str(config_file) in str(error):
            raise
        raise CheckpointError(f"{config_file}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, is a Git LFS pointer or not JSON, or holds something else than an object.
    """
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__} where a JSON object is expected")
    return value
