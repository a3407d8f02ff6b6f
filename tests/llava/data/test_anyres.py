"""Images as tiles, against the golden numbers; what the options of `anyres` refuse; the demos' image modes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava.data.images import ImageTransform, load_image_processor
from llava.data.pixels import process_image, process_images
from llava.data.tiling import ImageLength, check_grid_pinpoints, parse_grid_pinpoints
from llava.errors import FlagError
from llava.mm_utils import divide_to_patches, get_anyres_image_grid_shape, resize_and_pad_image, select_best_resolution
from llava.model.tiles import merge_tiles, unpad_image
from tests.golden import golden_dir, load_case

CASE, TENSORS = load_case("llava", "images")
LISTS = {name: [tuple(pair) for pair in pairs] for name, pairs in CASE["geom_lists"].items()}
PINPOINTS = CASE["pinpoints"]


def golden_image(index: int | str) -> Image.Image:
    return Image.fromarray(TENSORS[f"in/img_{index}"].numpy())


def assert_same_pixels(image: Image.Image, key: str) -> None:
    assert torch.equal(torch.from_numpy(np.array(image)), TENSORS[key]), key


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_image_processor(golden_dir("llava") / "tiny-clip")


def test_best_resolution_and_grid() -> None:
    assert len(CASE["select_best_resolution"]) > 20
    for case in CASE["select_best_resolution"]:
        assert list(select_best_resolution(tuple(case["size"]), LISTS[case["list"]])) == case["best"], case
    assert any(case["as_string"] for case in CASE["grid_shape"])
    for case in CASE["grid_shape"]:
        pinpoints = str(LISTS[case["list"]]) if case["as_string"] else LISTS[case["list"]]
        shape = get_anyres_image_grid_shape(tuple(case["size"]), pinpoints, case["patch_size"])
        assert list(shape) == case["shape"], case


def test_resize_and_pad() -> None:
    keys = [key for key in TENSORS if key.startswith("out/resize_and_pad/")]
    assert len(keys) == 8
    for key in keys:
        index, resolution = key.split("/")[2:]
        assert_same_pixels(resize_and_pad_image(golden_image(index), tuple(PINPOINTS[int(resolution)])), key)


def test_divide() -> None:
    keys = [key for key in TENSORS if key.startswith("out/divide/")]
    assert len(keys) == 12
    for key in keys:
        index, size, tile = key.split("/")[2:]
        tiles = divide_to_patches(golden_image(index), int(size))
        assert len(tiles) == 6
        assert_same_pixels(tiles[int(tile)], key)


def test_unpad() -> None:
    for case in CASE["unpad"]:
        result = unpad_image(TENSORS[f"in/unpad_{case['index']}"], tuple(case["original_size"]))
        assert torch.equal(result, TENSORS[f"out/unpad_{case['index']}"])
        assert list(result.shape) == case["out_shape"]


def test_process_images(processor: Any) -> None:
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS)
    result = process_images([golden_image(1), golden_image(3)], processor, config)
    assert isinstance(result, list)
    for index, tiles in enumerate(result):
        torch.testing.assert_close(tiles, TENSORS[f"out/process/crop28/anyres/{index}"], atol=1e-6, rtol=0)
    twice = process_images([golden_image(1), golden_image(1)], processor, config)
    assert twice.shape == (2, 5, 3, 28, 28)
    torch.testing.assert_close(twice[1], result[0], atol=0, rtol=0)


def test_image_modes_of_the_demos() -> None:
    keys = [key for key in TENSORS if key.startswith("out/conv_process/")]
    assert len(keys) == 9
    for key in keys:
        index, mode = key.split("/")[2:]
        assert_same_pixels(process_image(golden_image(index), mode, **CASE["conv_process_kwargs"]), key)
    with pytest.raises(ValueError, match="Shrink"):
        process_image(golden_image(0), "Shrink")


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_lengths_are_those_of_the_merged_features(merge_type: str, processor: Any) -> None:
    """For every golden size, and for images so narrow that unpadding leaves nothing."""
    sizes = [tuple(size) for size in CASE["sizes"]] + [(1, 400), (400, 1), (17, 90), (99, 100)]
    length = ImageLength(features=4, merge_type=merge_type, resolutions=PINPOINTS, tile_size=28)
    transform = ImageTransform(processor, "anyres", PINPOINTS)
    seen = set()
    for size in sizes:
        image = transform(Image.new("RGB", size))
        grid = get_anyres_image_grid_shape(size, PINPOINTS, 28)
        features = torch.randn(len(image.pixels), 4, 5)
        merged = merge_tiles(features, merge_type, grid, size, torch.randn(5))
        assert length(image.pixels, image.size) == len(merged)
        seen.add(len(merged))
    assert len(seen) > 2
    dummy = transform.dummy()
    expected = len(merge_tiles(torch.randn(1, 4, 5), merge_type, None, dummy.size, torch.randn(5)))
    assert length(dummy.pixels, dummy.size) == expected


@pytest.mark.parametrize(
    "value", [None, "", "[]", "[(336,)]", "[(336, 672.0)]", "[(0, 336)]", "(336, 672)", "__import__"]
)
def test_malformed_pinpoints_are_refused(value: Any) -> None:
    with pytest.raises(FlagError, match="--image_grid_pinpoints"):
        parse_grid_pinpoints(value)


def test_pinpoints_must_be_whole_tiles() -> None:
    assert check_grid_pinpoints("[(28, 56), [56, 28]]", 28) == [(28, 56), (56, 28)]
    with pytest.raises(FlagError, match=r"\(30, 56\).*multiples of 28"):
        check_grid_pinpoints([(28, 56), (30, 56)], 28)
