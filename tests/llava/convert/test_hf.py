"""transformers' own LLaVA format: equal logits, ids, prompts and answers; exact round trips; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.convert.hf import from_hf, to_hf
from llava.convert.hf_format import SETTINGS_KEY, check_convertible
from llava.convert.hf_processor import hf_tokenizer
from llava.data.pixels import process_images
from llava.errors import CheckpointError, FlagError
from llava.eval.answering.prompts import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.open_clip_encoder import OpenClipVisionTower
from llava.train.train import main as train
from tests.golden import golden_dir, load_case
from tests.llava.model import towers
from tests.llava.runtime.tokenizers import make_tokenizer
from tests.llava.train.test_training import BASE, LLAVA, command_line
from tests.model import backbones

pytestmark = pytest.mark.versions

VICUNA = LLAVA / "tiny-vicuna"
CLIP = LLAVA / "tiny-clip"
PROMPT = conv_templates["vicuna_v1"].system + " USER: <image>\nWhat is shown? ASSISTANT:"
TEXTS = [
    PROMPT,
    "<image>\n a b",
    "USER: <image>\n<image>\nCompare <image> two</s>",
    "a <image><image> b é 漢字\n\n",
    "A. USER: <image>\nHi ASSISTANT: Yes.</s>USER: and  now? ASSISTANT:",
    "No picture",
    "",
    "</s>USER: hi",
    "<image>",
]


def load(folder: Path, base: Path | None = None) -> tuple[Any, Any, Any]:
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), str(base) if base else None, device="cpu")
    return tokenizer, model, processor


def converted(checkpoint: Path, output: Path, **options: Any) -> tuple[LlavaForConditionalGeneration, Any]:
    """Model and processor as plain transformers loads them."""
    to_hf(checkpoint, output, **options)
    model, report = LlavaForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval(), AutoProcessor.from_pretrained(output)


def expand(ids: list[int], image_token: int, count: int) -> Tensor:
    """Ids with as many image tokens as one image has embeddings."""
    return torch.tensor(
        [[i for index in ids for i in ([image_token] * count if index == IMAGE_TOKEN_INDEX else [index])]]
    )


def drawn_image(seed: int = 0, size: tuple[int, int] = (33, 50)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def assert_same_logits(ours: tuple[Any, Any, Any], theirs: tuple[Any, Any], atol: float = 2e-5) -> None:
    """Same logits for text alone and with one and two images; the images must matter."""
    (tokenizer, model, image_processor), (hf, processor) = ours, theirs
    image_token, count = hf.config.image_token_index, model.get_vision_tower().num_features
    pixels = process_images([drawn_image(0), drawn_image(1)], image_processor, model.config)
    for prompt in ("No picture at all.", PROMPT, f"{PROMPT} Yes.</s>USER: <image>\nAnd this?"):
        ids = tokenizer_image_token(prompt, tokenizer)
        images = ids.count(IMAGE_TOKEN_INDEX)
        expanded = expand(ids, image_token, count)
        assert (
            processor(text=prompt, images=[drawn_image(0), drawn_image(1)][:images] or None).input_ids
            == expanded.tolist()
        )
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids]), images=pixels[:images] if images else None).logits
            result = hf(input_ids=expanded, pixel_values=pixels[:images] if images else None).logits
        torch.testing.assert_close(result[..., : expected.shape[-1]], expected, rtol=0, atol=atol)
        if images:
            with torch.no_grad():
                other = hf(input_ids=expanded, pixel_values=pixels[:images].flip(-1)).logits
            assert (other - result).abs().max() > 1e-3


def assert_same_checkpoint(first: tuple[Any, Any, Any], second: tuple[Any, Any, Any]) -> None:
    """Weights bit by bit, settings, ids and pixel settings."""
    weights = [model.state_dict() for _, model, _ in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    settings = [model.config.to_dict() for _, model, _ in (first, second)]
    tower = {"mm_vision_tower", "mm_vision_tower_sha256"}
    ignored = tower | {"_name_or_path", "transformers_version", "architectures", "extensions"}
    for name in (settings[0].keys() | settings[1].keys()) - ignored:
        assert settings[0].get(name) == settings[1].get(name), name
    for text in TEXTS:
        assert tokenizer_image_token(text, first[0]) == tokenizer_image_token(text, second[0])
    assert first[0].pad_token_id == second[0].pad_token_id
    pixels = [process_images([drawn_image()], processor, model.config) for _, model, processor in (first, second)]
    assert torch.equal(*pixels)


def test_golden_checkpoint(tmp_path: Path) -> None:
    """The numbers of the original code come out of plain transformers."""
    ours = load(BASE)
    hf, processor = converted(BASE, tmp_path / "hf")
    assert_same_logits(ours, (hf, processor))
    case, tensors = load_case("llava", "load")
    ids = expand(tensors["in/input_ids"][0].tolist(), hf.config.image_token_index, 4)
    with torch.no_grad():
        logits = hf(input_ids=ids, pixel_values=tensors["in/images"][:1]).logits[..., :896]
    expected = tensors["out/tiny-llava-v1.5/logits_strided"][:1]
    torch.testing.assert_close(logits[..., :: case["logit_stride"]], expected, rtol=0, atol=1e-4)
    assert (hf.config.image_token_index, hf.config.vision_feature_layer, hf.config.image_seq_length) == (896, -2, 4)
    assert (hf.config.vision_feature_select_strategy, processor.num_additional_image_tokens) == ("default", 1)
    assert processor.patch_size == 14
    assert processor.image_processor.do_pad is True
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert_same_checkpoint(ours, load(tmp_path / "back"))


def test_pixels(tmp_path: Path) -> None:
    """Padding is on. With Pillow they are ours exactly; transformers' default resizes with torchvision."""
    _, model, image_processor = load(BASE)
    _, processor = converted(BASE, tmp_path / "hf")
    expected = process_images([drawn_image()], image_processor, model.config)
    result = torch.as_tensor(np.asarray(processor.image_processor(drawn_image()).pixel_values))
    assert (result - expected).abs().max() < 0.03
    pillow = LlavaImageProcessorPil.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(pillow(drawn_image(), return_tensors="pt").pixel_values, expected, rtol=0, atol=1e-5)
    cropped = process_images([drawn_image()], image_processor, None)
    assert (cropped - expected).abs().max() > 0.5


@pytest.mark.parametrize("aspect", ["square", "stretch"])
def test_aspect_ratios(aspect: str, tmp_path: Path) -> None:
    folder = edited(tmp_path, image_aspect_ratio=aspect)
    ours = load(folder)
    to_hf(folder, tmp_path / "hf")
    pixels = LlavaImageProcessorPil.from_pretrained(tmp_path / "hf")(drawn_image(), return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, process_images([drawn_image()], ours[2], ours[1].config), rtol=0, atol=1e-5)
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert_same_checkpoint(ours, load(tmp_path / "back"))


def edited(folder: Path, **settings: Any) -> Path:
    """A copy of the golden checkpoint with other settings, its tower beside it."""
    target = folder / "edited"
    shutil.copytree(BASE, target)
    config = json.loads((target / "config.json").read_text()) | {"mm_vision_tower": str(CLIP)} | settings
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(("layer", "feature"), [(-1, "patch"), (-3, "cls_patch"), (1, "patch"), (3, "cls_patch")])
def test_layers_and_features(layer: int, feature: str, tmp_path: Path) -> None:
    folder = edited(tmp_path, mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    assert_same_logits(load(folder), converted(folder, tmp_path / "hf"))
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert_same_checkpoint(load(folder), load(tmp_path / "back"))


def trained(output: Path, **options: Any) -> Path:
    """A checkpoint after one update."""
    settings = {"max_steps": 1, "save_strategy": "no", "learning_rate": 1e-2}
    train(command_line(output, **(settings | options)))
    return output


@pytest.mark.parametrize("kind", ["qwen2", "qwen2, tied", "qwen3, window", "mistral"])
def test_backbones(kind: str, tmp_path: Path) -> None:
    base = backbones.save_base(kind, tmp_path / "base")
    folder = trained(tmp_path / "run", model_name_or_path=base, learning_rate=1e-3)
    ours = load(folder)
    hf, processor = converted(folder, tmp_path / "hf", conv_mode="chatml_direct")
    assert hf.config.text_config.model_type == kind.partition(",")[0]
    assert_same_logits(ours, (hf, processor), atol=1e-4)
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert_same_checkpoint(ours, load(tmp_path / "back"))


def test_siglip_tower(tmp_path: Path) -> None:
    tower = towers.siglip(tmp_path / "siglip")
    folder = trained(tmp_path / "run", model_name_or_path=VICUNA, vision_tower=tower, unfreeze_mm_vision_tower=True)
    hf, processor = converted(folder, tmp_path / "hf")
    assert (hf.config.vision_feature_select_strategy, processor.num_additional_image_tokens) == ("full", 0)
    assert_same_logits(load(folder), (hf, processor))
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert_same_checkpoint(load(folder), load(tmp_path / "back"))


def test_lora_is_merged(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", model_name_or_path=VICUNA, lora_enable=True, lora_r=4)
    theirs = converted(folder, tmp_path / "hf")
    assert_same_logits(load(folder), theirs)
    golden = converted(LLAVA / "tiny-llava-lora", tmp_path / "golden", model_base=str(VICUNA))
    assert_same_logits(load(LLAVA / "tiny-llava-lora", VICUNA), golden)


def test_image_border_tokens(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", model_name_or_path=VICUNA, mm_use_im_start_end=True)
    ours = load(folder)
    hf, processor = converted(folder, tmp_path / "hf")
    assert hf.config.image_token_index == 898
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    assert "<im_start><image><im_end>" in prompt
    ids = tokenizer_image_token(prompt, ours[0])
    expanded = expand(ids, 898, 4)
    assert processor(text=prompt, images=[drawn_image()]).input_ids == expanded.tolist()
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert_same_checkpoint(ours, load(tmp_path / "back"))


def test_dtype(tmp_path: Path) -> None:
    half = tmp_path / "half"
    _, model, _ = load(BASE)
    model.to(torch.bfloat16).save_pretrained(half)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(BASE / name, half / name)
    config = json.loads((half / "config.json").read_text()) | {"mm_vision_tower": str(CLIP)}
    (half / "config.json").write_text(json.dumps(config))
    hf = LlavaForConditionalGeneration.from_pretrained(to_hf(half, tmp_path / "hf"), dtype="auto")
    assert {weight.dtype for weight in hf.parameters()} == {torch.bfloat16}
    whole = to_hf(half, tmp_path / "whole", dtype="float32")
    assert LlavaForConditionalGeneration.from_pretrained(whole, dtype="auto").dtype == torch.float32


def test_generation(tmp_path: Path) -> None:
    """A batch of two prompts of different length, padded on the left, images through the processor."""
    tokenizer, model, image_processor = load(BASE)
    hf, processor = converted(BASE, tmp_path / "hf")
    prompts = [PROMPT, PROMPT.replace("What is shown?", "What is shown here, and what beside it?")]
    images = [drawn_image(3), drawn_image(4)]
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    inputs["pixel_values"] = process_images(images, image_processor, model.config)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    result = hf.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        ids = torch.tensor([tokenizer_image_token(prompt, tokenizer)])
        pixels = process_images([image], image_processor, model.config)
        assert torch.equal(model.generate(ids, images=pixels, **options)[0], result[row])
    assert hf.generation_config.suppress_tokens == [896]


@pytest.mark.parametrize("variant", [{}, {"legacy": True}, {"add_bos": False}, {"im_tokens": True}], ids=str)
def test_ids(variant: dict[str, bool], tmp_path: Path) -> None:
    """Those of the original, which tokenizes what stands behind an image as a text of its own."""
    tokenizer = make_tokenizer(**variant)
    fast = hf_tokenizer(tokenizer, tmp_path)
    fast.save_pretrained(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    image_token = fast.convert_tokens_to_ids("<image>")
    assert image_token == len(tokenizer)
    golden = [case["text"] for case in load_case("llava", "tokenizer")[0]["cases"]]
    for text in TEXTS + sorted(set(golden)):
        if not variant.get("legacy") and text.startswith((" ", "\u2581")):
            continue  # two blanks in front of a prompt: the fast tokenizer has one
        assert fast(text).input_ids == tokenizer_image_token(text, tokenizer, image_token), text


def test_foreign_folder(tmp_path: Path) -> None:
    """A folder that somebody else's converter wrote: no record, `<pad>` behind `<image>`, spare rows, no padding."""
    ours = load(BASE)
    to_hf(BASE, tmp_path / "hf")
    folder = tmp_path / "hf"
    config = json.loads((folder / "config.json").read_text())
    config.pop(SETTINGS_KEY)
    config["text_config"]["vocab_size"] = 910
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if len(value) == 897:
            tensors[name] = torch.cat([value, torch.randn(13, value.shape[1])])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    processor.tokenizer.save_pretrained(folder)
    from_hf(folder, tmp_path / "back")
    back = load(tmp_path / "back")
    for name, value in ours[1].state_dict().items():
        assert torch.equal(value, back[1].state_dict()[name]), name
    assert back[1].config.image_aspect_ratio == "pad"
    from_hf(folder, tmp_path / "square", image_aspect_ratio="square")
    assert load(tmp_path / "square")[1].config.image_aspect_ratio == "square"


def test_shards_of_transformers_format(tmp_path: Path) -> None:
    hf, processor = converted(BASE, tmp_path / "hf")
    hf.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    processor.save_pretrained(tmp_path / "shards")
    shutil.copyfile(tmp_path / "hf" / "tokenizer.model", tmp_path / "shards" / "tokenizer.model")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    from_hf(tmp_path / "shards", tmp_path / "back")
    assert_same_checkpoint(load(BASE), load(tmp_path / "back"))


def test_hydralora_is_refused(tmp_path: Path) -> None:
    reason = "extension.* \\['hydralora'\\].*depends on the token"
    folder = trained(tmp_path / "run", use_lora=True, lora_rank=4, lora_alpha=8)
    with pytest.raises(FlagError, match=reason):
        to_hf(folder, tmp_path / "hf")
    original = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle"
    copy = tmp_path / "original"
    shutil.copytree(original, copy)
    config = json.loads((copy / "config.json").read_text()) | {"mm_vision_tower": str(CLIP)}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlagError, match=reason):
        to_hf(copy, tmp_path / "hf", model_base=str(BASE))
    assert not list(tmp_path.glob("hf*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56]]},
            "anyres with mm_patch_merge_type flat: .*LLaVA-NeXT",
        ),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type spatial"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=message):
        to_hf(edited(tmp_path, **settings), tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))


def test_refused_parts(tmp_path: Path) -> None:
    _, model, _ = load(BASE)
    model.config.mm_projector_type = "linear"
    with pytest.raises(FlagError, match="mlp2x_gelu alone"):
        check_convertible(model)
    tower = OpenClipVisionTower(str(towers.open_clip(tmp_path / "tower")), -2)
    model.get_model().vision_tower = tower
    with pytest.raises(FlagError, match="tower of open_clip"):
        check_convertible(model)
    with pytest.raises(FlagError, match="no vision tower"):
        to_hf(VICUNA, tmp_path / "hf")
    with pytest.raises(FlagError, match="no such template"):
        to_hf(BASE, tmp_path / "hf", conv_mode="nobody")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        to_hf(BASE, tmp_path / "there")
    with pytest.raises(CheckpointError, match="expected transformers' llava or llava_next"):
        from_hf(LLAVA / "tiny-vicuna", tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        from_hf(tmp_path / "there", tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projector_hidden_act": "relu"}, "no mlp2x_gelu"),
        ({"vision_feature_layer": [-2, -1]}, "several layers"),
    ],
)
def test_foreign_parts_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = to_hf(BASE, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        from_hf(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    folder = to_hf(BASE, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("multi_modal_projector.linear_2.bias")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the weights .*linear_2\.bias"):
        from_hf(folder, tmp_path / "back")
