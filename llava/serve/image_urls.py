"""Images of a request: from `data:` addresses always, from elsewhere only where the server allows it.

A server that opens whatever address it is sent can be made to read its own files and the network behind it, so files
need `--image-folder` and each remote host has to be named by `--allow-image-host`.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError

from llava.data.image_bounds import check_made
from llava.data.images import convert_rgb, image_path
from llava.data.tiling import Size
from llava.errors import BadImageError
from llava.eval.answering.loading import LoadedModel
from llava.serve.problems import short

LARGE = 25_000_000
"""Pixels from which images are decoded one at a time, by all requests together: each takes several bytes a pixel."""

ONE_LARGE = threading.Lock()


@dataclass(frozen=True)
class ImagePolicy:
    """What images a server opens.

    Attributes:
        max_bytes: size of one image as it comes, decoded from base64.
        max_pixels: width times height, looked up before anything is decoded; of what is made of an image, too.
        max_request_pixels: of all images of a request.
        folder: `file:` addresses are paths below it; None: refused.
        hosts: names (`host` or `host:port`) from which http and https addresses are fetched.
        seconds: for all images of a request that are fetched.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 200_000_000
    max_request_pixels: int = 400_000_000
    folder: Path | None = None
    hosts: frozenset[str] = frozenset()
    seconds: float = 10.0

    def open(
        self,
        url: str,
        where: str,
        fetched: Mapping[str, bytes] | None = None,
        check: Callable[[Size], None] | None = None,
    ) -> Image.Image:
        """The image at an address, as RGB.

        Args:
            url: `data:image/...;base64,...`, or where allowed `file:NAME`, `http://...`, `https://...`.
            where: the place in the request, for errors.
            fetched: what `fetch_images` has brought from http and https addresses.
            check: called with width and height before anything is decoded; raises if they are out of bounds.

        Raises:
            BadImageError: not allowed, too large, or no image.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return self._decode(io.BytesIO(self._inline(url, where)), where, check)
        if scheme == "file":
            return self._decode(self._file(url, where), where, check)
        if fetched is not None and url in fetched:
            return self._decode(io.BytesIO(fetched[url]), where, check)
        raise BadImageError(
            f"{where}: {short(url)} is not an image address; send the image itself: data:image/png;base64,..."
        )

    def open_for(
        self, loaded: LoadedModel, fetched: Mapping[str, bytes] | None = None, stack: ExitStack | None = None
    ) -> Callable[[str, str], Image.Image]:
        """`open` for the images of one request.

        What would become too large on the way to pixel values is refused from its width and height, before it is
        decoded; so are more pixels than one request may have.

        Args:
            loaded: the model with its image processor.
            fetched: see `open`.
            stack: of the request; holds what large images wait for until it is closed.
        """
        config = loaded.model.config
        total = 0

        def check(size: Size, where: str) -> None:
            nonlocal total
            check_made(
                size,
                loaded.image_processor,
                getattr(config, "image_aspect_ratio", None),
                getattr(config, "image_grid_pinpoints", None),
                name=where,
                most=self.max_pixels,
                instead=", or start the server with a higher --max-image-pixels",
            )
            total += size[0] * size[1]
            if total > self.max_request_pixels:
                raise BadImageError(
                    f"{where}: the images have {total} pixels or more together; this server takes up to "
                    f"{self.max_request_pixels}, send smaller or fewer images"
                )
            if stack is not None and total > LARGE and total - size[0] * size[1] <= LARGE:
                stack.enter_context(ONE_LARGE)

        return lambda url, where: self.open(url, where, fetched, lambda size: check(size, where))

    def _inline(self, url: str, where: str) -> bytes:
        head, comma, body = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadImageError(f"{where}: only base64 is read: data:image/png;base64,... (found {short(head)})")
        if len(body) * 3 // 4 > self.max_bytes + 2:
            self._too_large(len(body) * 3 // 4, where)
        try:
            return base64.b64decode(body, validate=True)
        except ValueError as error:
            raise BadImageError(f"{where}: is no base64: {error}") from error

    def _file(self, url: str, where: str) -> Path:
        if self.folder is None:
            raise BadImageError(
                f"{where}: this server opens no files; send the image itself (data:...), or start it with "
                "--image-folder"
            )
        name = unquote(url.partition(":")[2]).lstrip("/")
        try:
            path = image_path(self.folder, name, where, follow_links=False)
        except BadImageError as error:  # its words are the owner's: they name folders of this machine
            raise BadImageError(
                f"{where}: the file {short(name)} is missing, or outside the image folder of this server"
            ) from error
        if path.stat().st_size > self.max_bytes:
            self._too_large(path.stat().st_size, where)
        return path

    def _decode(self, file: io.BytesIO | Path, where: str, check: Callable[[Size], None] | None) -> Image.Image:
        if isinstance(file, io.BytesIO) and file.getbuffer().nbytes > self.max_bytes:
            self._too_large(file.getbuffer().nbytes, where)
        try:
            image = Image.open(file)
        except UnidentifiedImageError as error:  # its own message holds nothing but an address in memory
            raise BadImageError(f"{where}: is not an image of a known format") from error
        except Exception as error:  # Pillow's decoders raise many kinds for broken files
            said = error.strerror if isinstance(error, OSError) and error.strerror else error  # without the file's path
            raise BadImageError(f"{where}: is not an image: {said}") from error
        with image:
            self._sized(image, where)
            if check is not None:
                check(image.size)
            return convert_rgb(image, where)

    def _sized(self, image: Image.Image, where: str) -> None:
        if image.width * image.height > self.max_pixels:
            raise BadImageError(
                f"{where}: {image.width} x {image.height} pixels; this server takes up to {self.max_pixels}, make the "
                "image smaller, or start the server with a higher --max-image-pixels"
            )

    def _too_large(self, size: int, where: str) -> None:
        raise BadImageError(f"{where}: {size} bytes; this server takes up to {self.max_bytes}, make the image smaller")
