"""How large an image may be: bounded by what is made of it on the way to pixel values.

A file of two kilobytes can hold 50 x 10,000 pixels, of which padding makes a square of 100 million. So the largest
image that is made counts, and is compared with the image itself: photographs of any resolution pass.
"""

from __future__ import annotations

from typing import Any

from llava.data.tiling import GridPinpoints, Size, output_size, parse_grid_pinpoints, select_best_resolution
from llava.errors import BadImageError

ALWAYS_MADE = 25_000_000
"""Pixels that may be made of an image of any size: a square of 5,000."""

TIMES_OWN = 8
"""Pixels that may be made of an image, as a multiple of its own: a panorama of 8 to 1 may be padded."""


def resized_size(size: Size, image_processor: Any) -> Size:
    """Width and height that an image processor scales an image of `size` to; of CLIP and SigLIP."""
    wanted = image_processor.size
    if "shortest_edge" not in wanted:
        return wanted["width"], wanted["height"]
    short, long = sorted(size)
    edge = wanted["shortest_edge"]
    other = int(edge * long / short)
    return (edge, other) if size[0] <= size[1] else (other, edge)


def made_size(
    size: Size, image_processor: Any, aspect_ratio: str | None, grid_pinpoints: GridPinpoints | None = None
) -> Size:
    """Width and height of the largest image that `preprocess_image` makes of an image.

    Args:
        size: width and height of the image.
        image_processor: of the tower.
        aspect_ratio: see `preprocess_image`.
        grid_pinpoints: see `preprocess_image`.
    """
    if aspect_ratio == "anyres":
        made = [select_best_resolution(size, parse_grid_pinpoints(grid_pinpoints))]
    elif aspect_ratio == "stretch":
        made = [output_size(image_processor)[::-1]]
    elif aspect_ratio == "pad":
        square = (max(size), max(size))
        made = [resized_size(square, image_processor), *([square] if size != square else [])]
    else:
        made = [resized_size(size, image_processor)]
    return max(made, key=lambda each: each[0] * each[1])


def check_made(
    size: Size,
    image_processor: Any,
    aspect_ratio: str | None,
    grid_pinpoints: GridPinpoints | None = None,
    *,
    name: str = "the image",
    most: int | None = None,
    instead: str = "",
) -> None:
    """Refuse an image of which too much would be made.

    Args:
        size: width and height of the image.
        image_processor: of the tower.
        aspect_ratio: see `preprocess_image`.
        grid_pinpoints: see `preprocess_image`.
        name: what to call the image in an error.
        most: a limit of the caller's own in pixels, besides the one that follows from the image.
        instead: how that limit is raised.

    Raises:
        BadImageError: names the image and both numbers.
    """
    width, height = made_size(size, image_processor, aspect_ratio, grid_pinpoints)
    made, own = width * height, size[0] * size[1]
    usual = max(ALWAYS_MADE, TIMES_OWN * own)
    says = f"{name}: of its {size[0]} x {size[1]} pixels --image_aspect_ratio {aspect_ratio or 'square'} makes "
    says += f"{width} x {height} = {made:,}, "
    if made > usual:
        raise BadImageError(
            f"{says}and the limit is {usual:,} ({ALWAYS_MADE:,}, or {TIMES_OWN} times its own if that is more); crop "
            "the image, make it smaller, or choose another --image_aspect_ratio"
        )
    if most is not None and made > most:
        raise BadImageError(f"{says}and the limit here is {most:,}; make the image smaller{instead}")
