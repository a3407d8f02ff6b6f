"""Files of what was kept: a sheet as PNG and a page as HTML, of `llava.runtime.drawing.patches`.

Corresponds to `dynamic_eval/visualize.py` of the original, which blanks the dropped patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from PIL import Image, ImageDraw, ImageFont

from llava.runtime.drawing.patches import KeptImage, TextSegment, Word, fade_dropped, kept_html

__all__ = ["KeptImage", "TextSegment", "Word", "draw_sheet", "fade_dropped", "page"]

KEPT_COLOUR, DROPPED_COLOUR = (20, 20, 20), (190, 60, 50)
STYLE = """
body { font-family: sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222; }
figure { display: inline-block; margin: 6px; } img { width: 336px; image-rendering: pixelated; display: block; }
.words { line-height: 1.9; font-size: 17px; } .dropped { color: #b8b8b8; text-decoration: line-through #b3261e; }
"""


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
    body = f"<h1>{escape(title)}</h1>\n{kept_html(images, segments)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}<title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
