"""Files that visitors of a page upload: which paths a request may name, and how large a file may be.

Shared by `llava.serve.web` and `mma.demo`. gradio puts every upload into a folder of its own below one folder,
`FOLDER/DIGEST/NAME`. The digest is seeded, so it is known to the visitor who uploaded the file and to nobody else. A
page's API takes any path, so each one is checked.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from llava.errors import BadImageError
from llava.serve.image_urls import ImagePolicy

MAX_UPLOAD_BYTES = ImagePolicy.max_bytes
"""Of an image, as it comes; the page is to be launched with it."""

DIGEST = re.compile(r"[0-9a-f]{64}")


def uploaded_file(path: object, folder: str | Path) -> Path:
    """The file that a visitor has uploaded.

    Args:
        path: as the request names it.
        folder: where uploads are.

    Raises:
        BadImageError: it is not a regular file of at most `MAX_UPLOAD_BYTES` in the folder of an upload. What is
            elsewhere on the machine, and whether it is there, is not said.
    """
    absent = BadImageError("the image is on this server no more; upload it again")
    if not isinstance(path, str) or "\0" in path:
        raise absent
    root = Path(os.path.realpath(folder))
    file = Path(os.path.abspath(path))
    try:
        # The folder itself may be behind a link, such as /tmp; below it nothing may be one.
        start = next(place for place in (root, Path(os.path.abspath(folder))) if place in file.parents)
        digest, name = file.relative_to(start).parts
        found = os.lstat(root / digest / name)
        is_linked = (root / digest).is_symlink()
    except (StopIteration, ValueError, OSError):
        raise absent from None
    if not DIGEST.fullmatch(digest) or is_linked or not stat.S_ISREG(found.st_mode):
        raise absent
    if found.st_size > MAX_UPLOAD_BYTES:
        raise BadImageError(f"the image has {found.st_size} bytes; the most is {MAX_UPLOAD_BYTES}")
    return root / digest / name
