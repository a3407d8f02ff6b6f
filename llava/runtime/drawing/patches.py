"""Kept patches and words as images and as HTML: dropped patches faded over the image, dropped words crossed out.

Knows no model: it is given an image, indices and words. `dynamic.figures` writes files of them, `llava.serve.web` shows
them next to an answer.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

FADED = (255, 255, 255)
FADED_SHARE = 0.82
"""How much of a dropped patch is white."""


@dataclass(frozen=True)
class Word:
    """A token of text.

    Attributes:
        text: with the blank in front that it stands for.
        kept: whether the sparse layers remember it.
    """

    text: str
    kept: bool


@dataclass(frozen=True)
class KeptImage:
    """An image as the vision tower sees it.

    Attributes:
        image: RGB.
        grid: rows and columns of patches.
        kept: indices of the kept patches, row by row.
    """

    image: Image.Image
    grid: tuple[int, int]
    kept: Collection[int]

    @property
    def caption(self) -> str:
        """Number of kept patches of all."""
        patches = self.grid[0] * self.grid[1]
        return f"{len(self.kept)} of {patches} patches kept ({len(self.kept) / patches:.0%})"


@dataclass(frozen=True)
class TextSegment:
    """A named run of words, for example the last instruction or the answer."""

    title: str
    words: Sequence[Word]

    @property
    def caption(self) -> str:
        """Number of kept tokens of all."""
        kept = sum(word.kept for word in self.words)
        return f"{self.title}: {kept} of {len(self.words)} tokens kept"


def fade_dropped(kept_image: KeptImage) -> Image.Image:
    """The image with its dropped patches faded to white.

    Raises:
        ValueError: an index lies outside the grid.
    """
    rows, columns = kept_image.grid
    outside = [index for index in kept_image.kept if not 0 <= index < rows * columns]
    if outside:
        raise ValueError(f"patch {outside[0]} lies outside a grid of {rows} x {columns} patches")
    image = kept_image.image.convert("RGB")
    faded = Image.blend(image, Image.new("RGB", image.size, FADED), FADED_SHARE)
    width, height = image.size
    for index in set(range(rows * columns)) - set(kept_image.kept):
        row, column = divmod(index, columns)
        box = (
            *(column * width // columns, row * height // rows),
            *((column + 1) * width // columns, (row + 1) * height // rows),
        )
        image.paste(faded.crop(box), box)
    return image


def kept_html(images: Sequence[KeptImage], segments: Sequence[TextSegment]) -> str:
    """Each image next to what is kept of it, then the words, as HTML with everything inside; texts are escaped.

    Dropped words have the class `dropped`, kept ones `kept`, their paragraph `words`.
    """
    parts = []
    for kept_image in images:
        for image in (kept_image.image.convert("RGB"), fade_dropped(kept_image)):
            parts.append(f'<figure><img src="{png_url(image)}" alt=""></figure>')
        parts.append(f"<p>{escape(kept_image.caption)}</p>")
    for segment in segments:
        words = "".join(
            f'<span class="{"kept" if word.kept else "dropped"}">{escape(word.text)}</span>' for word in segment.words
        )
        parts.append(f'<h2>{escape(segment.caption)}</h2><p class="words">{words.replace(chr(10), "<br>")}</p>')
    return "\n".join(parts)


def png_url(image: Image.Image) -> str:
    """The image as a `data:` address."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
