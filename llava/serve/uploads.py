"""Files that visitors of a page upload: which paths a request may name, and how large a file may be.

Shared by `llava.serve.web` and `mma.demo`. gradio puts every upload into a folder of its own below one folder,
`FOLDER/DIGEST/NAME`. The digest is seeded, so it is known to the visitor who uploaded the file and to nobody else. A
page's API takes any path, so each one is checked. gradio would also fetch what an http(s) address names, whatever its
size, into that very folder: both ways to name an address are refused before it does.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import BadImageError, FlagError
from llava.serve.guard import App, Receive, Scope, Send, refuse
from llava.serve.image_urls import ImagePolicy
from llava.serve.problems import RequestError

if TYPE_CHECKING:
    import gradio as gr

ALLOWED_PATHS = "GRADIO_ALLOWED_PATHS"
"""Variable of the environment by which gradio offers folders of the machine."""

MAX_UPLOAD_BYTES = ImagePolicy.max_bytes
"""Of an image, as it comes; the page is to be launched with it."""

DIGEST = re.compile(r"[0-9a-f]{64}")
ADDRESS = re.compile(r"\s*https?:", re.IGNORECASE)
FILE_OF_ADDRESS = re.compile(r"/file[=/]\s*https?:", re.IGNORECASE)
"""In the path of a request: gradio would fetch the address and hand on what comes."""

NOT_FETCHED = "this page fetches nothing from other hosts; upload the file"


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


def accept_uploads_alone(page: gr.Blocks) -> None:
    """Let a page refuse inputs that name a file by an http(s) address, whatever part of the page they are for.

    gradio moves the files of all inputs into its folder before a part sees them, those of a text box, too.
    """
    import gradio as gr

    move_and_read = page.preprocess_data

    async def preprocess_data(block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        if names_address(inputs):
            raise gr.Error(NOT_FETCHED, print_exception=False)
        return await move_and_read(block_fn, inputs, *args, **kwargs)

    page.preprocess_data = preprocess_data  # type: ignore[method-assign]


def names_address(inputs: Iterable[object]) -> bool:
    """Whether an object among the inputs, however deep, has an http(s) address as its `path`, which gradio goes by."""
    waiting = list(inputs)
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            path = value.get("path")
            if isinstance(path, str) and ADDRESS.match(path):
                return True
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return False


class NoProxy:
    """Wraps the application of a page: the route of files hands on no other host's.

    Args:
        app: what answers other requests.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on."""
        if scope["type"] == "http" and FILE_OF_ADDRESS.search(scope["path"]):
            await refuse(RequestError(NOT_FETCHED, status=403), send)
            return
        await self.app(scope, receive, send)


def launch_limits(*middleware: Any) -> dict[str, Any]:
    """Arguments of a page's `launch`: the size of an upload, no files of other hosts, and no tunnel to other machines.

    gradio's variables of the environment would open both; an argument wins over GRADIO_SHARE.

    Args:
        middleware: further ones, which come first.

    Raises:
        FlagError: GRADIO_ALLOWED_PATHS offers folders of this machine, over which no argument wins.
    """
    from starlette.middleware import Middleware

    if os.environ.get(ALLOWED_PATHS):
        raise FlagError(
            f"{ALLOWED_PATHS}={os.environ[ALLOWED_PATHS]}: visitors could read these folders; unset the variable"
        )
    chain = [*middleware, Middleware(NoProxy)]
    return {"share": False, "max_file_size": MAX_UPLOAD_BYTES, "app_kwargs": {"middleware": chain}}
