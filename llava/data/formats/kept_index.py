"""Tables of where the rows of a large file are, kept from run to run: next to the file, or in the cache folder.

A kept table is a `.npy` followed by one line of JSON: the digest of the data file, its size and times, and the digest
of the table. One of another content, damaged or cut off is noticed and made again; nothing in it is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.sizes import SIZES
from llava.errors import FlagError
from llava.runtime.output import replacing

logger = logging.getLogger(__name__)

INDEX = np.dtype([("start", "<u8"), ("length", "<u8"), *((name, SIZES[name]) for name in SIZES.names or ())])
"""Of each row: its first byte, its number of bytes, its words and its images."""

SUFFIX = ".rows.npy"

VERSION = 2
"""Of the table and of what counts as a word and an image; another one is made again."""

KEPT_FROM = 16 << 20
"""Bytes of a data file from which on its table is kept; smaller ones are read in a fraction of a second."""

RECENT = 2_000_000_000
"""Nanoseconds: a file that was changed so shortly before it was read may have been changed again with equal times."""

NPY = b"\x93NUMPY"


@dataclass(frozen=True)
class Stamp:
    """What tells without reading that a file is the same: nobody can change a file and keep `changed`."""

    size: int
    modified: int
    changed: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp of a file."""
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@dataclass(frozen=True)
class _About:
    """The line behind a table."""

    version: int
    sha256: str
    stamp: Stamp
    made: int
    table: str

    @classmethod
    def parse(cls, line: bytes) -> _About:
        """Raises ValueError, TypeError or LookupError for anything else than such a line."""
        values = json.loads(line)
        return cls(**{**values, "stamp": Stamp(**values["stamp"])})

    def trusts(self, stamp: Stamp) -> bool:
        """Whether the file is the same without reading it."""
        return stamp == self.stamp and max(stamp.modified, stamp.changed) + RECENT < self.made


class HashingReader(io.RawIOBase):
    """A file that is read once from its beginning and hashed on the way."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._hash = hashlib.sha256()

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read and hash."""
        count = self._file.readinto(buffer)
        self._hash.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def digest(self) -> str:
        """Of all that was read, once the rest is read too."""
        while self.read(1 << 20):
            pass
        return self._hash.hexdigest()


def places(path: Path) -> list[Path]:
    """Where the table of a data file may be kept, in the order in which they are tried."""
    own = path.with_name(f"{path.name}{SUFFIX}")
    cache = os.environ.get("XDG_CACHE_HOME")
    if not cache:
        try:
            cache = str(Path.home() / ".cache")
        except RuntimeError:  # a user without a home folder, as in many containers
            return [own]
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return [own, Path(cache) / "llava-extensions" / "rows" / f"{name}{SUFFIX}"]


def index_of(path: Path, scan: Callable[[Any], np.ndarray], kept_from: int = KEPT_FROM) -> np.ndarray:
    """The table of a data file, kept or made.

    Args:
        path: the data file.
        scan: makes the table from the file, opened for reading bytes.
        kept_from: bytes of the file from which on the table is kept.

    Returns:
        `INDEX` (rows,).

    Raises:
        FlagError: the file changed while it was read.
    """
    before = Stamp.of(path)
    keeps = before.size >= kept_from
    table = _kept(path, before) if keeps else None
    if table is not None:
        return table
    with HashingReader(path) as raw, io.BufferedReader(raw, 1 << 20) as file:
        table = scan(file)
        digest = raw.digest()
    if Stamp.of(path) != before:
        raise FlagError(f"--data_path {path}: the file changed while it was read; start again when it is complete")
    if keeps:
        _keep(path, table, digest, before)
    return table


def _kept(path: Path, stamp: Stamp) -> np.ndarray | None:
    """A kept table that is of this content."""
    digest = None
    for place in places(path):
        found = _read(place)
        if found is None:
            continue
        table, about = found
        fits = about.version == VERSION and about.stamp.size == stamp.size
        if fits and about.trusts(stamp):
            return table
        if fits and digest is None:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        if fits and digest == about.sha256:
            _write(place, table, digest, stamp)  # so that the file is not read again next time
            return table
        logger.warning("%s is of another content of %s; it is made again", place, path)
    return None


def _read(place: Path) -> tuple[np.ndarray, _About] | None:
    """A table and what is said of it; None if there is none, or it is damaged."""
    try:
        content = place.read_bytes()
    except OSError:  # mostly there is none
        return None
    table, _, line = content.rstrip(b"\n").rpartition(b"\n")
    try:
        about = _About.parse(line)
        if about.table != hashlib.sha256(table).hexdigest():
            raise ValueError("the digest is of another table")
    except (ValueError, TypeError, LookupError) as error:
        logger.warning("%s is damaged, or is not a table of rows (%s); it is made again", place, error)
        return None
    return np.load(io.BytesIO(table), allow_pickle=False), about


def _keep(path: Path, table: np.ndarray, digest: str, stamp: Stamp) -> None:
    """Keep a table at the first place that takes it."""
    if not any(_write(place, table, digest, stamp) for place in places(path)):
        logger.warning("the rows of %s are found again at every start: %s cannot be written", path, places(path)[-1])


def _write(place: Path, table: np.ndarray, digest: str, stamp: Stamp) -> bool:
    """Write a table whole; False where that is not possible, or where somebody else's file is."""
    if not _may_be_replaced(place):
        return False
    content = io.BytesIO()
    np.save(content, table, allow_pickle=False)
    about = _About(VERSION, digest, stamp, time.time_ns(), hashlib.sha256(content.getbuffer()).hexdigest())
    try:
        with replacing(place) as temporary, temporary.open("wb") as file:
            file.write(content.getbuffer())
            file.write(b"\n" + json.dumps(asdict(about)).encode() + b"\n")
    except (FlagError, OSError):
        return False
    return True


def _may_be_replaced(place: Path) -> bool:
    """Whether nothing is there, or an empty file, or a `.npy` with the columns of a table."""
    try:
        with place.open("rb") as file:
            head = file.read(1 << 10)
    except FileNotFoundError:
        return not place.is_symlink()
    except OSError:
        return False
    return not head or (head.startswith(NPY) and all(repr(name).encode() in head for name in INDEX.names or ()))


def table_from(found: Iterator[tuple[int, int, int, int]]) -> np.ndarray:
    """`INDEX` (rows,) from its entries."""
    return np.fromiter(found, INDEX)
