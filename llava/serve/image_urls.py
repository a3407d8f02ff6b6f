"""Images of a request: from `data:` addresses always, from elsewhere only where the server allows it.

A server that opens whatever address it is sent can be made to read its own files and the network behind it, so files
need `--image-folder` and each remote host has to be named by `--allow-image-host`.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError

from llava.data.image_bounds import check_made, made_size
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
        max_request_pixels: of all images of a request, as padded if they are.
        folder: `file:` addresses are paths below it; None: refused.
        hosts: names (`host` or `host:port`) from which http and https addresses are fetched.
        seconds: for all images of a request that are fetched.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 200_000_000
    max_request_pixels: int = 200_000_000
    folder: Path | None = None
    hosts: frozenset[str] = frozenset()
    seconds: float = 10.0

    def open(self, url: str, where: str, fetched: Mapping[str, bytes] | None = None) -> Image.Image:
        """The image at an address, as RGB.

        Args:
            url: `data:image/...;base64,...`, or where allowed `file:NAME`, `http://...`, `https://...`.
            where: the place in the request, for errors.
            fetched: what `fetch_images` has brought from http and https addresses.

        Raises:
            BadImageError: not allowed, too large, or no image.
        """
        with self.header(url, where, fetched) as image:
            return convert_rgb(image, where)

    def header(self, url: str, where: str, fetched: Mapping[str, bytes] | None = None) -> Image.Image:
        """The image at an address before it is decoded, to be closed; arguments and errors as `open`."""
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            image = self._begin(io.BytesIO(self._inline(url, where)), where)
        elif scheme == "file":
            image = self._begin(self._file(url, where), where)
        elif fetched is not None and url in fetched:
            image = self._begin(io.BytesIO(fetched[url]), where)
        else:
            raise BadImageError(
                f"{where}: {short(url)} is not an image address; send the image itself: data:image/png;base64,..."
            )
        self._check_pixels(image.size, where)
        return image

    def open_for(self, loaded: LoadedModel) -> Callable[[str, str], Image.Image]:
        """`open` for a model: what would become too large on the way to pixel values is refused, too."""
        return RequestImages(self, loaded).open

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

    def _begin(self, file: io.BytesIO | Path, where: str) -> Image.Image:
        if isinstance(file, io.BytesIO) and file.getbuffer().nbytes > self.max_bytes:
            self._too_large(file.getbuffer().nbytes, where)
        try:
            return Image.open(file)
        except UnidentifiedImageError as error:  # its own message holds nothing but an address in memory
            raise BadImageError(f"{where}: is not an image of a known format") from error
        except Exception as error:  # Pillow's decoders raise many kinds for broken files
            said = error.strerror if isinstance(error, OSError) and error.strerror else error  # without the file's path
            raise BadImageError(f"{where}: is not an image: {said}") from error

    def _check_pixels(self, size: Size, where: str) -> None:
        if size[0] * size[1] > self.max_pixels:
            raise BadImageError(
                f"{where}: {size[0]} x {size[1]} pixels; this server takes up to {self.max_pixels}, make the image "
                "smaller, or start the server with a higher --max-image-pixels"
            )

    def _too_large(self, size: int, where: str) -> None:
        raise BadImageError(f"{where}: {size} bytes; this server takes up to {self.max_bytes}, make the image smaller")


class RequestImages:
    """The images of one request: all are measured before the first of them is decoded.

    Args:
        policy: of the server.
        loaded: the model with its image processor.
        fetched: see `ImagePolicy.open`.
    """

    def __init__(self, policy: ImagePolicy, loaded: LoadedModel, fetched: Mapping[str, bytes] | None = None) -> None:
        self.policy, self.fetched = policy, fetched
        config = loaded.model.config
        self._processor = loaded.image_processor
        self._making = (getattr(config, "image_aspect_ratio", None), getattr(config, "image_grid_pinpoints", None))

    def check(self, urls: Sequence[str], where: str) -> int:
        """The pixels of the largest image, or of what is made of it, from the heads of the files.

        Raises:
            BadImageError: as `open`, or all images together have too many.
        """
        pixels = [self._measure(url, where) for url in urls]
        total = sum(pixels)
        if total > self.policy.max_request_pixels:
            raise BadImageError(
                f"{where}: the images have {total} pixels together, as padded; this server takes up to "
                f"{self.policy.max_request_pixels}, send smaller or fewer images, or start the server with a higher "
                "--max-request-pixels"
            )
        return max(pixels, default=0)

    def open(self, url: str, where: str) -> Image.Image:
        """The image at an address, as RGB.

        Raises:
            BadImageError: see `ImagePolicy.open`, or it would become too large.
        """
        self._measure(url, where)
        return self.policy.open(url, where, self.fetched)

    def _measure(self, url: str, where: str) -> int:
        with self.policy.header(url, where, self.fetched) as image:
            size = image.size
        check_made(
            size,
            self._processor,
            *self._making,
            name=where,
            most=self.policy.max_pixels,
            instead=", or start the server with a higher --max-image-pixels",
        )
        width, height = made_size(size, self._processor, *self._making)
        return max(width * height, size[0] * size[1])
