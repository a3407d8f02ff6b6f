"""Small helpers that belong to no part of the model (upstream `llava/utils.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.utils import logging


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """Keep transformers quiet, errors aside, while a block runs: for reports that the caller checks by itself."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
