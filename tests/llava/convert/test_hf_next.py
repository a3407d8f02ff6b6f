"""LLaVA-1.6 in transformers' LLaVA-NeXT: equal logits, ids and pixels of tiled images, exact round trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.convert.hf import from_hf, to_hf
from llava.convert.hf_format import SETTINGS_KEY
from llava.data.pixels import process_images
from llava.data.tiling import unpad_margins
from llava.errors import CheckpointError, FlagError
from llava.eval.answering.prompts import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from tests.llava.convert.test_hf import TEXTS
from tests.model.next_layout import KINDS, PINPOINTS, TEMPLATES, WORDS, write_next

pytestmark = pytest.mark.versions

SIZES = [(30, 90), (90, 30), (57, 61), (28, 28), (200, 31), (13, 40), (84, 28)]
"""Width and height of images, for all resolutions."""


def load(folder: Path) -> tuple[Any, Any, Any]:
    return load_pretrained_model(str(folder), device="cpu")[:3]


def converted(folder: Path, output: Path, kind: str) -> tuple[LlavaNextForConditionalGeneration, Any]:
    """Model and processor as plain transformers loads them, the pixels scaled with Pillow as ours."""
    to_hf(folder, output, conv_mode=TEMPLATES[kind])
    model, report = LlavaNextForConditionalGeneration.from_pretrained(
        output, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    processor = AutoProcessor.from_pretrained(output)
    assert isinstance(processor, LlavaNextProcessor)
    processor.image_processor = LlavaNextImageProcessorPil.from_pretrained(output)
    return model.eval(), processor


def drawn(size: tuple[int, int]) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt_of(kind: str, images: int = 1) -> str:
    conversation = conv_templates[TEMPLATES[kind]].copy()
    conversation.append_message(conversation.roles[0], "<image>\n" * images + "What is shown?")
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


@torch.no_grad()
def both(ours: tuple[Any, Any, Any], theirs: tuple[Any, Any], prompt: str, images: list[Image.Image]) -> Any:
    """Logits of ours and of transformers, and its inputs; our ids with an image's tokens in place are its ids."""
    (tokenizer, model, image_processor), (hf, processor) = ours, theirs
    ids = tokenizer_image_token(prompt, tokenizer)
    pixels = process_images(images, image_processor, model.config)
    sizes = [image.size for image in images]
    expected = model(input_ids=torch.tensor([ids]), images=list(pixels), image_sizes=sizes).logits
    inputs = processor(text=prompt, images=images, return_tensors="pt")
    counts = iter(model.image_lengths(list(pixels), sizes))
    expanded = [i for one in ids for i in ([hf.config.image_token_index] * next(counts) if one == IMAGE_TOKEN_INDEX else [one])]  # fmt: skip  # noqa: E501
    assert inputs.input_ids[0].tolist() == expanded
    for tiles, own in zip(inputs.pixel_values, pixels, strict=True):
        torch.testing.assert_close(tiles[: len(own)], own, rtol=0, atol=1e-5)
    return expected, hf(**inputs).logits, inputs


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits(kind: str, tmp_path: Path) -> None:
    folder = write_next(kind, tmp_path / "llava-v1.6")
    ours, theirs = load(folder), converted(folder, tmp_path / "hf", kind)
    hf = theirs[0]
    assert hf.config.image_token_index == hf.config.text_config.vocab_size - 1 == ours[1].config.vocab_size
    assert hf.config.image_grid_pinpoints == [[height, width] for width, height in PINPOINTS]
    for size in SIZES:
        expected, found, inputs = both(ours, theirs, prompt_of(kind), [drawn(size)])
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=0, atol=1e-5 * scale)
        with torch.no_grad():
            other = hf(**inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}).logits
        assert (other - found).abs().max() > 1e-3 * scale
    expected, found, _ = both(ours, theirs, prompt_of(kind, 2), [drawn(SIZES[0]), drawn(SIZES[2])])
    atol = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_newline_and_tower_matter(kind: str, tmp_path: Path) -> None:
    """What only LLaVA-NeXT has is in the folder as it was trained."""
    folder = write_next(kind, tmp_path / "llava-v1.6")
    model, (hf, _) = load(folder)[1], converted(folder, tmp_path / "hf", kind)
    assert torch.equal(hf.model.image_newline, model.get_model().image_newline)
    mine, theirs = model.get_vision_tower().loaded().state_dict(), hf.model.vision_tower.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "foreign"])
def test_there_and_back(kind: str, foreign: bool, tmp_path: Path) -> None:
    """Also from a folder that another converter wrote: no record, `<pad>` behind `<image>`, spare rows."""
    folder = write_next(kind, tmp_path / "llava-v1.6")
    ours = load(folder)
    to_hf(folder, tmp_path / "hf", conv_mode=TEMPLATES[kind])
    if foreign:
        make_foreign(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "back")
    back = load(tmp_path / "back")
    weights: list[dict[str, Tensor]] = [dict(model.named_parameters()) for _, model, _ in (ours, back)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    names = [
        "image_aspect_ratio",
        "image_grid_pinpoints",
        "mm_patch_merge_type",
        "mm_vision_select_layer",
        "vocab_size",
    ]
    assert [getattr(back[1].config, name) for name in names] == [getattr(ours[1].config, name) for name in names]
    assert type(back[1]) is type(ours[1])
    for text in [*TEXTS, prompt_of(kind)]:
        assert tokenizer_image_token(text, back[0]) == tokenizer_image_token(text, ours[0]), text
    assert (back[0].eos_token, back[0].bos_token) == (ours[0].eos_token, ours[0].bos_token)
    for size in SIZES:
        pixels = [process_images([drawn(size)], processor, model.config)[0] for _, model, processor in (ours, back)]
        assert torch.equal(*pixels)


def make_foreign(folder: Path) -> None:
    """What another converter would have written for the same model."""
    config = json.loads((folder / "config.json").read_text())
    config.pop(SETTINGS_KEY)
    rows = config["text_config"]["vocab_size"]
    config["text_config"]["vocab_size"] = rows + 13
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    grown = {name: value for name, value in tensors.items() if value.shape[0] == rows}
    assert len(grown) == 2
    spare = {name: torch.cat([value, torch.randn(13, value.shape[1]).to(value)]) for name, value in grown.items()}
    save_file(tensors | spare, folder / "model.safetensors", {"format": "pt"})
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    processor.tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_resolutions_of_the_other_order(tmp_path: Path) -> None:
    """Resolutions here are (width, height), there (height, width): a set that is not symmetric shows it."""
    folder = write_next("vicuna", tmp_path / "llava-v1.6", image_grid_pinpoints=[[84, 28], [56, 56]])
    ours, theirs = load(folder), converted(folder, tmp_path / "hf", "vicuna")
    for size in ((90, 30), (30, 90)):
        expected, found, _ = both(ours, theirs, prompt_of("vicuna"), [drawn(size)])
        torch.testing.assert_close(found[..., :WORDS], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert load(tmp_path / "back")[1].config.image_grid_pinpoints == [[84, 28], [56, 56]]


def test_unpadding_is_transformers() -> None:
    """The same rows and columns are cut away for every size of an image."""
    for columns, rows in ((24, 48), (48, 48), (72, 24)):
        for width in range(1, 900, 7):
            for height in range(1, 900, 11):
                above, left = unpad_margins((columns, rows), (width, height))
                assert (rows - 2 * above, columns - 2 * left) == kept(rows, columns, height, width)


def kept(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns that transformers' processor counts."""
    count, _ = LlavaNextProcessor._get_unpadded_features(None, height, width, rows, columns, 1, 1)
    newlines = LlavaNextProcessor._get_unpadded_features(None, height, width, rows, columns, 1, 1)[1]
    return newlines, count // newlines if newlines else columns


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_patch_merge_type": "flat"}, "anyres with mm_patch_merge_type flat"),
        ({"image_aspect_ratio": "pad"}, "pad with mm_patch_merge_type spatial_unpad"),
    ],
)
def test_what_next_cannot_express(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_next("vicuna", tmp_path / "llava-v1.6", **changes)
    if changes.get("mm_patch_merge_type") == "flat":  # which has no vector that ends a row
        for path in folder.glob("model-*.safetensors"):
            tensors = load_file(path)
            if tensors.pop("model.image_newline", None) is not None:
                save_file(tensors, path, {"format": "pt"})
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        del index["weight_map"]["model.image_newline"]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FlagError, match=message):
        to_hf(folder, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_damaged_next_folders_are_refused(tmp_path: Path) -> None:
    folder = write_next("vicuna", tmp_path / "llava-v1.6")
    to_hf(folder, tmp_path / "hf")
    with pytest.raises(FlagError, match="whose images are anyres"):
        from_hf(tmp_path / "hf", tmp_path / "back", image_aspect_ratio="pad")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"image_grid_pinpoints": [[28, 56]]}))
    with pytest.raises(CheckpointError, match=r"image_grid_pinpoints \[\[28, 56\]\]"):
        from_hf(tmp_path / "hf", tmp_path / "back")
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "hf/model.safetensors")
    save_file(tensors | {"odd.weight": torch.zeros(2)}, tmp_path / "hf/model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"belong to no part of a LlavaNext.*odd\.weight"):
        from_hf(tmp_path / "hf", tmp_path / "back")
    assert not (tmp_path / "back").exists()
