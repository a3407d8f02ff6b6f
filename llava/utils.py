"""Small helpers that belong to no part of the model (upstream `llava/utils.py`)."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.utils import logging

from llava.errors import CheckpointError, LlavaError
from llava.runtime.files import refuse_pointer

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
