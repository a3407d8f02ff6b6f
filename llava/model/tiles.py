"""Merging the features of an image that was cut into tiles (`mm_patch_merge_type`; upstream's `llava_arch.py`).

`flat` lines the tiles up; `spatial` puts them back into raster order over the whole image; `spatial_unpad` also
removes the rows or columns that are padding and ends every row with the learned newline vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.constants import MERGE_TYPES
from llava.data.tiling import unpad_margins
from llava.errors import FlagError


def unpad_image(features: Tensor, original_size: tuple[int, int]) -> Tensor:
    """Cut away the part of a feature map that came from padding to another aspect ratio.

    Args:
        features: (D, rows, columns).
        original_size: width and height of the image in pixels.
    """
    rows, columns = features.shape[1:]
    above, left = unpad_margins((columns, rows), original_size)
    return features[:, above : rows - above, left : columns - left]


def merge_tiles(
    features: Tensor,
    merge_type: str,
    grid: tuple[int, int] | None = None,
    original_size: tuple[int, int] | None = None,
    newline: Tensor | None = None,
) -> Tensor:
    """Features of one image as one sequence.

    Args:
        features: (tiles, P, D); tile 0 is the whole image in small.
        merge_type: one of `MERGE_TYPES`.
        grid: tiles across and down; needed by the spatial types when there is more than one tile.
        original_size: width and height in pixels; needed by `spatial_unpad`.
        newline: (D,) learned vector; needed by `spatial_unpad`.

    Returns:
        (positions, D), the base image first.

    Raises:
        FlagError: unknown type, or a part that the type needs is missing.
    """
    if merge_type not in MERGE_TYPES:
        raise FlagError(f"--mm_patch_merge_type is '{merge_type}'; known values: {MERGE_TYPES}")
    if merge_type == "flat":
        return features.flatten(0, 1)
    if merge_type == "spatial_unpad" and newline is None:
        raise FlagError("--mm_patch_merge_type spatial_unpad needs the 'image_newline' vector in the checkpoint")
    base = features[0]  # (P, D)
    if len(features) == 1:
        return base if merge_type == "spatial" else torch.cat([base, newline[None].to(base)])
    if grid is None:
        raise FlagError(
            f"--mm_patch_merge_type {merge_type} merges several tiles only with --image_aspect_ratio anyres"
        )
    side = int(base.shape[0] ** 0.5)
    if side * side != base.shape[0]:
        raise FlagError(
            f"--mm_patch_merge_type {merge_type} needs square tiles without class token, not {len(base)} rows"
        )
    columns, rows = grid
    tiles = features[1:].view(rows, columns, side, side, -1)
    canvas = tiles.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)  # (D, rows * side, columns * side)
    if merge_type == "spatial_unpad":
        if original_size is None:
            raise FlagError("--mm_patch_merge_type spatial_unpad needs image_sizes")
        canvas = unpad_image(canvas, original_size)
        line_end = newline.to(canvas)[:, None, None].expand(-1, canvas.shape[1], 1)
        canvas = torch.cat([canvas, line_end], dim=2)
    return torch.cat([base, canvas.flatten(1).transpose(0, 1)])
