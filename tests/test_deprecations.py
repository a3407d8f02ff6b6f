"""What libraries announce as deprecated fails a test; what is listed does not."""

from __future__ import annotations

import logging
import warnings

import pytest

from tests import deprecations

needs_newest = pytest.mark.skipif(not deprecations.on_newest_set(), reason="in force on the recorded newest set")


@needs_newest
@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_warnings_are_errors_whoever_raises_them(category: type[Warning]) -> None:
    with pytest.raises(category, match="soon gone"):
        warnings.warn_explicit("soon gone", category, "somewhere.py", 1, module="some.library")
    for known in deprecations.KNOWN:
        warnings.warn_explicit(f"{known.message} and so on", category, "somewhere.py", 1, module="some.library")


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("`x` is deprecated, use `y`", True),
        ("Deprecated: `x`", True),
        ("no news", False),
        *((f"{known.message} and so on", False) for known in deprecations.KNOWN),
    ],
)
def test_announcements_in_a_log(message: str, kept: bool) -> None:
    handler = deprecations.Announcements()
    handler.handle(logging.LogRecord("transformers.x", logging.WARNING, __file__, 1, message, None, None))
    assert handler.messages == ([f"transformers.x: {message}"] if kept else [])


@needs_newest
def test_the_libraries_are_listened_to() -> None:
    """Even below a logger that does not hand its records on, as that of transformers."""
    before = {name: list(logging.getLogger(name).handlers) for name in deprecations.LOGGERS}
    for messages in deprecations.announcements():
        assert all(len(logging.getLogger(name).handlers) > len(before[name]) for name in before)
        assert messages == []
    assert before == {name: list(logging.getLogger(name).handlers) for name in before}


def test_every_reason_is_a_sentence() -> None:
    assert all(len(known.reason.split()) > 4 for known in deprecations.KNOWN)
