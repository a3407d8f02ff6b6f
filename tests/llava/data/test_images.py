"""Pixel values against the golden ones, and images that must be refused."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from llava.data.images import ImageTransform, load_image, load_image_processor
from llava.data.pixels import expand2square, process_images
from llava.errors import BadImageError, BadSampleError, FlagError
from tests.golden import golden_dir, load_case

CASE, TENSORS = load_case("llava", "images")
PLAIN_CASES = [case for case in CASE["process_images"] if case["mode"] in ("pad", "square", "resize", None)]
TOLERANCE = 1e-6  # measured difference: 0


def golden_image(index: int) -> Image.Image:
    return Image.fromarray(TENSORS[f"in/img_{index}"].numpy())


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_image_processor(golden_dir("llava") / "tiny-clip")


@pytest.mark.parametrize("case", PLAIN_CASES, ids=lambda case: str(case["mode"]))
def test_process_images(case: dict, processor: Any) -> None:
    assert len(PLAIN_CASES) == 4
    images = [golden_image(index) for index in (1, 2, 3)]
    result = process_images(images, processor, SimpleNamespace(image_aspect_ratio=case["mode"]))
    expected = TENSORS[case.get("key") or case["identical_to"]]
    torch.testing.assert_close(result, expected, atol=TOLERANCE, rtol=0)


def test_expand2square() -> None:
    for index in range(CASE["n_images"]):
        squared = expand2square(golden_image(index), tuple(CASE["pad_background"]))
        expected = Image.fromarray(TENSORS[f"out/expand2square/{index}"].numpy())
        assert squared.tobytes() == expected.tobytes()


@pytest.mark.parametrize("index", range(CASE["n_images"]))
def test_stretch_keeps_the_whole_image(index: int, processor: Any) -> None:
    image = golden_image(index)
    result = ImageTransform(processor, "stretch")(image).pixels
    whole = image.resize((28, 28), Image.Resampling.BICUBIC)
    torch.testing.assert_close(result, ImageTransform(processor, "square")(whole).pixels, atol=TOLERANCE, rtol=0)
    cropped = ImageTransform(processor, "square")(image).pixels
    assert torch.equal(result, cropped) == (image.width == image.height)


def test_pillow_is_needed_for_the_values_of_the_original(processor: Any) -> None:
    from transformers import CLIPImageProcessor

    other = CLIPImageProcessor.from_pretrained(golden_dir("llava") / "tiny-clip")
    image = golden_image(1)
    difference = ImageTransform(processor, "square")(image).pixels - ImageTransform(other, "square")(image).pixels
    assert difference.abs().max() > 1e-3


def test_unknown_aspect_ratios_are_refused(processor: Any) -> None:
    with pytest.raises(FlagError, match=r"--image_aspect_ratio round: .*pad, square, resize, stretch"):
        ImageTransform(processor, "round")
    with pytest.raises(FlagError, match="--image_aspect_ratio round"):
        process_images([golden_image(0)], processor, SimpleNamespace(image_aspect_ratio="round"))


def test_the_dummy_is_all_zero(processor: Any) -> None:
    dummy = ImageTransform(processor, "pad").dummy()
    assert dummy.pixels.shape == (3, 28, 28)
    assert not dummy.pixels.any()
    assert ImageTransform(processor, "anyres", [(28, 56)]).dummy().pixels.shape == (1, 3, 28, 28)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image folder with good and bad images; `secret.png` lies beside it. Pillow warns from 10 000 pixels on."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    golden_image(0).save(folder / "good.png")
    golden_image(0).save(folder / "sub" / "good.png")
    golden_image(0).save(tmp_path / "secret.png")
    data = (folder / "good.png").read_bytes()
    (folder / "broken.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "inside.png").symlink_to(folder / "good.png")
    Image.new("1", (110, 100)).save(folder / "bomb.png")
    Image.new("1", (1000, 1000)).save(folder / "bigger_bomb.png")
    return folder


@pytest.mark.parametrize("name", ["good.png", "sub/good.png", "sub/../good.png", "inside.png", "link.png"])
def test_good_images(name: str, folder: Path) -> None:
    assert load_image(folder, name, "row 0").tobytes() == golden_image(0).tobytes()


def test_grey_images_become_rgb() -> None:
    image = load_image(golden_dir("llava") / "data" / "images", "im2.png")
    assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.png", "is missing"),
        ("sub", "is missing"),
        ("broken.png", "cannot be read"),
        ("text.png", "cannot be read: UnidentifiedImageError"),
        ("bomb.png", "cannot be read: DecompressionBombError"),
        ("bigger_bomb.png", "cannot be read: DecompressionBombError"),
        ("../secret.png", "lies outside"),
        ("sub/../../secret.png", "lies outside"),
        ("loop.png", "no usable image name"),
        ("nul\0.png", "no usable image name"),
        ("x" * 300, "no usable image name"),
        (7, "no usable image name"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow warns; we refuse
def test_bad_images_name_row_and_file(name: Any, message: str, folder: Path) -> None:
    with pytest.raises(BadImageError, match=f"(?s)^data.json, row 3: .*{message}") as error:
        load_image(folder, name, "data.json, row 3")
    assert str(name).replace("\0", r"\x00") in str(error.value)
    assert isinstance(error.value, BadSampleError)


def test_absolute_paths_are_refused_even_inside_the_folder(folder: Path) -> None:
    for path in (folder.parent / "secret.png", folder / "good.png"):
        with pytest.raises(BadImageError, match="lies outside the image folder"):
            load_image(folder, os.fspath(path), "row 0")
