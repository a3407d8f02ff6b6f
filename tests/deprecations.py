"""What dependencies will remove is an error in the tests, so that it is replaced before it is gone.

In force on the recorded newest set (`constraints.txt`): another version may deprecate what the newest has no
replacement for. Libraries announce a removal by a warning or in their log; both are caught, whoever is named as the
caller, since a library often names itself. What cannot be fixed here is listed with the reason.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from llava.runtime.versions import LIBRARIES

ROOT = Path(__file__).resolve().parent.parent
CATEGORIES = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")
LOGGERS = ("transformers", "peft", "accelerate", "huggingface_hub", "datasets", "torch", "DeepSpeed")


class Known(NamedTuple):
    """A deprecation that is not ours to fix.

    Attributes:
        message: regular expression for the beginning of the message.
        reason: who has to change what.
    """

    message: str
    reason: str


KNOWN = (
    Known("`is_gradient_checkpointing` is deprecated", "PEFT asks a model for it by this name"),
    Known("Passing `fsdp` as a string is deprecated", "published command lines pass words, which transformers reads"),
    Known("Passing `generation_config` together with", "assisted decoding of transformers calls `generate` so itself"),
    Known("'future.no_silent_downcasting' is deprecated", "gradio asks pandas for it where it counts its own calls"),
    Known("The copy keyword is deprecated", "gradio passes it to pandas in the same place"),
    Known("`torch.jit.script_method` is deprecated", "raised inside torch when torchvision is imported"),
)


def on_newest_set() -> bool:
    """True if the libraries that matter are those recorded in `constraints.txt`."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    return all(version(name).partition("+")[0] == pins[name] for name in LIBRARIES)


def warning_filters() -> list[str]:
    """Filters in pytest's form; a later one goes before an earlier one."""
    if not on_newest_set():
        return []
    ignored = [f"ignore:{known.message}:{category}" for known in KNOWN for category in CATEGORIES]
    return [*(f"error::{category}" for category in CATEGORIES), *ignored]


class Announcements(logging.Handler):
    """Collects what libraries announce as deprecated in their logs, unless it is known."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of a record that announces a removal."""
        message = record.getMessage()
        if re.search("deprecat", message, re.IGNORECASE) and not any(re.match(k.message, message) for k in KNOWN):
            self.messages.append(f"{record.name}: {message}")


def announcements() -> Iterator[list[str]]:
    """Listen to the libraries' logs; yields the list that fills."""
    handler = Announcements()
    loggers = [logging.getLogger(name) for name in LOGGERS] if on_newest_set() else []
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield handler.messages
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
