"""How long a row is, as far as the order of the data needs it: its words and its images, from the text alone.

Words are what `str.split` finds in the values of all turns; images are the names that the row has. No image is opened,
so an image counts the same whatever its size (`IMAGE_LENGTH`), as in upstream.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from llava.data.image_names import image_names
from llava.errors import BadSampleError

IMAGE_LENGTH = 128
"""Words that an image counts as in the length of a row (upstream's estimate)."""

SIZES = np.dtype([("words", "<u4"), ("images", "<u4")])
"""A table of sizes, an entry for each row."""

UNCOUNTED = 2**32 - 1
"""In place of the words of a row that cannot be counted."""


class Size(NamedTuple):
    """Number of blank-separated words and of images of a row."""

    words: int
    images: int


def count(row: Any) -> Size | None:
    """Words and images of a row; None if it is not an object, or its turns or images cannot be read."""
    try:
        words = sum(len(turn["value"].split()) for turn in row["conversations"])
        return Size(words, len(image_names(row)))
    except (BadSampleError, LookupError, TypeError, AttributeError):
        return None
