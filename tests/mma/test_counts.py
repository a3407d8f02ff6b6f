"""How many parameters are trained, at the real sizes on the meta device, and which of them are decayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model.components import Component, components
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.train.freeze import freeze
from llava.train.optimizer import optimizer_groups
from llava.train.options import ModelArguments, RunArguments
from mma.config import MmaConfig
from mma.extension import MmaExtension
from mma.original import original_names
from tests.golden import load_case
from tests.mma.golden_model import golden_model

CASE, _ = load_case("lavin", "trainable_parameter_counts")
HEADS = {"7B": 32, "13B": 40}


def real_size(size: str, folder: Path) -> Any:
    """A LLaVA of LaVIN's sizes without memory: a LLaMA behind CLIP ViT-L/14 and the projector of six class tokens."""
    dim, layers = CASE["dims"][size]["dim"], CASE["dims"][size]["layers"]
    clip = CLIPVisionConfig(
        hidden_size=CASE["vision_width"], intermediate_size=4096, num_hidden_layers=CASE["vision_layers"],
        num_attention_heads=16, patch_size=14,
    )  # fmt: skip
    clip.save_pretrained(folder)
    config = LlavaConfig(
        hidden_size=dim, intermediate_size=dim * 43 // 16, num_hidden_layers=layers, num_attention_heads=HEADS[size],
        mm_vision_tower=str(folder), mm_hidden_size=CASE["vision_width"], mm_vision_select_layer=-1,
        mm_projector_type=f"bottleneck{CASE['hidden_proj']}_silu",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlavaLlamaForCausalLM(config)
        tower = CLIPVisionTower(str(folder), -1, "cls_every_4")
        tower.vision_tower = CLIPVisionModel(clip)
    model.get_model().vision_tower = tower
    return model


@pytest.mark.parametrize("name", CASE["counts"])
def test_trainable_parameters(name: str, tmp_path: Path) -> None:
    size, adapter_type, visual_type = name.split("/")
    model = real_size(size, tmp_path)
    config = MmaConfig(
        adapter_type=adapter_type, visual_adapter_type=visual_type, adapter_dim=CASE["hidden_dim"],
        adapter_groups=CASE["groups"],
    )  # fmt: skip
    model.extensions.attach(model, MmaExtension(), config.to_dict())
    expected = CASE["counts"][name]
    parts = components(model)
    total = {part: sum(weight.numel() for weight in named.values()) for part, named in parts.items()}
    assert total[Component.PROJECTOR] == expected["adapter_proj"]
    assert total[Component.PROJECTOR] + total[Component.EXTENSION] == expected["total"]
    assert all(weight.is_meta for named in parts.values() for weight in named.values())
    assert model.get_vision_tower().num_features == 6
    published = {"7B/attn/router": 3_781_296, "13B/attn/router": 5_390_080}
    assert published.get(name, expected["total"]) == expected["total"]


def test_what_is_frozen_and_what_is_decayed(tmp_path: Path) -> None:
    """By the run's own freezing and groups: the trained set and the decayed one are the original's."""
    case, _ = load_case("lavin", "checkpoint_layout")
    model, _, _ = golden_model("train_attn_mixed", tmp_path)
    model_args = ModelArguments(freeze_backbone=True)
    training = Training()
    args = RunArguments(model_args, None, training, {"mma": None}, {"mma": {}})
    freeze(model, args)
    names = original_names(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {names[name] for name in trained} == {
        key for key, _, _ in case["checkpoints"]["single_process"]["model_keys"]
    }
    identity = {id(weight): names.get(name) for name, weight in model.named_parameters()}
    groups = {group["weight_decay"]: group for group in optimizer_groups(model, args) if group["params"]}
    for expected in case["weight_decay_groups"]:
        ours = {identity[id(weight)] for weight in groups[expected["weight_decay"]]["params"]}
        assert ours == set(expected["names"])


class Training:
    """What freezing and parameter groups ask of a run."""

    has_adapter = freeze_mm_mlp_adapter = False
    mm_projector_lr = mm_vision_tower_lr = None
    learning_rate = 1e-3
    weight_decay = 0.02
