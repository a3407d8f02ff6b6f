"""Votes of visitors on answers, in upstream's log: `YEAR-MONTH-DAY-conv.json`, a JSON object on each line.

A row has the keys of upstream's `gradio_web_server.py` (`tstamp`, `type`, `model`, `state`, `ip`) and `images`, which
upstream has in the rows of its answers: the names of `serve_images/YEAR-MONTH-DAY/NAME.jpg`. Only what a visitor votes
on is written.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image

from llava.errors import FlagError, LlavaError
from llava.runtime.output import replacing
from llava.serve.page.conversation import Conversation

VOTES = ("upvote", "downvote", "flag")
"""Upstream's types of rows that a visitor makes."""

ROLES = ("user", "assistant")
QUALITY = 95
"""Of the JPEG files."""


class FeedbackError(LlavaError):
    """A vote could not be saved."""


class Feedback:
    """The log in a folder; several visitors may vote at once.

    Args:
        folder: made if it is not there.

    Raises:
        FlagError: nothing can be written there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FlagError(f"--feedback-dir {folder}: cannot be made ({error.strerror})") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise FlagError(f"--feedback-dir {folder}: this user may not write there; name another directory")

    def vote(self, kind: str, conversation: Conversation, image: Image.Image | None, visitor: str) -> Path:
        """Append a vote on the last answer.

        Args:
            kind: one of `VOTES`.
            conversation: ends with the answer.
            image: RGB, that the conversation is about.
            visitor: address of the visitor.

        Returns:
            The file of the log.

        Raises:
            FeedbackError: it cannot be written; the log is as before, or its last line is not whole and the next vote
                begins a new one.
        """
        now = datetime.datetime.now()
        day = f"{now.year}-{now.month:02d}-{now.day:02d}"
        path = self.folder / f"{day}-conv.json"
        row = {
            "tstamp": round(time.time(), 4),
            "type": kind,
            "model": conversation.turns[-1].model,
            "state": state_of(conversation),
            "images": [],
            "ip": visitor,
        }
        with self._lock:
            try:
                row["images"] = [] if image is None else [self._save(image, day)]
                _append(path, json.dumps(row) + "\n")
            except OSError as error:
                raise FeedbackError(f"the vote could not be saved: {error.strerror}") from error
        return path

    def _save(self, image: Image.Image, day: str) -> str:
        """Upstream's name of an image: the MD5 of its pixels."""
        name = hashlib.md5(image.tobytes(), usedforsecurity=False).hexdigest()
        path = self.folder / "serve_images" / day / f"{name}.jpg"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                image.save(partial, "JPEG", quality=QUALITY)
        return name


def state_of(conversation: Conversation) -> dict[str, Any]:
    """The conversation under upstream's keys; the template is the server's, so its words are empty."""
    said = [
        [role, text]
        for turn in conversation.turns
        if turn.problem is None
        for role, text in zip(ROLES, (turn.question, turn.answer), strict=True)
    ]
    return {"system": "", "roles": list(ROLES), "messages": said, "offset": 0, "sep": "", "sep2": None}


def _append(path: Path, line: str) -> None:
    """Add a line by one write; behind a line that was not written whole it begins a new one."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with open(descriptor, "ab", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        file.write((b"\n" if torn else b"") + line.encode("utf-8"))
        os.fsync(descriptor)
