"""What every program here does around its work: errors as one line, output to any terminal, versions for records.

Imports the standard library alone, so that a program that needs no model starts at once.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TextIO

from llava.errors import LlavaError

PACKAGES = (
    *("llava-extensions", "torch", "torchvision", "transformers", "tokenizers", "sentencepiece", "peft", "accelerate"),
    *("deepspeed", "flash-attn", "bitsandbytes", "pillow"),
)
"""Distributions that can change a number."""


def package_versions() -> dict[str, str]:
    """Versions of Python and of those of `PACKAGES` that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """Keep transformers quiet, errors aside, while a block runs: for reports that the caller checks by itself."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def escape_what_cannot_be_printed(stream: TextIO) -> None:
    """Escape characters that a stream's encoding does not have (`backslashreplace`); no `UnicodeEncodeError` is raised.

    The encoding stays, so what it has is readable on its terminal. Where the user chose how to replace characters
    (`PYTHONIOENCODING=ascii:replace`), or the stream is not that of a process (a notebook's), nothing changes.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return
    utf8 = codecs.lookup(stream.encoding).name == "utf-8"
    # In the C locale Python sets `surrogateescape`, which prints file names byte by byte and still has no letters.
    if stream.errors == "strict" or (stream.errors == "surrogateescape" and not utf8):
        stream.reconfigure(errors="backslashreplace")


def run_program(main: Callable[[], Any]) -> None:
    """Run a program from the command line.

    An error that the user can fix ends it with status 1 and its message alone. What it prints reaches a terminal of
    any encoding; files are written in UTF-8 whatever that is.
    """
    for stream in (sys.stdout, sys.stderr):
        escape_what_cannot_be_printed(stream)
    try:
        main()
    except LlavaError as error:
        sys.exit(f"error: {error}")
