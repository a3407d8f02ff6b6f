"""What libraries announce as deprecated fails a test; what is listed does not."""

from __future__ import annotations

import logging
import warnings

import pytest
from transformers.utils import logging as transformers_logging

from tests import deprecations

needs_newest = pytest.mark.skipif(not deprecations.on_newest_set(), reason="in force on the recorded newest set")


@needs_newest
@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_warnings_are_errors_whoever_raises_them(category: type[Warning]) -> None:
    with pytest.raises(category, match="soon gone"):
        warnings.warn_explicit("soon gone", category, "somewhere.py", 1, module="some.library")
    for known in deprecations.KNOWN:
        warnings.warn_explicit(f"{known.message} and so on", category, "somewhere.py", 1, module="some.library")


@needs_newest
def test_announcements_in_a_log() -> None:
    for messages in deprecations.announcements():
        transformers_logging.get_logger("transformers.anything").warning("`x` is deprecated, use `y`")
        transformers_logging.get_logger("transformers.anything").warning("no news")
        logging.getLogger("somewhere.else").warning("`z` is deprecated")
        logging.getLogger("transformers").warning(deprecations.KNOWN[0].message)
        assert messages == ["transformers.anything: `x` is deprecated, use `y`"]
        messages.clear()


def test_every_reason_is_a_sentence() -> None:
    assert all(len(known.reason.split()) > 4 for known in deprecations.KNOWN)
