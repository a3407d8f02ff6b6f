"""Reading the images of a data set: safe paths, whole files, bounded size, and their pixel values."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import CLIPImageProcessorPil

from llava.data.image_names import RowImage, StoredImage
from llava.data.pixels import ASPECT_RATIOS, preprocess_image
from llava.data.tiling import GridPinpoints, output_size, parse_grid_pinpoints
from llava.errors import BadImageError, FlagError
from llava.runtime.files import is_pointer, pointer_problem

FILE_ADDRESS = "file://"

MAX_PIXELS = 160_000_000
"""Width times height of a file: more than any camera takes. Pillow's own limit, at which it warns, is put there too."""

MAX_SIDE = 20_000
"""Longest side of an image in pixels. What is made of an image has a bound of its own: `llava/data/image_bounds.py`."""

MAX_SIDES_RATIO = 200
"""Longest side over shortest side: the processor scales the shortest side up to its size."""


if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)


def load_image_processor(folder: str | os.PathLike[str]) -> CLIPImageProcessorPil:
    """The CLIP image processor described in a folder, computing with Pillow.

    transformers 5 resizes with torchvision by default, which differs from the original by up to 0.015 per pixel value.
    """
    return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)


def image_path(folder: str | os.PathLike[str], name: str, row: object = "", *, follow_links: bool = True) -> Path:
    """Path of an image that a data file names, relative to the image folder.

    Links in the folder are its owner's: `images/coco -> /disk/coco` is how data sets are laid out. A name cannot leave
    the folder by itself: its `..` are taken as steps back in the name, never in what a link leads to.

    Args:
        folder: image folder.
        name: path inside it, or the address of such a file (`file://`).
        row: what to call the row of the data file in an error.
        follow_links: False refuses links that lead out of the folder: for names that come from strangers.

    Raises:
        BadImageError: the name is not a relative path, leaves the folder, or is not a file.
    """
    try:
        if "\0" in name:
            raise ValueError("it has a null byte")
        root = Path(folder).resolve()
        if str(name).startswith(FILE_ADDRESS):
            name = _named_by(name, [root, Path(os.path.abspath(folder))])
        path = root / os.path.normpath(name)
        real = path.resolve()
        is_file = real.is_file()
    except (TypeError, ValueError, OSError, RuntimeError) as error:  # no string, a null byte, too long, a link loop
        raise BadImageError(f"{row}: {name!r} is no usable image name: {error}") from error
    if os.path.isabs(name) or not path.is_relative_to(root) or os.pardir in path.relative_to(root).parts:
        raise BadImageError(
            f"{row}: image {name!r} lies outside the image folder {root} (it is {path}); name images relative to "
            "--image_folder"
        )
    if not follow_links and not real.is_relative_to(root):
        raise BadImageError(
            f"{row}: image {name!r} lies outside the image folder {root} (a link leads to {real}); link no files into "
            "it from elsewhere"
        )
    if not is_file:
        raise BadImageError(f"{row}: image {name!r} is missing: {path} is no file; check the image folder")
    return path


def _named_by(address: str, roots: list[Path]) -> str:
    """The name of a file in an image folder by its `file://` address; an absolute path if it is not inside."""
    parts = urlsplit(address, allow_fragments=False)
    query = f"?{parts.query}" if parts.query else ""
    path = unquote(("" if parts.netloc == "localhost" else parts.netloc) + parts.path + query)
    if os.path.isabs(path):
        path = os.path.normpath(path)
        inside = next((root for root in roots if Path(path).is_relative_to(root)), None)
        return path if inside is None else os.path.relpath(path, inside)
    return path


def load_image(
    folder: str | os.PathLike[str], name: str, row: object = "", *, follow_links: bool = True
) -> Image.Image:
    """Read an image of a data set completely, as RGB.

    Args:
        folder: image folder.
        name: path inside it.
        row: what to call the row of the data file in an error.
        follow_links: see `image_path`.

    Raises:
        BadImageError: as `image_path` and `read_rgb`.
    """
    path = image_path(folder, name, row, follow_links=follow_links)
    return read_rgb(path, f"{row}: image {path}")


def image_size(folder: str | os.PathLike[str], name: str, row: object = "") -> tuple[int, int]:
    """Width and height of an image in pixels, from the head of its file.

    Raises:
        BadImageError: as `image_path`, or the file does not begin like an image.
    """
    path = image_path(folder, name, row)
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # as in `read_rgb`
        problem = pointer_problem(path) if is_pointer(path) else f"{path}: {error}"
        raise BadImageError(f"{row}: image {problem}") from error


def row_image(folder: str | os.PathLike[str] | None, image: RowImage, row: object = "") -> Image.Image:
    """An image of a row, named by it or stored in it, as RGB; within the same bounds.

    Args:
        folder: image folder; may be None for a stored one.
        image: see `image_names`.
        row: what to call the row of the data file in an error.

    Raises:
        BadImageError: as `load_image`.
        FlagError: the image is named, and there is no folder.
    """
    if not isinstance(image, StoredImage):
        if folder is None:
            raise FlagError(f"{row} names the image {image!r}; set --image_folder")
        return load_image(folder, image, row)
    name = f"{row}: image {image.name}"
    if isinstance(image.content, bytes):
        return read_rgb(io.BytesIO(image.content), name)
    return convert_rgb(image.content, name)


def row_image_size(folder: str | os.PathLike[str], image: RowImage, row: object = "") -> tuple[int, int]:
    """Width and height in pixels of an image of a row, from the head of its file.

    Raises:
        BadImageError: as `image_size`.
    """
    if not isinstance(image, StoredImage):
        return image_size(folder, image, row)
    if not isinstance(image.content, bytes):
        return image.content.size
    try:
        with Image.open(io.BytesIO(image.content)) as opened:
            return opened.size
    except Exception as error:  # as in `read_rgb`
        raise BadImageError(f"{row}: image {image.name}: {error}") from error


def read_rgb(file: Path | BinaryIO, name: str) -> Image.Image:
    """Decode an image as RGB: the first frame, transparency dropped, EXIF orientation ignored, all as in the original.

    Args:
        file: path or open file.
        name: what to call the image in an error.

    Raises:
        BadImageError: it is broken or no image; has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, 160 million, or
            a side out of bounds; or holds numbers without a known range.
    """
    try:
        with Image.open(file) as image:
            _check_shape(image)
            return _to_rgb(image)
    except UnidentifiedImageError as error:  # whose own message repeats the path, or the address of an open file
        if isinstance(file, Path) and is_pointer(file):
            raise BadImageError(f"{name} cannot be read: {pointer_problem(file)}") from error
        raise BadImageError(f"{name} cannot be read: UnidentifiedImageError: it is of no known image format") from error
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        raise BadImageError(f"{name} cannot be read: {type(error).__name__}: {error}") from error


def convert_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image that somebody else has opened, as RGB; arguments and errors as `read_rgb`."""
    try:
        _check_shape(image)
        return _to_rgb(image)
    except Exception as error:  # as in `read_rgb`
        raise BadImageError(f"{name} cannot be read: {type(error).__name__}: {error}") from error


def _check_shape(image: Image.Image) -> None:
    """Refuse, from the header alone, what would take too much memory or run another program."""
    limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if limit is not None and pixels > limit:  # Pillow itself refuses only twice as many
        raise Image.DecompressionBombError(
            f"{pixels} pixels exceed the limit of {limit}, PIL.Image.MAX_IMAGE_PIXELS; make the image smaller"
        )
    short, long = sorted(image.size)
    if short < 1 or long > MAX_SIDE or long > MAX_SIDES_RATIO * short:
        raise ValueError(
            f"it is {image.width} x {image.height} pixels; sides may be 1 to {MAX_SIDE}, and one at most "
            f"{MAX_SIDES_RATIO} times the other"
        )
    if image.format == "EPS":
        raise ValueError("EPS files are drawn by an external program; convert it to PNG")


def _to_rgb(image: Image.Image) -> Image.Image:
    """As RGB with 8 bits; 16-bit greyscale is scaled down, where Pillow would cut it off at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8), mode="L").convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are {image.mode} (32-bit numbers) whose range is unknown; convert it to 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image.load()
        image.info.pop("transparency")  # Pillow warns that it is lost, which is meant
    rgb = image.convert("RGB")
    rgb.info.pop("transparency", None)  # newer processors would make this color white
    return rgb


class ProcessedImage(NamedTuple):
    """Pixel values of an image, (3, height, width) or (tiles, 3, height, width), width and height in the file."""

    pixels: Tensor
    size: tuple[int, int]


class ImageTransform:
    """Turns an RGB image into pixel values.

    Args:
        image_processor: see `load_image_processor`.
        aspect_ratio: value of `--image_aspect_ratio`; see `preprocess_image`.
        grid_pinpoints: possible resolutions of `anyres`.

    Raises:
        FlagError: the aspect ratio is not known, or the resolutions of `anyres` are malformed.
    """

    def __init__(self, image_processor: Any, aspect_ratio: str, grid_pinpoints: GridPinpoints | None = None) -> None:
        if aspect_ratio not in ASPECT_RATIOS:
            raise FlagError(f"--image_aspect_ratio {aspect_ratio}: not known; known: {', '.join(ASPECT_RATIOS)}")
        self.image_processor = image_processor
        self.aspect_ratio = aspect_ratio
        self.tiled = aspect_ratio == "anyres"
        self.grid_pinpoints = parse_grid_pinpoints(grid_pinpoints) if self.tiled else None

    def __call__(self, image: Image.Image, name: str = "the image") -> ProcessedImage:
        """Pixel values of one image.

        Raises:
            BadImageError: see `preprocess_image`; calls it `name`.
        """
        pixels = preprocess_image(image, self.image_processor, self.aspect_ratio, self.grid_pinpoints, name=name)
        return ProcessedImage(pixels, image.size)

    def dummy(self) -> ProcessedImage:
        """The black image that stands in for a row without image; one tile for `anyres`."""
        height, width = output_size(self.image_processor)
        pixels = torch.zeros(3, height, width)
        return ProcessedImage(pixels[None] if self.tiled else pixels, (width, height))
