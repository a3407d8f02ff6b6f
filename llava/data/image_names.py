"""The images that a row names: the one definition of the keys that are read, for training, evaluation and the check.

Upstream reads `image`; data sets of other programs write `images`, which is read too. A row that names its images under
another key would be trained on, or asked, as text alone, so such a key is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import BadSampleError

if TYPE_CHECKING:
    from PIL import Image


class StoredImage(NamedTuple):
    """An image that is in the data itself: the bytes of its file, or an open image; and what to call it."""

    content: bytes | Image.Image
    name: str

    def __str__(self) -> str:
        return self.name


RowImage = str | StoredImage
"""An image of a row: its file's name in the image folder, or the image."""

READ_KEYS = ("image", "images")
"""Keys whose value is read: a file name or a list of file names."""

UNREAD_KEYS = (
    *("image_path", "image_paths", "image_file", "image_files", "image_name", "image_names", "image_url", "image_urls"),
    *("img", "imgs", "img_path", "img_paths", "picture", "pictures", "video", "videos", "video_path", "video_paths"),
)
"""Keys under which other data sets name images or videos."""


def image_names(row: Mapping[str, Any]) -> list[Any]:
    """A row's images, `RowImage` each: none if the keys are absent, null, or an empty list.

    Raises:
        BadSampleError: a value is neither a name nor a list of names, `image` and `images` name other files, or the row
            has no image but names something under a key that is not read.
    """
    if isinstance(row.get("image"), str) and row["image"] and row.get("images") is None:  # nearly all rows
        return [row["image"]]
    found = {key: _names(key, row[key]) for key in READ_KEYS if row.get(key) is not None}
    named = [names for names in found.values() if names]
    if len(named) == 2 and named[0] != named[1]:
        raise BadSampleError(
            f"'image' is {row['image']!r:.200}, but 'images' is {row['images']!r:.200}; write one of them"
        )
    if named:
        return named[0]
    for key in UNREAD_KEYS:
        if row.get(key):
            kind = "a video cannot be used" if key.startswith("video") else "write it as 'image'"
            raise BadSampleError(
                f"the row names {row[key]!r:.200} under '{key}', which is not read, and has no 'image': {kind}; the "
                f"keys that are read are {' and '.join(READ_KEYS)}"
            )
    return []


def _names(key: str, value: Any) -> list[Any]:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str | StoredImage) and name for name in names):
        raise BadSampleError(f"'{key}' must be a file name or a list of file names, not {value!r:.200}")
    return names


def is_mark(text: str) -> bool:
    """Whether what a user says marks an image: `<image>` begins or ends it, as in the data of LLaVA.

    Anywhere else it may be a word, as in a page of HTML that somebody asks about: a row without image keeps it as such.
    """
    text = text.strip()
    return text.startswith(DEFAULT_IMAGE_TOKEN) or text.endswith(DEFAULT_IMAGE_TOKEN)
