"""Drawing scenes with Pillow, without font files.

Every cell of the grid is one square of `CELL` pixels, which is also the patch size of the tiny tower: one patch, one
cell. The position inside the cell and the brightness vary with the random generator, so pictures of one scene differ.
"""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from playground.scenes import Scene, Thing

CELL = 16
"""Side of a grid cell in pixels."""

IMAGE_SIZE = 3 * CELL
"""Side of a picture in pixels."""

RGB = {
    "red": (224, 48, 48),
    "green": (48, 184, 72),
    "blue": (56, 88, 232),
    "yellow": (232, 208, 48),
    "purple": (168, 64, 200),
}

# 3 x 5 dots per digit, one string per row from the top; drawn two pixels per dot.
DIGIT_DOTS = {
    "0": ("###", "#.#", "#.#", "#.#", "###"),
    "1": (".#.", "##.", ".#.", ".#.", "###"),
    "2": ("###", "..#", "###", "#..", "###"),
    "3": ("###", "..#", ".##", "..#", "###"),
    "4": ("#.#", "#.#", "###", "..#", "..#"),
    "5": ("###", "#..", "###", "..#", "###"),
    "6": ("###", "#..", "###", "#.#", "###"),
    "7": ("###", "..#", ".#.", ".#.", ".#."),
    "8": ("###", "#.#", "###", "#.#", "###"),
    "9": ("###", "#.#", "###", "..#", "###"),
}
DOT = 2
INSET = 2
JITTER = 1

BACKGROUND = (122, 116, 104)
"""Mean colour of CLIP's normalisation: an empty cell is close to zero for the tower, so that the things stand out."""
SHADE = 8


def draw_scene(scene: Scene, random: Random) -> Image.Image:
    """Draw a scene as an RGB picture of `IMAGE_SIZE` x `IMAGE_SIZE` pixels."""
    shade = random.randint(-SHADE, SHADE)
    red, green, blue = (value + shade for value in BACKGROUND)
    picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (red, green, blue))
    pen = ImageDraw.Draw(picture)
    for index, thing in enumerate(scene.cells):
        if thing is None:
            continue
        left = index % 3 * CELL + random.randint(-JITTER, JITTER)
        top = index // 3 * CELL + random.randint(-JITTER, JITTER)
        level = random.uniform(0.85, 1.0)
        red, green, blue = (int(value * level) for value in RGB[thing.colour])
        _draw_thing(pen, thing, left, top, (red, green, blue))
    return picture


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, left: int, top: int, colour: tuple[int, int, int]) -> None:
    """Draw one thing into the cell whose corner is at (left, top)."""
    if thing.is_digit:
        _draw_digit(pen, thing.kind, left + 5, top + 3, colour)
        return
    x0, y0, x1, y1 = left + INSET, top + INSET, left + CELL - INSET - 1, top + CELL - INSET - 1
    middle_x, middle_y = (x0 + x1) // 2, (y0 + y1) // 2
    if thing.kind == "circle":
        pen.ellipse((x0, y0, x1, y1), fill=colour)
    elif thing.kind == "square":
        pen.rectangle((x0, y0, x1, y1), fill=colour)
    elif thing.kind == "triangle":
        pen.polygon(((x0, y1), (middle_x, y0), (x1, y1)), fill=colour)
    else:  # cross
        pen.rectangle((middle_x - 1, y0, middle_x + 2, y1), fill=colour)
        pen.rectangle((x0, middle_y - 1, x1, middle_y + 2), fill=colour)


def _draw_digit(pen: ImageDraw.ImageDraw, digit: str, left: int, top: int, colour: tuple[int, int, int]) -> None:
    """Draw a digit of 6 x 10 pixels with its corner at (left, top)."""
    for row, dots in enumerate(DIGIT_DOTS[digit]):
        for column, dot in enumerate(dots):
            if dot == "#":
                x, y = left + column * DOT, top + row * DOT
                pen.rectangle((x, y, x + DOT - 1, y + DOT - 1), fill=colour)
