"""What a model did while it answered, drawn: kept patches, kept words, bars of shares, as one piece of HTML.

It is drawn by its kind (`llava.details`), so that the page needs no extension. What a server sends is checked first,
and all texts are escaped.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from llava.data.images import read_rgb
from llava.details import Detail, KeptPatches, KeptWords, Shares
from llava.errors import LlavaError
from llava.runtime.drawing.charts import PALETTE, share_bars
from llava.runtime.drawing.patches import KeptImage, TextSegment, Word, kept_html
from llava.serve.page.client import ServerError
from llava.serve.schema import Details

PREFIX = "data:image/png;base64,"
LARGEST = 8 * 2**20
"""Characters of an image in details."""

STYLE = """<style>
.details figure { display: inline-block; margin: 4px; } .details img { width: 168px; image-rendering: pixelated; }
.details .words { line-height: 1.9; } .details .dropped { color: #b8b8b8; text-decoration: line-through #b3261e; }
.details h2 { font-size: 1em !important; margin: 0.6em 0 0.2em !important; }
.details .legend span { margin-right: 1em; }
.details svg { max-width: 100%; height: auto; } .details svg text { fill: currentColor; }
</style>"""


def details_html(details: Any) -> str:
    """The drawing of a server's details; empty if it sent none.

    Raises:
        ServerError: they have another form than this page knows.
    """
    if details is None:
        return ""
    try:
        said = Details.model_validate(details)
        images = [_image(url) for url in said.images]
        parts = [part for name, each in said.extensions.items() for part in _drawn(name, each, images)]
    except (ValueError, LlavaError) as error:  # pydantic's errors are ValueErrors
        problem = f"{type(error).__name__}: {str(error)[:200]}"
        raise ServerError(f"the server's details cannot be drawn: {problem}") from error
    if not parts:
        return words_html("This model has no extension that says what it did.")
    return f'{STYLE}<div class="details">{"".join(parts)}</div>'


def words_html(words: str) -> str:
    """Words in the place of a drawing."""
    return f'<div class="details"><p>{escape(words)}</p></div>'


def _image(url: object) -> Image.Image:
    """An image of the details.

    Raises:
        ValueError: it is not a PNG in an address, or too large.
    """
    if not isinstance(url, str) or not url.startswith(PREFIX) or len(url) > LARGEST:
        raise ValueError("an image is not a PNG in a data: address")
    try:
        content = base64.b64decode(url.removeprefix(PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError(f"an image is not base64: {error}") from error
    return read_rgb(io.BytesIO(content), "an image of the details")


def _drawn(name: str, said: Sequence[Detail], images: Sequence[Image.Image]) -> Iterator[str]:
    """What one extension says.

    Raises:
        ValueError: it speaks of an image that is not there, or of patches outside of it.
    """
    patches = [_kept(each, images) for each in said if isinstance(each, KeptPatches)]
    segments = [
        TextSegment(each.title, [Word(text, kept) for text, kept in each.words])
        for each in said
        if isinstance(each, KeptWords)
    ]
    if patches or segments:
        yield f"<section aria-label='{escape(name)}'>{kept_html(patches, segments)}</section>"
    for each in said:
        if isinstance(each, Shares):
            yield f"<section aria-label='{escape(name)}'>{_bars(each)}</section>"


def _kept(patches: KeptPatches, images: Sequence[Image.Image]) -> KeptImage:
    if not 0 <= patches.image < len(images) or min(patches.grid) < 1:
        raise ValueError(f"image {patches.image} of {len(images)} with a grid of {patches.grid}")
    return KeptImage(images[patches.image], patches.grid, patches.kept)


def _bars(shares: Shares) -> str:
    """Bars under a title, with the names of their parts."""
    if any(len(values) != len(shares.parts) or not all(0 <= each <= 1 for each in values) for _, values in shares.rows):
        raise ValueError(f"the shares of {shares.title!r} do not fit its {len(shares.parts)} parts")
    legend = "".join(
        f'<span><b style="color:{PALETTE[number % len(PALETTE)]}">■</b> {escape(part)}</span>'
        for number, part in enumerate(shares.parts)
    )
    rows: Mapping[str, Sequence[float]] = dict(shares.rows)
    return f'<h2>{escape(shares.title)}</h2><p class="legend">{legend}</p>{share_bars(rows)}'
