"""What is made of an image bounds its size: photographs pass everywhere, strips that become squares do not."""

from __future__ import annotations

import base64
import io
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava.data.check import main as check
from llava.data.image_bounds import ALWAYS_MADE, TIMES_OWN, check_made, made_size
from llava.data.images import ImageTransform, load_image, load_image_processor
from llava.data.pixels import ASPECT_RATIOS, preprocess_image
from llava.errors import BadImageError, LlavaError
from llava.eval.answering.answers import Task
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.runner import load_images
from llava.serve.image_urls import ImagePolicy
from llava.train.train import main as train
from mma.lavin.chat import load_chat_image
from tests.golden import golden_dir
from tests.llava.model.towers import siglip
from tests.llava.train.test_training import BASE, command_line

STRIP = (50, 10_000)
PINPOINTS = [(28, 56), (56, 28), (56, 56)]
PHOTOGRAPHS = [(6000, 4000), (4000, 6000), (8256, 5504), (9504, 6336), (11_648, 8736), (14_142, 7071), (16_000, 4000)]
"""24 to 100 megapixels and a panorama of a telephone."""


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_image_processor(golden_dir("llava") / "tiny-clip")


@pytest.fixture(scope="module")
def strip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a few kilobytes."""
    path = tmp_path_factory.mktemp("strip") / "strip.png"
    Image.new("RGB", STRIP, "red").save(path)
    assert path.stat().st_size < 10_000
    return path


@pytest.mark.parametrize("aspect_ratio", ASPECT_RATIOS)
@pytest.mark.parametrize("size", PHOTOGRAPHS)
def test_photographs_pass(size: tuple[int, int], aspect_ratio: str, processor: Any) -> None:
    for most in (None, ImagePolicy.max_pixels) if size[0] < 16_000 else (None,):
        check_made(size, processor, aspect_ratio, PINPOINTS, most=most)


def test_what_is_made_is_what_is_counted(processor: Any, tmp_path: Path) -> None:
    """The largest image that Pillow makes on the way, for every setting and two kinds of processors."""
    siglip_processor = load_pil(siglip(tmp_path / "siglip"))
    for size in ((40, 300), (300, 40), (5, 500), (64, 64)):
        for aspect_ratio in ASPECT_RATIOS:
            for each in (processor, siglip_processor):
                bound = product(made_size(size, each, aspect_ratio, PINPOINTS))
                seen = made_by_pillow(Image.new("RGB", size), each, aspect_ratio)
                # Columns are scaled first, as within Pillow, whose image of that moment is seen here.
                assert max(w * h for w, h in seen) <= max(bound, product(size), 28 * size[1]), (
                    size,
                    aspect_ratio,
                    seen,
                )
                # A subclass, for which the steps are not shortened.
                seen = made_by_pillow(Image.new("RGB", size), unknown(each), aspect_ratio)
                assert max(w * h for w, h in seen) == bound, (size, aspect_ratio, seen)


def unknown(processor: Any) -> Any:
    """The same processor as an instance of a class of its own."""
    kind = type("Own", (type(processor),), {})
    made = kind.__new__(kind)
    made.__dict__.update(vars(processor))
    return made


def load_pil(folder: Path) -> Any:
    from transformers import SiglipImageProcessorPil

    return SiglipImageProcessorPil.from_pretrained(folder)


def product(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def made_by_pillow(image: Image.Image, processor: Any, aspect_ratio: str) -> list[tuple[int, int]]:
    """Sizes of all images that `resize` and `new` give while an image becomes pixel values."""
    seen: list[tuple[int, int]] = []
    resize, new = Image.Image.resize, Image.new

    def noted_resize(self: Image.Image, size: Any, *args: Any, **kwargs: Any) -> Image.Image:
        seen.append(tuple(size))
        return resize(self, size, *args, **kwargs)

    def noted_new(mode: str, size: Any, *args: Any, **kwargs: Any) -> Image.Image:
        seen.append(tuple(size))
        return new(mode, size, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", noted_resize)
        patch.setattr(Image, "new", noted_new)
        preprocess_image(image, processor, aspect_ratio, PINPOINTS)
    return seen


@pytest.mark.parametrize("size", [STRIP, STRIP[::-1], (1, 5001), (600, 20_000), (100, 20_000), (2000, 16_001)])
def test_strips_are_refused_with_both_numbers(size: tuple[int, int], processor: Any) -> None:
    made, limit = max(size) ** 2, max(ALWAYS_MADE, TIMES_OWN * product(size))
    assert made > limit
    with pytest.raises(
        BadImageError, match=f"^data.json, row 3: image x.png: .* = {made:,}, and the limit is {limit:,}"
    ):
        check_made(size, processor, "pad", name="data.json, row 3: image x.png")
    for aspect_ratio in ("stretch", "square", "anyres"):  # make little of it
        check_made(size, processor, aspect_ratio, PINPOINTS)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (50, 5000), (5000, 5000), (2000, 16_000), (250, 2000)])
def test_others_are_not(size: tuple[int, int], processor: Any) -> None:
    for aspect_ratio in ASPECT_RATIOS:
        check_made(size, processor, aspect_ratio, PINPOINTS)


def test_a_photograph_costs_no_multiple_of_itself(processor: Any) -> None:
    """24 megapixels: numpy's and Python's memory stays small, and the pixels are those of the processor alone."""
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    large = image.resize((6000, 4000))
    tracemalloc.start()
    for aspect_ratio in ("square", "pad", "stretch"):
        preprocess_image(large, processor, aspect_ratio)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6  # seen: 0.1 MB; the processor alone takes 1,000 MB
    alone = processor(large, return_tensors="pt")["pixel_values"][0]
    assert (preprocess_image(large, processor, "square") == alone).all()


# The programs


def refused(call: Any) -> str:
    with pytest.raises(LlavaError) as error:
        call()
    assert "100,000,000" in str(error.value)
    assert f"{ALWAYS_MADE:,}" in str(error.value)
    return str(error.value)


def rows(folder: Path, image: str) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A strip."}]
    path = folder / "data.json"
    path.write_text(json.dumps([{"id": "0", "image": image, "conversations": turns}] * 2))
    return path


def loaded(processor: Any, aspect_ratio: str) -> LoadedModel:
    config = SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=PINPOINTS)
    return LoadedModel("tiny", None, SimpleNamespace(config=config), processor)


def test_training_and_check_refuse_a_strip(strip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows(tmp_path, strip.name)
    words = command_line(tmp_path / "out", data_path=data, image_folder=strip.parent, dataloader_num_workers=0)
    assert "strip.png" in refused(lambda: train(words))
    asked = [str(data), "--image_folder", str(strip.parent), "--model_name_or_path", str(BASE), "--num_workers", "0"]
    assert check(asked) == 1
    assert "100,000,000" in capsys.readouterr().out
    assert check([*asked, "--image_aspect_ratio", "square", "--allow", "duplicate id"]) == 0


def test_training_check_and_evaluation_follow_links_out_of_the_folder(tmp_path: Path, processor: Any) -> None:
    """`images/coco -> /disk/coco`, as data sets are laid out; `..` in a row does not leave the folder."""
    folder, disk = tmp_path / "images", tmp_path / "disk" / "coco"
    folder.mkdir()
    disk.mkdir(parents=True)
    Image.new("RGB", (60, 40), "red").save(disk / "a.png")
    Image.new("RGB", (60, 40), "red").save(disk.parent / "secret.png")
    (folder / "coco").symlink_to(disk)
    data = rows(tmp_path, "coco/a.png")
    options = {"data_path": data, "image_folder": folder, "dataloader_num_workers": 0, "max_steps": 1}
    train(command_line(tmp_path / "out", **options))
    asked = [str(data), "--image_folder", str(folder), "--model_name_or_path", str(BASE), "--num_workers", "0"]
    assert check([*asked, "--allow", "duplicate id"]) == 0
    task = Task(0, "", "", ("coco/a.png",), where="questions.jsonl:1")
    images = load_images(task, loaded(processor, "pad"), lambda name, where: load_image(folder, name, where))
    assert images[0].size == (60, 40)
    for name in ("coco/../secret.png", "../disk/secret.png"):
        options["data_path"] = rows(tmp_path, name)
        with pytest.raises(LlavaError, match=r"secret\.png"):
            train(command_line(tmp_path / "again", **options))
        assert check([*asked, "--allow", "duplicate id"]) == 1


def test_evaluation_refuses_a_strip(strip: Path, processor: Any) -> None:
    task = Task(0, "", "", (strip.name,), where="questions.jsonl:1")
    said = refused(
        lambda: load_images(task, loaded(processor, "pad"), lambda name, where: load_image(strip.parent, name, where))
    )
    assert "questions.jsonl:1: image strip.png" in said


def test_the_demo_of_lavin_refuses_a_strip(strip: Path, processor: Any) -> None:
    refused(lambda: load_chat_image(strip, loaded(processor, "pad")))


def test_the_server_refuses_a_strip_and_has_a_limit_of_its_own(strip: Path, processor: Any) -> None:
    url = "data:image/png;base64," + base64.b64encode(strip.read_bytes()).decode()
    policy = ImagePolicy()
    assert "messages" in refused(lambda: policy.open_for(loaded(processor, "pad"))(url, "messages"))
    assert policy.open_for(loaded(processor, "square"))(url, "messages").size == STRIP
    file = io.BytesIO()
    Image.new("RGB", (300, 200)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    small = ImagePolicy(max_pixels=60_000)
    assert small.open_for(loaded(processor, "square"))(url, "messages").size == (300, 200)
    with pytest.raises(BadImageError, match=r"= 90,000, and the limit here is 60,000; .*--max-image-pixels"):
        small.open_for(loaded(processor, "pad"))(url, "messages")


def test_a_photograph_of_100_megapixels_is_read(processor: Any, tmp_path: Path) -> None:
    """Through file, transform and server, without Pillow's warning."""
    Image.new("L", (11_648, 8736), 200).save(tmp_path / "large.jpg", quality=30)
    image = load_image(tmp_path, "large.jpg", "row 0")
    assert ImageTransform(processor, "pad")(image).pixels.shape == (3, 28, 28)
    url = "data:image/jpeg;base64," + base64.b64encode((tmp_path / "large.jpg").read_bytes()).decode()
    assert ImagePolicy().open_for(loaded(processor, "pad"))(url, "messages").size == (11_648, 8736)
