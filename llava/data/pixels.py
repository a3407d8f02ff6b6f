"""From an image in memory to the pixel values that a tower takes (upstream `llava/mm_utils.py`).

Padding, cropping, stretching or tiling as `--image_aspect_ratio` says, then the tower's own processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.data.image_bounds import check_made, resized_size
from llava.data.pillow_pixels import PILLOW_PROCESSORS, Color, is_known, on_canvas, pixel_values
from llava.data.tiling import (
    GridPinpoints,
    divide_to_patches,
    output_size,
    parse_grid_pinpoints,
    resize_and_pad_image,
    select_best_resolution,
)
from llava.errors import FlagError

PLAIN_ASPECT_RATIOS = (None, "square", "resize")
"""Values of `--image_aspect_ratio` that mean the processor alone: shortest edge to size, then centre crop.

`resize` has no code of its own in the original HydraLoRA code base; its recipes were trained with this crop.
"""


ASPECT_RATIOS = ("pad", "square", "resize", "stretch", "anyres")
"""Known values of `--image_aspect_ratio`."""


def expand2square(image: Image.Image, background: Color) -> Image.Image:
    """Centre an RGB image on a square canvas whose side is the image's longer one; the image itself if square."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    return on_canvas(image, (side, side), background)


def pixels_to_image(pixels: Tensor, image_processor: Any) -> Image.Image:
    """The image behind normalised `pixels` (3, height, width): what the tower sees, after cropping or padding."""
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    values = (pixels.float().cpu() * std + mean).clamp(0, 1)
    return Image.fromarray((values * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def scaled_image(image: Image.Image, image_processor: Any) -> Image.Image:
    """An RGB image scaled as the processor scales it, with the same pixels and less memory.

    The processor makes arrays of the image before it scales it, 50 bytes for each of its pixels; Pillow takes 4.
    """
    if not (isinstance(image_processor, PILLOW_PROCESSORS) and image_processor.do_resize):
        return image
    return image.resize(resized_size(image.size, image_processor), image_processor.resample)


def preprocess_image(
    image: Image.Image,
    image_processor: Any,
    aspect_ratio: str | None,
    grid_pinpoints: Any = None,
    *,
    name: str = "the image",
) -> Tensor:
    """Pixel values of one image.

    Args:
        image: RGB image.
        image_processor: processor of the tower; only one that works on Pillow images gives the original's values.
        aspect_ratio: `pad` centres the image on a square of the processor's mean colour; `square`, `resize` and None
            cut out the centre; `stretch` scales both sides to the crop size; `anyres` cuts the image into tiles.
        grid_pinpoints: possible resolutions of `anyres`; see `llava/data/tiling.py`.
        name: what to call the image in an error.

    Returns:
        float32 (3, height, width), normalised; (1 + tiles, 3, height, width) for `anyres`.

    Raises:
        BadImageError: much more would be made of the image than it is; see `llava/data/image_bounds.py`.
        FlagError: another aspect ratio.
    """
    if aspect_ratio not in (*ASPECT_RATIOS, *PLAIN_ASPECT_RATIOS):
        raise FlagError(f"--image_aspect_ratio {aspect_ratio}: not known; known: {', '.join(ASPECT_RATIOS)}")
    check_made(image.size, image_processor, aspect_ratio, grid_pinpoints, name=name)
    if aspect_ratio == "anyres":
        return process_anyres_image(image, image_processor, grid_pinpoints)
    if aspect_ratio == "stretch":
        image = image.resize(output_size(image_processor)[::-1], Image.Resampling.BICUBIC)
    background = tuple(int(255 * mean) for mean in image_processor.image_mean) if aspect_ratio == "pad" else None
    return _processed(image, image_processor, background)


def _processed(image: Image.Image, image_processor: Any, background: Color | None = None) -> Tensor:
    """What the processor makes of an image, (3, height, width), padded to a square of `background` if it is given."""
    if is_known(image, image_processor):
        return pixel_values(image, image_processor, background)
    if background is not None:
        image = expand2square(image, background)
    return image_processor(scaled_image(image, image_processor), return_tensors="pt")["pixel_values"][0]


def process_anyres_image(image: Image.Image, processor: Any, grid_pinpoints: GridPinpoints) -> Tensor:
    """Pixel values of an image and of its tiles.

    Args:
        image: RGB image.
        processor: image processor of the tower.
        grid_pinpoints: possible resolutions.

    Returns:
        float32 (1 + tiles, 3, height, width); element 0 is the whole image, squeezed to a square.

    Raises:
        FlagError: the resolutions are missing or malformed.
    """
    best = select_best_resolution(image.size, parse_grid_pinpoints(grid_pinpoints))
    size = processor.size
    side = size["shortest_edge"] if "shortest_edge" in size else size["height"]
    tiles = divide_to_patches(resize_and_pad_image(image, best), output_size(processor)[0])
    return torch.stack([_processed(piece, processor) for piece in (image.resize((side, side)), *tiles)])


def process_images(
    images: Sequence[Image.Image], image_processor: Any, model_cfg: Any, *, name: str = "the image"
) -> Tensor | list[Tensor]:
    """Pixel values of several RGB images, treated as `model_cfg.image_aspect_ratio` says.

    Returns:
        float32 (N, 3, height, width), or a list of (3, height, width) if shapes differ; with tiles for `anyres`,
        (N, 1 + tiles, 3, height, width) or a list.

    Raises:
        BadImageError: much more would be made of an image than it is; calls it `name`.
        FlagError: the aspect ratio is not known.
    """
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    pinpoints = getattr(model_cfg, "image_grid_pinpoints", None)
    tensors = [preprocess_image(image, image_processor, aspect_ratio, pinpoints, name=name) for image in images]
    return torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors


def process_image(image: Image.Image, mode: str, max_len: int = 800, min_len: int = 400) -> Image.Image:
    """An image as the demos show and send it (upstream: a method of its conversations).

    Args:
        image: RGB image.
        mode: `Pad` to a square of CLIP's mean colour, `Resize` to 336 x 336, `Default` or `Crop` to leave it.
        max_len: an image with a longer side is made smaller.
        min_len: upper limit of the short side then.

    Raises:
        ValueError: another mode.
    """
    if mode == "Pad":
        image = expand2square(image, (122, 116, 104))
    elif mode == "Resize":
        image = image.resize((336, 336))
    elif mode not in ("Default", "Crop"):
        raise ValueError(f"the image mode is {mode!r}; it may be Pad, Resize, Default or Crop")
    if max(image.size) <= max_len:
        return image
    aspect = max(image.size) / min(image.size)
    short = int(min(max_len / aspect, min_len, min(image.size)))
    size = (int(short * aspect), short) if image.width > image.height else (short, int(short * aspect))
    return image.resize((max(size[0], 1), max(size[1], 1)))
