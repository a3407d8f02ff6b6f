"""What every program here does around its work: errors as one line, versions for records, quiet libraries."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from transformers.utils import logging

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
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def run_program(main: Callable[[], Any]) -> None:
    """Run a program from the command line; an error that the user can mend ends it by its message alone, status 1."""
    try:
        main()
    except LlavaError as error:
        sys.exit(f"error: {error}")
