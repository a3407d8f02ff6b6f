"""Reading the images of a data set: safe paths, whole files, bounded size, and their pixel values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from llava.errors import BadImageError, FlagError
from llava.mm_utils import ASPECT_RATIOS, crop_size, preprocess_image


def load_image_processor(folder: str | os.PathLike[str]) -> CLIPImageProcessorPil:
    """The CLIP image processor described in a folder, computing with Pillow.

    transformers 5 resizes with torchvision by default, which differs from the original by up to 0.015 per pixel value.
    """
    return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)


def image_path(folder: str | os.PathLike[str], name: str, row: object = "") -> Path:
    """Path of an image that a data file names, relative to the image folder.

    Args:
        folder: image folder.
        name: path inside it.
        row: what to call the row of the data file in an error.

    Raises:
        BadImageError: the name is no relative path, leaves the folder (also through a symbolic link), or is no file.
    """
    try:
        root = Path(folder).resolve()
        path = (root / name).resolve()
        is_file = path.is_file()
    except (TypeError, ValueError, OSError, RuntimeError) as error:  # no string, a null byte, too long, a link loop
        raise BadImageError(f"{row}: {name!r} is no usable image name: {error}") from error
    if os.path.isabs(name) or not path.is_relative_to(root):
        raise BadImageError(
            f"{row}: image {name!r} lies outside the image folder {root} (it is {path}); name images relative to "
            "--image_folder, and link no files into it from elsewhere"
        )
    if not is_file:
        raise BadImageError(f"{row}: image {name!r} is missing: {path} is no file; check the image folder")
    return path


def load_image(folder: str | os.PathLike[str], name: str, row: object = "") -> Image.Image:
    """Read an image of a data set completely, as RGB.

    Args:
        folder: image folder.
        name: path inside it.
        row: what to call the row of the data file in an error.

    Raises:
        BadImageError: as `image_path`; or the file is broken, no image, or has more pixels than Pillow deems safe
            (`PIL.Image.MAX_IMAGE_PIXELS`, 89 million).
    """
    path = image_path(folder, name, row)
    try:
        with Image.open(path) as image:
            limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
            if limit is not None and pixels > limit:  # Pillow itself refuses only twice as many
                raise Image.DecompressionBombError(f"{pixels} pixels exceed the limit of {limit}")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        raise BadImageError(f"{row}: image {path} cannot be read: {type(error).__name__}: {error}") from error


class ImageTransform:
    """Turns an RGB image into pixel values: float32 (3, H, W).

    Args:
        image_processor: see `load_image_processor`.
        aspect_ratio: value of `--image_aspect_ratio`; see `preprocess_image`.

    Raises:
        FlagError: the aspect ratio is not known.
    """

    def __init__(self, image_processor: Any, aspect_ratio: str) -> None:
        if aspect_ratio not in ASPECT_RATIOS:
            raise FlagError(f"--image_aspect_ratio {aspect_ratio}: not known; known: {', '.join(ASPECT_RATIOS)}")
        self.image_processor = image_processor
        self.aspect_ratio = aspect_ratio

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixel values (3, H, W) of one image."""
        return preprocess_image(image, self.image_processor, self.aspect_ratio)

    def dummy(self) -> Tensor:
        """The black picture (3, H, W) that stands in for a row without image."""
        return torch.zeros(3, *crop_size(self.image_processor))
