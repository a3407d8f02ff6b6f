"""Pixel values of a CLIP or SigLIP processor that works with Pillow, by fewer steps and with the same numbers.

Such a processor scales, crops, and then computes on every pixel alone: what it makes of a byte depends on the byte and
its channel. So the processor itself is asked once what it makes of the 256 bytes, and images are looked up.

Pillow scales the columns of an image first, rounds to bytes, and then scales the rows, each line of pixels by itself.
So what a crop throws away, and what padding adds above and below, need not be scaled in both directions.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llava.data.image_bounds import resized_size

PILLOW_PROCESSORS = (CLIPImageProcessorPil, SiglipImageProcessorPil)
"""Processors that scale with Pillow, by their `size` and `resample`."""

SEPARABLE = (
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.HAMMING,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
"""Filters that Pillow applies to columns, then to rows."""

Box = tuple[int, int, int, int]
"""Left, upper, right and lower border in pixels."""

Color = tuple[int, ...]


def is_known(image: Image.Image, image_processor: Any) -> bool:
    """Whether this module gives the processor's values for an image: only then may its other functions be used."""
    if image.mode != "RGB" or type(image_processor) not in PILLOW_PROCESSORS:
        return False
    size, crop = image_processor.size, image_processor.crop_size
    scales = not image_processor.do_resize or (
        set(_given(size)) in ({"shortest_edge"}, {"height", "width"}) and image_processor.resample in SEPARABLE
    )
    crops = not image_processor.do_center_crop or set(_given(crop)) == {"height", "width"}
    return scales and crops and not getattr(image_processor, "do_pad", None)


def _given(size: Any) -> dict[str, int]:
    """The entries of a processor's size that are set."""
    return {key: value for key, value in dict(size or {}).items() if value}


def pixel_values(image: Image.Image, image_processor: Any, background: Color | None = None) -> Tensor:
    """What the processor makes of an RGB image.

    Args:
        image: RGB image of any size.
        image_processor: as `is_known` accepts it.
        background: center the image on a square of this color first.

    Returns:
        (3, height, width), float32 if the processor rescales or normalizes, else uint8.
    """
    return looked_up(_cropped(image, image_processor, background), image_processor)


def _cropped(image: Image.Image, image_processor: Any, background: Color | None) -> Image.Image:
    """The image padded, scaled and cropped."""
    side = max(image.size)
    padded = image.size if background is None else (side, side)
    size = resized_size(padded, image_processor) if image_processor.do_resize else padded
    box = _center(size, image_processor.crop_size) if image_processor.do_center_crop else (0, 0, *size)
    # A row of the image is one with what is padded on its left and right, so that comes first.
    if background is not None and (image.width < side or not image_processor.do_resize):
        image = on_canvas(image, padded, background)
    if image.width != size[0]:
        image = image.resize((size[0], image.height), image_processor.resample)
    # A row of padding above or below keeps its one color, whatever it is scaled to.
    if background is not None and image.height < padded[1]:
        image = on_canvas(image, (size[0], padded[1]), background)
    if (box[0], box[2]) != (0, size[0]):
        image = image.crop((box[0], 0, box[2], image.height))
    if image.height != size[1]:
        image = image.resize((image.width, size[1]), image_processor.resample)
    return image if (box[1], box[3]) == (0, size[1]) else image.crop((0, box[1], image.width, box[3]))


def _center(size: tuple[int, int], crop: Any) -> Box:
    """Box of the processor's crop; where it reaches over the image, Pillow and the processor both fill in black."""
    left, top = (size[0] - crop["width"]) // 2, (size[1] - crop["height"]) // 2
    return left, top, left + crop["width"], top + crop["height"]


def on_canvas(image: Image.Image, size: tuple[int, int], background: Color) -> Image.Image:
    """The image in the middle of a canvas of `size` (width, height); where halves differ, up and to the left."""
    canvas = Image.new(image.mode, size, background)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def looked_up(image: Image.Image, image_processor: Any) -> Tensor:
    """Values (3, height, width) of the pixels of an RGB image, after scaling and cropping."""
    processor = image_processor
    table = _table(
        processor.do_rescale,
        processor.rescale_factor,
        processor.do_normalize,
        _hashable(processor.image_mean),
        _hashable(processor.image_std),
    )
    pixels = np.asarray(image)
    values = np.empty((3, *pixels.shape[:2]), table.dtype)
    for channel in range(3):
        np.take(table[channel], pixels[..., channel], out=values[channel], mode="clip")
    return torch.from_numpy(values)


def _hashable(values: Any) -> Any:
    """A setting of one number, or of one for each channel."""
    return tuple(values) if isinstance(values, Iterable) else values


@lru_cache(maxsize=16)
def _table(do_rescale: bool, rescale_factor: float, do_normalize: bool, mean: Any, std: Any) -> np.ndarray:
    """What a processor with these settings makes of each byte in each channel, (3, 256)."""
    bytes_ = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    processor = CLIPImageProcessorPil(
        do_resize=False,
        do_center_crop=False,
        do_rescale=do_rescale,
        rescale_factor=rescale_factor,
        do_normalize=do_normalize,
        image_mean=mean,
        image_std=std,
    )
    return processor(Image.fromarray(bytes_), return_tensors="np")["pixel_values"][0][:, 0]
