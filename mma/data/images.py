"""Pixel values as LaVIN was trained: the whole picture squashed to a square, normalised with ImageNet's statistics.

CLIP itself was trained with statistics of its own; the original (`util/datasets.py`) uses ImageNet's, and so do the
checkpoints.
"""

from __future__ import annotations

import copy
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ASPECT_RATIO = "stretch"
"""Value of `--image_aspect_ratio` that squashes."""


def lavin_processor(image_processor: Any) -> Any:
    """The image processor of a tower, with ImageNet's statistics; the given one is left as it is."""
    changed = copy.deepcopy(image_processor)
    changed.image_mean, changed.image_std = list(IMAGENET_MEAN), list(IMAGENET_STD)
    return changed
