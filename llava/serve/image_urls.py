"""Images of a request: from `data:` addresses always, from elsewhere only where the server allows it.

A server that opens whatever address it is sent can be made to read its own files and the network behind it, so files
need `--image-folder` and each remote host has to be named by `--allow-image-host`.
"""

from __future__ import annotations

import base64
import binascii
import io
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from PIL import Image, UnidentifiedImageError

from llava.data.image_bounds import check_made
from llava.data.images import convert_rgb, load_image
from llava.errors import BadImageError
from llava.eval.answering.loading import LoadedModel


@dataclass(frozen=True)
class ImagePolicy:
    """What images a server opens.

    Attributes:
        max_bytes: size of one image as it comes, decoded from base64.
        max_pixels: width times height, looked up before anything is decoded; of what is made of an image, too.
        folder: `file:` addresses are paths below it; None: refused.
        hosts: names (`host` or `host:port`) from which http and https addresses are fetched.
        seconds: for one fetch.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 200_000_000
    folder: Path | None = None
    hosts: frozenset[str] = frozenset()
    seconds: float = 10.0

    def open(self, url: str, where: str) -> Image.Image:
        """The image at an address, as RGB.

        Args:
            url: `data:image/...;base64,...`, or where allowed `file:NAME`, `http://...`, `https://...`.
            where: the place in the request, for errors.

        Raises:
            BadImageError: not allowed, too large, or no image.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return self._decode(self._inline(url, where), where)
        if scheme == "file":
            return self._file(url, where)
        if scheme in ("http", "https"):
            return self._decode(self._fetch(url, where), where)
        raise BadImageError(
            f"{where}: '{url[:40]}' is not an image address; send the image itself: data:image/png;base64,..."
        )

    def open_for(self, loaded: LoadedModel) -> Callable[[str, str], Image.Image]:
        """`open` for a model, which also refuses what would become too large on the way to its pixel values.

        Args:
            loaded: the model with its image processor.
        """
        config = loaded.model.config

        def opened(url: str, where: str) -> Image.Image:
            image = self.open(url, where)
            check_made(
                image.size,
                loaded.image_processor,
                getattr(config, "image_aspect_ratio", None),
                getattr(config, "image_grid_pinpoints", None),
                name=where,
                most=self.max_pixels,
                instead=", or start the server with a higher --max-image-pixels",
            )
            return image

        return opened

    def _inline(self, url: str, where: str) -> bytes:
        head, comma, body = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadImageError(f"{where}: only base64 is read: data:image/png;base64,... (found '{head[:40]}')")
        if len(body) * 3 // 4 > self.max_bytes + 2:
            self._too_large(len(body) * 3 // 4, where)
        try:
            return base64.b64decode(body, validate=True)
        except binascii.Error as error:
            raise BadImageError(f"{where}: is no base64: {error}") from error

    def _file(self, url: str, where: str) -> Image.Image:
        if self.folder is None:
            raise BadImageError(
                f"{where}: this server opens no files; send the image itself (data:...), or start it with "
                "--image-folder"
            )
        name = unquote(url.partition(":")[2]).lstrip("/")
        return self._sized(load_image(self.folder, name, where, follow_links=False), where)

    def _fetch(self, url: str, where: str) -> bytes:
        self._check_host(url, where)
        opener = urllib.request.build_opener(_SameRules(self, where))
        try:
            with opener.open(url, timeout=self.seconds) as response:
                content = bytes(response.read(self.max_bytes + 1))
        except (OSError, ValueError) as error:
            raise BadImageError(f"{where}: cannot read an image from {url[:200]}: {error}") from error
        return content

    def _check_host(self, url: str, where: str) -> None:
        host = urlsplit(url).netloc.lower()
        if host not in self.hosts:
            raise BadImageError(
                f"{where}: this server does not fetch from '{host}'; send the image itself (data:...), or start it "
                f"with --allow-image-host {host}"
            )

    def _decode(self, content: bytes, where: str) -> Image.Image:
        if len(content) > self.max_bytes:
            self._too_large(len(content), where)
        try:
            image = Image.open(io.BytesIO(content))
        except UnidentifiedImageError as error:  # its own message holds nothing but an address in memory
            raise BadImageError(f"{where}: is not an image of a known format") from error
        except Exception as error:  # Pillow's decoders raise many kinds for broken files
            raise BadImageError(f"{where}: is not an image: {error}") from error
        with image:
            return convert_rgb(self._sized(image, where), where)

    def _sized(self, image: Image.Image, where: str) -> Image.Image:
        if image.width * image.height > self.max_pixels:
            raise BadImageError(
                f"{where}: {image.width} x {image.height} pixels; this server takes up to {self.max_pixels}, make the "
                "image smaller, or start the server with a higher --max-image-pixels"
            )
        return image

    def _too_large(self, size: int, where: str) -> None:
        raise BadImageError(f"{where}: {size} bytes; this server takes up to {self.max_bytes}, make the image smaller")


class _SameRules(urllib.request.HTTPRedirectHandler):
    """Follows a redirection only to a host that may be asked directly."""

    def __init__(self, policy: ImagePolicy, where: str) -> None:
        self.policy, self.where = policy, where

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The next request.

        Raises:
            BadImageError: it goes elsewhere.
        """
        self.policy._check_host(newurl, self.where)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
