"""Which part of an image each of its tiles shows."""

from __future__ import annotations

from llava.data.tiling import unpad_margins

Region = tuple[float, float, float, float]
"""Top, left, bottom and right edge as shares of the image without padding: below 0 or above 1 where a tile shows
padding."""

WHOLE: Region = (0.0, 0.0, 1.0, 1.0)
"""What the image in small shows, which comes in front of the tiles."""


def tile_regions(grid: tuple[int, int], tile_size: int, original_size: tuple[int, int]) -> list[Region]:
    """Regions of an `anyres` image: of the image in small, then of its tiles line by line.

    Args:
        grid: tiles across and down.
        tile_size: side of a tile in pixels.
        original_size: width and height of the image in pixels.
    """
    columns, rows = grid
    width, height = columns * tile_size, rows * tile_size
    above, left = unpad_margins((width, height), original_size)
    across, down = width - 2 * left, height - 2 * above  # pixels that the image takes without padding
    tiles = [
        (
            (row * tile_size - above) / down,
            (column * tile_size - left) / across,
            ((row + 1) * tile_size - above) / down,
            ((column + 1) * tile_size - left) / across,
        )
        for row in range(rows)
        for column in range(columns)
    ]
    return [WHOLE, *tiles]
