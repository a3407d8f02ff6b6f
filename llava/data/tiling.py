"""Images of any resolution as tiles (`--image_aspect_ratio anyres`; upstream keeps these in `llava/mm_utils.py`).

An image is scaled into the best of several resolutions, cut into tiles of the tower's size, and preceded by itself in
small. Sizes are always (width, height) in pixels.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from llava.errors import FlagError

Size = tuple[int, int]
GridPinpoints = str | Sequence[Sequence[int]]
"""Possible resolutions as (width, height), or their Python literal, as `image_grid_pinpoints` holds them."""


def parse_grid_pinpoints(pinpoints: GridPinpoints | None) -> list[Size]:
    """Resolutions of `--image_grid_pinpoints`.

    Raises:
        FlagError: it is missing, or something else than a list of pairs of positive whole numbers.
    """
    example = 'for example "[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]"'
    if not pinpoints:
        raise FlagError(f"--image_aspect_ratio anyres needs --image_grid_pinpoints, {example}")
    try:
        values = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        sizes = [(width, height) for width, height in values]
    except (ValueError, SyntaxError, TypeError) as error:
        raise FlagError(f"--image_grid_pinpoints {pinpoints}: is no list of pairs, {example}") from error
    if not sizes or not all(type(side) is int and side > 0 for size in sizes for side in size):
        raise FlagError(f"--image_grid_pinpoints {pinpoints}: must be pairs of positive whole numbers, {example}")
    return sizes


def check_grid_pinpoints(pinpoints: GridPinpoints | None, tile_size: int) -> list[Size]:
    """Resolutions that are cut into whole tiles.

    Raises:
        FlagError: as `parse_grid_pinpoints`, or a side is no multiple of the tile.
    """
    sizes = parse_grid_pinpoints(pinpoints)
    odd = [size for size in sizes if size[0] % tile_size or size[1] % tile_size]
    if odd:
        raise FlagError(
            f"--image_grid_pinpoints: {odd} cannot be cut into tiles; both sides must be multiples of {tile_size}, "
            "the size of the vision tower"
        )
    return sizes


def select_best_resolution(original_size: Size, possible_resolutions: Sequence[Size]) -> Size:
    """Resolution that keeps most of an image's pixels, then wastes least, then stands first.

    Args:
        original_size: of the image.
        possible_resolutions: to choose from.
    """
    width, height = original_size

    def rank(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(possible_resolutions, key=rank)


def get_anyres_image_grid_shape(image_size: Size, grid_pinpoints: GridPinpoints, patch_size: int) -> Size:
    """Tiles across and down that an image is cut into.

    Args:
        image_size: of the image.
        grid_pinpoints: possible resolutions.
        patch_size: side of a tile in pixels.
    """
    width, height = select_best_resolution(image_size, parse_grid_pinpoints(grid_pinpoints))
    return width // patch_size, height // patch_size


def unpad_margins(features: Size, original_size: Size) -> tuple[int, int]:
    """Rows above (and below) and columns left (and right) of a feature map that came from padding.

    Args:
        features: columns and rows of the map.
        original_size: of the image.
    """
    (columns, rows), (width, height) = features, original_size
    if width / height > columns / rows:
        return (rows - int(height * columns / width)) // 2, 0
    return 0, (columns - int(width * rows / height)) // 2


@dataclass(frozen=True)
class ImageLength:
    """Says how many positions an image will take in the sequence, from its pixels alone.

    Attributes:
        features: P, rows that one tile has.
        merge_type: flat, spatial or spatial_unpad.
        resolutions: possible resolutions of `anyres`; None for any other aspect setting.
        tile_size: side of a tile in pixels.
    """

    features: int
    merge_type: str = "flat"
    resolutions: GridPinpoints | None = None
    tile_size: int = 0

    def __call__(self, pixels: Tensor, size: tuple[int, int]) -> int:
        """Length of what `merge_tiles` of `llava/model/tiles.py` will give.

        Args:
            pixels: (3, height, width), or (tiles, 3, height, width) with the whole image in small first.
            size: width and height of the image in pixels.
        """
        if self.resolutions is None and pixels.ndim == 3:
            return self.features
        return self._merged(1 if pixels.ndim == 3 else len(pixels), size)

    def of_size(self, size: tuple[int, int]) -> int:
        """The same, from width and height of the image in pixels alone."""
        if self.resolutions is None:
            return self.features
        columns, rows = get_anyres_image_grid_shape(size, self.resolutions, self.tile_size)
        return self._merged(1 + columns * rows, size)

    def _merged(self, tiles: int, size: tuple[int, int]) -> int:
        """Length of so many merged tiles."""
        if self.merge_type != "spatial_unpad":
            return tiles * self.features
        if tiles == 1:
            return self.features + 1
        side = int(self.features**0.5)
        columns, rows = get_anyres_image_grid_shape(size, self.resolutions or (), self.tile_size)
        columns, rows = columns * side, rows * side
        above, left = unpad_margins((columns, rows), size)
        return self.features + max(0, rows - 2 * above) * (max(0, columns - 2 * left) + 1)


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """Scale an RGB image into a resolution, keeping its shape, and centre it there on black."""
    target_width, target_height = target_resolution
    scale_x, scale_y = target_width / image.width, target_height / image.height
    if scale_x < scale_y:
        size = (target_width, min(math.ceil(image.height * scale_x), target_height))
    else:
        size = (min(math.ceil(image.width * scale_y), target_width), target_height)
    canvas = Image.new("RGB", (target_width, target_height), (0, 0, 0))
    canvas.paste(image.resize(size), ((target_width - size[0]) // 2, (target_height - size[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Square tiles of an image, row by row; what lies outside the image is black."""
    return [
        image.crop((x, y, x + patch_size, y + patch_size))
        for y in range(0, image.height, patch_size)
        for x in range(0, image.width, patch_size)
    ]


def output_size(image_processor: Any) -> Size:
    """Height and width in pixels of what an image processor gives: its crop if it crops, else its size."""
    crops = getattr(image_processor, "do_center_crop", None)
    size = image_processor.crop_size if crops else image_processor.size
    return size["height"], size["width"]
