"""Towers of every kind: features, pixels, names, what is refused, and training them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipModel

from llava.data.pixels import preprocess_image
from llava.errors import CheckpointError, FlagError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import bare_model
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_encoder.builder import build_vision_tower, set_normalization
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.open_clip_encoder import OpenClipVisionTower
from llava.model.multimodal_encoder.siglip_encoder import SiglipVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.train.checks import check_arguments
from llava.train.optimizer import optimizer_groups
from llava.train.train import build_run, main, parse_args
from tests.golden import golden_dir
from tests.llava.model import towers
from tests.llava.train.test_training import LLAVA, command_line

CLIP = golden_dir("llava") / "tiny-clip"
PIXELS = torch.randn(2, 3, towers.IMAGE, towers.IMAGE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tower of each kind."""
    folder = tmp_path_factory.mktemp("towers")
    return {
        "clip": CLIP,
        "siglip": towers.siglip(folder / "siglip"),
        "open_clip": towers.open_clip(folder / "open_clip"),
    }


def build(name: str | Path, layer: int = -2, feature: str = "patch", load: bool = True) -> VisionTower:
    config = SimpleNamespace(mm_vision_tower=str(name), mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    tower = build_vision_tower(config)
    if load:
        tower.load_model()
    return tower


def test_kinds_follow_from_the_files(folders: dict[str, Path]) -> None:
    kinds = {"clip": CLIPVisionTower, "siglip": SiglipVisionTower, "open_clip": OpenClipVisionTower}
    for name, folder in folders.items():
        tower = build(folder)
        assert type(tower) is kinds[name]
        assert (tower.hidden_size, tower.image_size, tower.num_patches) == (32, 28, 4)
        assert not any(weight.requires_grad for weight in tower.parameters())
        assert not tower.train().training, "a frozen tower stays in evaluation mode"


@pytest.mark.parametrize("layer", [-1, -2, 0, 1])
def test_siglip_features(layer: int, folders: dict[str, Path]) -> None:
    tower = build(folders["siglip"], layer)
    with torch.no_grad():
        expected = tower.loaded()(PIXELS, output_hidden_states=True).hidden_states[layer]
    features = tower(PIXELS)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert features.shape == (2, tower.num_features, 32) == (2, 4, 32)
    used = {name for name, _ in tower.used_parameters()}
    assert any("layers.2" in name for name in used) == (layer == -1)
    assert not any("head" in name or "post" in name for name in used)


def test_siglip_without_its_pooling_head(tmp_path: Path) -> None:
    """Neither the head nor a text model matters; a missing block does."""
    towers.siglip(tmp_path)
    expected = build(tmp_path)(PIXELS)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    headless = {name: value for name, value in tensors.items() if "head." not in name}
    assert len(headless) < len(tensors)
    save_file(headless, path, {"format": "pt"})
    torch.testing.assert_close(build(tmp_path)(PIXELS), expected, rtol=0, atol=0)
    damaged = {name: value for name, value in headless.items() if "layers.1." not in name}
    save_file(damaged, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"16 weights of the vision tower .*are missing"):
        build(tmp_path)


def test_full_siglip_model(tmp_path: Path, folders: dict[str, Path]) -> None:
    vision = build(folders["siglip"])
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision.config.to_dict()))
    model.vision_model.load_state_dict(vision.loaded().state_dict())
    model.save_pretrained(tmp_path)
    vision.image_processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "siglip"
    torch.testing.assert_close(build(tmp_path)(PIXELS), vision(PIXELS), rtol=0, atol=0)


def test_class_token(folders: dict[str, Path]) -> None:
    with pytest.raises(FlagError, match=r"cls_patch: .* has no class token"):
        build(folders["siglip"], feature="cls_patch", load=False)
    for name in ("clip", "open_clip"):
        whole, patches = build(folders[name], feature="cls_patch"), build(folders[name])
        assert whole.num_features == patches.num_features + 1 == 5
        torch.testing.assert_close(whole(PIXELS)[:, 1:], patches(PIXELS), rtol=0, atol=0)
    with pytest.raises(FlagError, match=r"hidden states 0\.\.3"):
        build(folders["open_clip"], layer=4, load=False)


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_open_clip_features_are_those_of_transformers_clip(layer: int, folders: dict[str, Path]) -> None:
    tower = build(folders["open_clip"], layer, "cls_patch")
    with torch.no_grad():
        for act, equal in (("quick_gelu", True), ("gelu", layer == 0)):
            clip = towers.as_transformers_clip(tower.loaded(), act)
            expected = clip(PIXELS, output_hidden_states=True).hidden_states[layer]
            difference = (tower(PIXELS) - expected).abs().max()
            assert (difference < 1e-5) == equal, difference
    assert not any("ln_post" in name or name == "proj" for name, _ in tower.used_parameters())


@pytest.mark.parametrize("name", ["clip", "open_clip"])
def test_class_tokens_of_several_blocks(name: str, folders: dict[str, Path]) -> None:
    tower = build(folders[name], -1, "cls_every_1")
    expected = [build(folders[name], layer, "cls_patch")(PIXELS)[:, 0] for layer in (1, 2, 3)]
    assert tower.num_features == 3
    torch.testing.assert_close(tower(PIXELS), torch.stack(expected, dim=1), rtol=0, atol=1e-6)
    second = build(folders[name], -1, "cls_every_2")
    assert (second.num_features, second.num_blocks) == (1, 2)
    torch.testing.assert_close(second(PIXELS)[:, 0], expected[1], rtol=0, atol=1e-6)
    with pytest.raises(FlagError, match="cls_every_4: up to --mm_vision_select_layer -1 only 3 blocks"):
        build(folders[name], -1, "cls_every_4", load=False)
    with pytest.raises(FlagError, match="'cls_every_0'; known values"):
        build(folders[name], -1, "cls_every_0", load=False)
    with pytest.raises(FlagError, match="has no class token"):
        build(folders["siglip"], -1, "cls_every_1", load=False)


def test_normalization_of_pixels(folders: dict[str, Path]) -> None:
    processor = build(folders["clip"]).image_processor
    own = preprocess_image(image(), processor, "square")
    set_normalization(processor, "tower")
    assert torch.equal(preprocess_image(image(), processor, "square"), own)
    pixels = own * torch.tensor(processor.image_std)[:, None, None] + torch.tensor(processor.image_mean)[:, None, None]
    set_normalization(processor, "imagenet")
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    torch.testing.assert_close(preprocess_image(image(), processor, "square"), (pixels - mean) / deviation)
    with pytest.raises(FlagError, match="'mean'; known values"):
        set_normalization(processor, "mean")


def test_bottleneck_projector() -> None:
    config = SimpleNamespace(mm_projector_type="bottleneck8_silu", mm_hidden_size=32, hidden_size=40)
    projector = build_vision_projector(config)
    assert {name: tuple(weight.shape) for name, weight in projector.state_dict().items()} == {
        "0.weight": (8, 32), "0.bias": (8,), "2.weight": (40, 8), "2.bias": (40,),
    }  # fmt: skip
    x = torch.randn(2, 3, 32)
    expected = torch.nn.functional.silu(x @ projector[0].weight.T) @ projector[2].weight.T
    torch.testing.assert_close(projector(x), expected)


def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (44, 66, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_open_clip_pixels(mode: str, folders: dict[str, Path], tmp_path: Path) -> None:
    import open_clip

    settings = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": mode}
    folder = towers.open_clip(tmp_path / "tower")
    config = folder / "open_clip_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"preprocess_cfg": settings}))
    tower = build(folder)
    transform = open_clip.image_transform(
        28, is_train=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), resize_mode=mode, interpolation="bicubic"
    )
    ours = preprocess_image(image(), tower.image_processor, "square")
    torch.testing.assert_close(ours, transform(image()), rtol=0, atol=1e-5)
    tower.save(tmp_path / "saved")
    again = preprocess_image(image(), build(tmp_path / "saved").image_processor, "square")
    assert torch.equal(ours, again)


@pytest.mark.parametrize("aspect", ["square", "pad", "stretch", "anyres"])
def test_siglip_pixels(aspect: str, folders: dict[str, Path]) -> None:
    processor = build(folders["siglip"]).image_processor
    pixels = preprocess_image(image(), processor, aspect, [(56, 28)])
    assert pixels.shape == ((3, 3, 28, 28) if aspect == "anyres" else (3, 28, 28))
    assert pixels.abs().max() <= 1


@pytest.fixture
def architecture(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny architecture that open_clip knows by name."""
    from open_clip import factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "Tiny-B-14", towers.OPEN_CLIP_CONFIG)
    return "Tiny-B-14"


def test_open_clip_by_architecture_and_file(
    architecture: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build(folders["open_clip"])(PIXELS)
    weights = folders["open_clip"] / "open_clip_model.safetensors"
    torch.testing.assert_close(build(f"open_clip:{architecture}/{weights}")(PIXELS), expected, rtol=0, atol=0)
    # The file of a training run: more than tensors, and names of a distributed model.
    state = {f"module.{name}": value for name, value in load_file(weights).items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")
    monkeypatch.chdir(tmp_path)
    tower = build(f"open_clip:{architecture}/epoch_3.pt")
    torch.testing.assert_close(tower(PIXELS), expected, rtol=0, atol=0)
    near = build_vision_tower(
        SimpleNamespace(mm_vision_tower=f"open_clip:{architecture}/epoch_3.pt", mm_vision_select_layer=-2),
        [tmp_path / "checkpoint"],
    )
    assert near.vision_tower_name.endswith("/epoch_3.pt")


def test_open_clip_by_tag(architecture: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip
    from open_clip import pretrained

    weights = folders["open_clip"] / "open_clip_model.safetensors"
    tag = {"file": str(weights), "mean": (0.1, 0.2, 0.3), "quick_gelu": False}
    monkeypatch.setitem(pretrained._PRETRAINED, architecture, {"run_7": tag})
    tower = build(f"open_clip:{architecture}/run_7")
    assert list(tower.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert not torch.allclose(tower(PIXELS), build(folders["open_clip"])(PIXELS)), "the tag decides on quick_gelu"
    published = build("open_clip:ViT-L-14-336/openai", load=False)
    assert (published.shape.layers, published.hidden_size, published.num_patches) == (24, 1024, 576)
    assert open_clip.get_model_config(architecture)["quick_gelu"] is True, "open_clip's own table is left alone"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("open_clip:ViT-B-32", FlagError, "ARCH/PRETRAINED"),
        ("open_clip:ViT-Z/openai", FlagError, "no such architecture; similar: .*ViT"),
        ("open_clip:ViT-B-32/nobody", FlagError, "no such tag .*laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32//nowhere/x.pt", CheckpointError, "no such weights file"),
        ("open_clip:RN50/openai", FlagError, "no vision transformer"),
        ("open_clip:ViT-B-16-SigLIP/webli", FlagError, "no vision transformer"),
        ("nowhere", CheckpointError, "none of these folders"),
    ],
)
def test_names_that_lead_nowhere(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(name)


def test_files_that_are_no_tower(architecture: str, tmp_path: Path) -> None:
    torch.save({"a": pytest.raises}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match=r"code\.pt"):
        build(f"open_clip:{architecture}/{tmp_path}/code.pt")
    save_file({"text.weight": torch.zeros(1)}, tmp_path / "text.safetensors")
    with pytest.raises(CheckpointError, match="holds no image model"):
        build(f"open_clip:{architecture}/{tmp_path}/text.safetensors")
    save_file({"visual.conv1.weight": torch.zeros(1)}, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        build(f"open_clip:{architecture}/{tmp_path}/part.safetensors")
    with pytest.raises(CheckpointError, match="model_type 'llama'"):
        build(LLAVA / "tiny-vicuna")


RECIPES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_enable": True, "lora_r": 4},
    "hydralora": {"use_lora": True, "lora_rank": 4, "lora_alpha": 8},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
def test_trained_tower_is_in_the_checkpoint(kind: str, recipe: str, folders: dict[str, Path], tmp_path: Path) -> None:
    options = {
        "model_name_or_path": LLAVA / "tiny-vicuna",
        "vision_tower": folders[kind],
        "unfreeze_mm_vision_tower": True,
        "mm_vision_tower_lr": 3e-3,
        "gradient_checkpointing": recipe == "lora",
        **RECIPES[recipe],
    }
    run = build_run(parse_args(command_line(tmp_path / "run", **options)))
    tower = bare_model(run.model).get_vision_tower()
    rates = {group["name"]: group["lr"] for group in optimizer_groups(run.model, run.args)}
    assert rates["vision tower"] == rates["vision tower, undecayed"] == 3e-3
    assert rates["base"] == 1e-2
    trained = {name for name, weight in tower.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in tower.used_parameters()}
    before = {name: weight.detach().clone() for name, weight in tower.named_parameters()}
    run.trainer.train()
    moved = {name for name, weight in tower.named_parameters() if not torch.equal(weight, before[name])}
    # The bias of the keys moves no attention weight, so its gradient is rounding.
    assert {name for name in trained - moved if "k_proj.bias" not in name} == set()
    assert moved <= trained
    checkpoint = tmp_path / "run" / "checkpoint-3"
    base = None if recipe == "full" else str(LLAVA / "tiny-vicuna")
    moved_folder = tmp_path / "elsewhere"
    checkpoint.rename(moved_folder)
    _, loaded, processor, _ = load_pretrained_model(str(moved_folder), base, device="cpu")
    assert type(loaded.get_vision_tower()) is type(tower)
    assert list(processor.image_mean) == list(tower.image_processor.image_mean)
    for name, weight in loaded.get_vision_tower().named_parameters():
        assert torch.equal(weight, tower.get_parameter(name))
    ids = torch.tensor([[1, 350, -200, 400, 500, 13]])
    live = bare_model(run.model).eval()
    with torch.no_grad():
        expected = live(input_ids=ids, images=PIXELS[:1]).logits
    torch.testing.assert_close(loaded(input_ids=ids, images=PIXELS[:1]).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["siglip", "open_clip"])
def test_resuming_a_trained_tower(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"vision_tower": folders[kind], "model_name_or_path": LLAVA / "tiny-vicuna", "save_steps": 2}
    options |= {"unfreeze_mm_vision_tower": True, "max_steps": 4, "save_total_limit": 4}
    options |= {"lr_scheduler_type": "constant"}
    main(command_line(tmp_path / "whole", **options))
    main(command_line(tmp_path / "cut", **options | {"max_steps": 2}))
    main(command_line(tmp_path / "cut", **options))
    _, whole, _, _ = load_pretrained_model(str(tmp_path / "whole"), device="cpu")
    _, resumed, _, _ = load_pretrained_model(str(tmp_path / "cut"), device="cpu")
    difference = (whole.get_vision_tower()(PIXELS) - resumed.get_vision_tower()(PIXELS)).abs().max()
    assert difference == 0


def test_a_saved_tower_of_another_kind_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="no tower of the kind of"):
        build(folders["clip"]).load_weights(folders["open_clip"])
    with pytest.raises(CheckpointError, match=r"missing|shape"):
        build(folders["clip"]).load_weights(folders["siglip"])


def test_several_scales_are_refused() -> None:
    config = SimpleNamespace(mm_vision_tower=str(CLIP), mm_vision_select_layer=-2, s2=True)
    with pytest.raises(FlagError, match="several scales"):
        build_vision_tower(config)


def test_a_learning_rate_for_a_frozen_tower_is_refused(tmp_path: Path) -> None:
    args = parse_args(command_line(tmp_path))
    args.training.mm_vision_tower_lr = 1e-3
    with pytest.raises(FlagError, match="--unfreeze_mm_vision_tower"):
        check_arguments(args)
