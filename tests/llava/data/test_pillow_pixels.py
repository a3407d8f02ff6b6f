"""Pixel values by fewer steps are, bit for bit, those that transformers' processor gives for the padded image."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llava.data.images import ImageTransform, load_image
from llava.data.pillow_pixels import is_known
from llava.data.pixels import ASPECT_RATIOS, preprocess_image
from llava.data.tiling import divide_to_patches, resize_and_pad_image, select_best_resolution

PINPOINTS = [(24, 48), (48, 24), (48, 48), (72, 24)]
SIZES = (
    (64, 48),
    (48, 64),
    (31, 31),
    (24, 24),
    (97, 33),
    (33, 98),
    (50, 1),
    (1, 50),
    (24, 37),
    (37, 24),
    (7, 5),
    (5, 8),
)


def clip(edge: int = 24, crop: tuple[int, int] = (24, 24), **settings: Any) -> CLIPImageProcessorPil:
    size = {"height": crop[0], "width": crop[1]}
    return CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=size, **settings)


PROCESSORS: dict[str, Any] = {
    "CLIP": clip(),
    "crop smaller than the edge, odd": clip(29, (24, 17)),
    "crop larger than the edge": clip(21, (24, 27)),
    "SigLIP": SiglipImageProcessorPil(size={"height": 24, "width": 24}),
    "SigLIP, not square": SiglipImageProcessorPil(size={"height": 24, "width": 30}),
    "nothing scaled": clip(do_resize=False),
    "nothing cropped": clip(do_center_crop=False),
    "nothing normalized": clip(do_normalize=False),
    "bytes": clip(do_normalize=False, do_rescale=False),
    "not rescaled": clip(do_rescale=False),
    "other numbers": clip(image_mean=[0.1, 0.9, 0.5], image_std=[0.3, 1.7, 0.01], rescale_factor=0.007),
    **{f.name: clip(resample=f) for f in Image.Resampling},
}


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Noise has every byte and no two equal lines."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def plain(image: Image.Image, processor: Any, aspect_ratio: str) -> Tensor:
    """The formula of upstream: pad, stretch or tile, then transformers' processor on the whole."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    if aspect_ratio == "pad":
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in processor.image_mean))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    elif aspect_ratio == "stretch":
        image = image.resize((size["width"], size["height"]), Image.Resampling.BICUBIC)
    pieces = [image]
    if aspect_ratio == "anyres":
        side = processor.size["shortest_edge"] if "shortest_edge" in processor.size else processor.size["height"]
        canvas = resize_and_pad_image(image, select_best_resolution(image.size, PINPOINTS))
        pieces = [image.resize((side, side)), *divide_to_patches(canvas, size["height"])]
    values = [processor(piece, return_tensors="pt")["pixel_values"][0] for piece in pieces]
    return torch.stack(values) if aspect_ratio == "anyres" else values[0]


@pytest.mark.parametrize("name", PROCESSORS)
def test_values_are_those_of_the_processor(name: str) -> None:
    processor, compared = PROCESSORS[name], 0
    for size, aspect_ratio in itertools.product(SIZES, ASPECT_RATIOS):
        if aspect_ratio in ("anyres", "stretch") and (not processor.do_resize or not processor.do_center_crop):
            continue  # there the size of a tile or of the stretched image is unknown
        image = noise(size)
        expected = plain(image, processor, aspect_ratio)
        found = preprocess_image(image, processor, aspect_ratio, PINPOINTS)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), (size, aspect_ratio)
        assert found.is_contiguous()
        compared += 1
    assert compared >= 3 * len(SIZES)
    assert is_known(noise((8, 8)), processor) == (name != "NEAREST")


def test_one_large_photograph_of_the_usual_size() -> None:
    """Sizes of LLaVA-1.5, and an image so much larger that each value is a sum over many pixels."""
    processor = clip(336, (336, 336))
    for size, aspect_ratio in itertools.product(((640, 480), (1023, 1999)), ("pad", "square")):
        image = noise(size)
        assert torch.equal(preprocess_image(image, processor, aspect_ratio), plain(image, processor, aspect_ratio))


def test_the_comparison_sees_one_wrong_step() -> None:
    """Neither another filter, nor cropping before scaling, nor normalization in another order is equal."""
    image, processor = noise((64, 48)), PROCESSORS["CLIP"]
    found = preprocess_image(image, processor, "square")
    assert not torch.equal(found, preprocess_image(image, PROCESSORS["BILINEAR"], "square"))
    assert not torch.equal(found, preprocess_image(image.crop((8, 0, 56, 48)), processor, "square"))
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    raw = preprocess_image(image, PROCESSORS["bytes"], "square").float()
    assert not torch.equal(found, (raw - 255 * mean) / (255 * std))


class Darker(CLIPImageProcessorPil):
    """Computes something of its own."""

    def normalize(self, image: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
        return super().normalize(image, *args, **kwargs) - 1


def test_other_processors_do_the_work_themselves() -> None:
    darker = Darker(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    image = noise((64, 48))
    for aspect_ratio in ("pad", "square", "anyres"):
        ours = preprocess_image(image, darker, aspect_ratio, PINPOINTS)
        assert torch.equal(ours, plain(image, darker, aspect_ratio))
        assert not torch.equal(ours, preprocess_image(image, PROCESSORS["CLIP"], aspect_ratio, PINPOINTS))


def test_settings_may_change_after_the_first_image() -> None:
    processor, image = clip(), noise((64, 48))
    before = preprocess_image(image, processor, "pad")
    processor.image_mean = [0.5, 0.5, 0.5]
    after = preprocess_image(image, processor, "pad")
    assert torch.equal(after, plain(image, processor, "pad"))
    assert not torch.equal(before, after)


def saved(folder: Path) -> dict[str, tuple[str, Image.Image]]:
    """Files of every kind of pixels, and what each one shows."""
    image = noise((40, 30))
    deep = np.random.default_rng(1).integers(0, 65536, (30, 40), dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, which the original does not do
    transparent = image.copy()
    transparent.putalpha(noise((40, 30), 2).convert("L"))
    palette = image.quantize(16)
    half = image.copy()
    half.paste((10, 20, 30), (0, 0, 20, 30))
    kinds: dict[str, tuple[str, Image.Image, dict[str, Any]]] = {
        "L": ("l.png", image.convert("L"), {}),
        "1": ("1.png", image.convert("1"), {}),
        "P": ("p.png", palette, {}),
        "P with a transparent color": ("t.png", palette, {"transparency": 3}),
        "RGB with a transparent color": ("key.png", half, {"transparency": (10, 20, 30)}),
        "L with a transparent grey": (
            "grey.png",
            half.convert("L"),
            {"transparency": half.convert("L").getpixel((0, 0))},
        ),
        "RGBA": ("rgba.png", transparent, {}),
        "CMYK": ("cmyk.jpg", image.convert("CMYK"), {}),
        "16 bit": ("16.png", Image.fromarray(deep), {}),
        "turned by EXIF": ("turned.jpg", image, {"exif": exif}),
    }
    for name, content, options in kinds.values():
        content.save(folder / name, **options)
    shown = {kind: Image.open(folder / name) for kind, (name, _, _) in kinds.items()}
    shown["16 bit"] = Image.fromarray((deep >> 8).astype(np.uint8))
    # Arrays, because a transparent color would go on with the image.
    return {kind: (kinds[kind][0], Image.fromarray(np.asarray(image.convert("RGB")))) for kind, image in shown.items()}


def test_files_of_every_mode_are_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = saved(tmp_path)
    expected = {
        (kind, aspect_ratio): plain(image, PROCESSORS["CLIP"], aspect_ratio)
        for (kind, (_, image)), aspect_ratio in itertools.product(files.items(), ("pad", "square"))
    }
    opened, open_ = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(args) or open_(*args, **kwargs))
    preprocess_image(noise((8, 8)), PROCESSORS["CLIP"], "pad")
    with monkeypatch.context() as patch:  # it was asked once for the 256 bytes, so for nothing more
        patch.setattr(CLIPImageProcessorPil, "preprocess", lambda *args, **kwargs: pytest.fail("it was asked"))
        for (kind, aspect_ratio), values in expected.items():
            transform = ImageTransform(PROCESSORS["CLIP"], aspect_ratio)
            image = load_image(tmp_path, files[kind][0])
            assert torch.equal(transform(image).pixels, values), (kind, aspect_ratio)
    assert len(opened) == len(expected)
