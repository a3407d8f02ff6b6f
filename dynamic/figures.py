"""Figures of what was kept: dropped patches faded over the image, dropped words crossed out, as PNG and as a page.

Corresponds to `dynamic_eval/visualize.py` of the original, which blanks the dropped patches. Knows no model: it is
given an image, indices and words.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageDraw, ImageFont

FADED = (255, 255, 255)
FADED_SHARE = 0.82
"""How much of a dropped patch is white."""
KEPT_COLOUR, DROPPED_COLOUR = (20, 20, 20), (190, 60, 50)
STYLE = """
body { font-family: sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222; }
figure { display: inline-block; margin: 6px; } img { width: 336px; image-rendering: pixelated; display: block; }
.words { line-height: 1.9; font-size: 17px; } .dropped { color: #b8b8b8; text-decoration: line-through #b3261e; }
"""


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


def draw_sheet(images: Sequence[KeptImage], segments: Sequence[TextSegment], *, side: int = 336) -> Image.Image:
    """One figure of everything: each image next to what is kept of it; below, the words, dropped ones crossed out.

    Args:
        images: images of the prompt.
        segments: texts.
        side: edge of a drawn image in pixels.
    """
    margin, width = 16, 2 * side + 3 * 16
    font = ImageFont.load_default(size=15)
    lines = [line for segment in segments for line in _wrapped(segment, font, width - 2 * margin)]
    line_height = 24
    height = margin + len(images) * (side + line_height + margin) + len(lines) * line_height + margin
    sheet = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(sheet), margin
    for kept_image in images:
        for column, image in enumerate((kept_image.image.convert("RGB"), fade_dropped(kept_image))):
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (margin + column * (side + margin), y))
        draw.text((margin, y + side + 3), kept_image.caption, fill=KEPT_COLOUR, font=font)
        y += side + line_height + margin
    for line in lines:
        x = float(margin)
        for word in line:
            length = draw.textlength(word.text, font=font)
            draw.text((x, y), word.text, fill=KEPT_COLOUR if word.kept else DROPPED_COLOUR, font=font)
            if not word.kept:
                draw.line((x, y + 10, x + length, y + 10), fill=DROPPED_COLOUR)
            x += length
        y += line_height
    return sheet


def _wrapped(segment: TextSegment, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[list[Word]]:
    """The segment as lines of at most `width` pixels, its caption first."""
    lines: list[list[Word]] = [[Word(segment.caption, True)], []]
    used = 0.0
    for word in segment.words:
        parts = word.text.split("\n")
        for number, part in enumerate(parts):
            length = font.getlength(part)
            if lines[-1] and (number or used + length > width):
                lines.append([])
                used = 0.0
            if part:
                lines[-1].append(Word(part, word.kept))
                used += length
    return [*lines, []]


GENERATOR = '<meta name="generator" content="Dynamic-LLaVA: kept tokens">'
"""By which an earlier page is known, whatever its title."""


def page(title: str, images: Sequence[KeptImage], segments: Sequence[TextSegment]) -> str:
    """An HTML page with everything inside, to be opened without a network."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for kept_image in images:
        for image in (kept_image.image.convert("RGB"), fade_dropped(kept_image)):
            parts.append(f'<figure><img src="data:image/png;base64,{_png(image)}" alt=""></figure>')
        parts.append(f"<p>{escape(kept_image.caption)}</p>")
    for segment in segments:
        words = "".join(
            f'<span class="{"kept" if word.kept else "dropped"}">{escape(word.text)}</span>' for word in segment.words
        )
        parts.append(f'<h2>{escape(segment.caption)}</h2><p class="words">{words.replace(chr(10), "<br>")}</p>')
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}<title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
