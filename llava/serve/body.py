"""The JSON of a request: received under limits of size and time, and decoded where that cannot cost much.

What decoding costs is bounded by bytes that are counted as they arrive: brackets and commas make values, and the
decoder stops at each backslash. So neither a large body nor a deep one keeps the server from its other requests.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from llava.serve.problems import BusyError, RequestError

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_OPENED = 100_000
"""Lists and objects of a body."""

MAX_SEPARATED = 100_000
"""Commas of a body, in addition to those that its texts may have."""

MAX_ESCAPES = 4_000_000
"""Backslashes of a body; some encoders write one before each `/` of base64."""

MAX_KEYS = 256
"""Keys of one object."""

HELD_BODIES = 8
"""Bodies of the largest size that are held at the same time; many more of the usual size are."""

MEDIA_TYPE = "application/json"


@dataclass(frozen=True)
class BodyLimits:
    """What is received.

    Attributes:
        max_bytes: size of a body.
        seconds: until all of it has arrived.
        max_chars: of its texts; each may be a comma.
    """

    max_bytes: int = 64 * 2**20
    seconds: float = 60.0
    max_chars: int = 200_000


class Held:
    """Counts the bytes of the bodies, and of the images fetched for them, that are held at the same time.

    Args:
        most: that may be held.
    """

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """A function that counts bytes of one request, which are held until the context ends.

        It raises `BusyError` for bytes that are too many, and `RequestError` (413) if they would be without others.
        """
        own = 0

        def take(count: int) -> None:
            nonlocal own
            if own + count > self.most:
                raise RequestError(f"a request and its images may have {self.most} bytes together", status=413)
            if self.bytes + count > self.most:
                raise BusyError(f"the requests of this moment and their images have {self.most} bytes; try again later")
            self.bytes += count
            own += count

        try:
            yield take
        finally:
            self.bytes -= own


async def read_json(request: Request, limits: BodyLimits, take: Callable[[int], None] = lambda count: None) -> Any:
    """The decoded body of a request.

    Args:
        request: of which nothing has been read.
        limits: of size and time.
        take: called with the number of bytes that are about to be held; see `Held`.

    Raises:
        RequestError: it is of another type (415), too large (413), too slow (408), or not JSON (400), or the client
            went away (499).
        BusyError: too much is held for other requests.
    """
    # Of an extra of the installation.
    from starlette.requests import ClientDisconnect

    _check_type(request)
    try:
        async with asyncio.timeout(limits.seconds):
            content = await _receive(request, limits, take)
    except ClientDisconnect as error:
        raise RequestError("the client went away", status=499) from error
    except TimeoutError as error:
        raise RequestError(f"the body took more than {limits.seconds:g} s to arrive", status=408) from error
    return await asyncio.to_thread(_decode, content)


def _check_type(request: Request) -> None:
    """Refuse what is not JSON; any web page may send a text to any address, but JSON only to its own."""
    found = request.headers.get("content-type", "")
    header = Message()
    header["content-type"] = found
    if header.get_content_type() != MEDIA_TYPE or header.get_content_charset("utf-8") not in ("utf-8", "utf8"):
        raise RequestError(f"the content type is {found[:100]!r}; send {MEDIA_TYPE}", status=415)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise RequestError(f"the content encoding is {encoding[:100]!r}; send plain JSON", status=415)


async def _receive(request: Request, limits: BodyLimits, take: Callable[[int], None]) -> bytes:
    """All bytes, never holding more than the limit."""
    too_large = RequestError(
        f"the body has more than {limits.max_bytes} bytes; send smaller or fewer images", status=413
    )
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limits.max_bytes:
        raise too_large
    content, opened, separated, escapes = bytearray(), 0, 0, 0
    async for chunk in request.stream():
        if len(content) + len(chunk) > limits.max_bytes:
            raise too_large
        take(len(chunk))
        content += chunk
        opened += chunk.count(b"[") + chunk.count(b"{")
        separated += chunk.count(b",")
        escapes += chunk.count(b"\\")
        if opened > MAX_OPENED or separated > MAX_SEPARATED + limits.max_chars or escapes > MAX_ESCAPES:
            raise RequestError(
                f"the body has more than {MAX_OPENED} lists and objects, {MAX_SEPARATED + limits.max_chars} commas or "
                f"{MAX_ESCAPES} backslashes"
            )
    return bytes(content)


def _decode(content: bytes) -> Any:
    """The values of a body; nesting beyond 200 is refused by the decoder.

    Raises:
        RequestError: it is not JSON as RFC 8259 has it, which has neither NaN nor half of a character.
    """
    try:
        body = from_json(content.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    waiting = [body]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if len(value) > MAX_KEYS:
                raise RequestError(f"an object of the body has {len(value)} keys; it may have {MAX_KEYS}")
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return body
