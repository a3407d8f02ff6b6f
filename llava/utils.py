"""Small helpers that belong to no part of the model (upstream `llava/utils.py`)."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from transformers.utils import logging

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
