"""Drawing scenes with Pillow, without font files.

Every cell of the grid is one square of `CELL` pixels, which is also the patch size of the tiny tower: one patch, one
cell. The position inside the cell and the brightness vary with the random generator, so images of one scene differ.
"""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from playground.scenes import Scene, Thing

CELL = 16
"""Side of a grid cell in pixels."""

IMAGE_SIZE = 3 * CELL
"""Side of an image in pixels."""

Colour = tuple[int, int, int]

RGB = {
    "red": (224, 48, 48),
    "green": (48, 184, 72),
    "blue": (56, 88, 232),
    "yellow": (232, 208, 48),
    "purple": (168, 64, 200),
}

# 3 x 5 dots per digit, one string per row from the top.
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
DOT_WIDTH, DOT_HEIGHT = 3, 2
"""Size of a dot in pixels."""
MARGIN = 1
"""Pixels around a shape, enough for `JITTER`."""
JITTER = 1

OUTLINE = (0, 0, 0)
"""Everything has an outline of one pixel, so that the shape can be seen whatever the colour."""

BACKGROUND = (122, 116, 104)
"""Mean colour of CLIP's normalisation: an empty cell is close to zero for the tower, so that the things stand out."""
SHADE = 8


def draw_scene(scene: Scene, random: Random) -> Image.Image:
    """Draw a scene as an RGB image of `IMAGE_SIZE` x `IMAGE_SIZE` pixels."""
    shade = random.randint(-SHADE, SHADE)
    red, green, blue = (value + shade for value in BACKGROUND)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (red, green, blue))
    pen = ImageDraw.Draw(image)
    for index, thing in enumerate(scene.cells):
        if thing is None:
            continue
        left = index % 3 * CELL + random.randint(-JITTER, JITTER)
        top = index // 3 * CELL + random.randint(-JITTER, JITTER)
        level = random.uniform(0.85, 1.0)
        red, green, blue = (int(value * level) for value in RGB[thing.colour])
        _draw_thing(pen, thing, left, top, (red, green, blue))
    return image


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, left: int, top: int, colour: Colour) -> None:
    """Draw one thing into the cell whose corner is at (left, top), first its outline, then its inside."""
    draw = _draw_digit if thing.is_digit else _draw_shape
    draw(pen, thing.kind, left, top, OUTLINE, 0)
    draw(pen, thing.kind, left, top, colour, 1)


def _draw_shape(pen: ImageDraw.ImageDraw, kind: str, left: int, top: int, colour: Colour, shrink: int) -> None:
    """Draw a shape, smaller by `shrink` pixels on every side."""
    inset = MARGIN + shrink
    x0, y0, x1, y1 = left + inset, top + inset, left + CELL - 1 - inset, top + CELL - 1 - inset
    middle_x, middle_y, arm = left + CELL // 2, top + CELL // 2, 3 - shrink
    if kind == "circle":
        pen.ellipse((x0, y0, x1, y1), fill=colour)
    elif kind == "square":
        pen.rectangle((x0, y0, x1, y1), fill=colour)
    elif kind == "triangle":
        pen.polygon(((x0, y1), (middle_x, y0), (x1, y1)), fill=colour)
    else:  # cross
        pen.rectangle((middle_x - arm, y0, middle_x + arm - 1, y1), fill=colour)
        pen.rectangle((x0, middle_y - arm, x1, middle_y + arm - 1), fill=colour)


def _draw_digit(pen: ImageDraw.ImageDraw, digit: str, left: int, top: int, colour: Colour, shrink: int) -> None:
    """Draw a digit of 9 x 10 pixels and an outline around it."""
    grow = 1 - shrink
    for row, dots in enumerate(DIGIT_DOTS[digit]):
        for column, dot in enumerate(dots):
            if dot == "#":
                x, y = left + 3 + column * DOT_WIDTH, top + 3 + row * DOT_HEIGHT
                pen.rectangle((x - grow, y - grow, x + DOT_WIDTH - 1 + grow, y + DOT_HEIGHT - 1 + grow), fill=colour)
