"""Tiny towers of every kind with random weights, in the layout of published ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

IMAGE, PATCH, WIDTH, LAYERS, HEADS = 28, 14, 32, 3, 4

OPEN_CLIP_CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": IMAGE,
        "patch_size": PATCH,
        "width": WIDTH,
        "layers": LAYERS,
        "head_width": WIDTH // HEADS,
        "mlp_ratio": 2.0,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


def shaken(model: nn.Module) -> nn.Module:
    """Random weights of a size at which every part of the network matters, norms and biases included."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def siglip(folder: Path, **changes: object) -> Path:
    """A SigLIP vision model with its processor."""
    config = SiglipVisionConfig(
        image_size=IMAGE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        **changes,
    )
    shaken(SiglipVisionModel(config)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": IMAGE, "width": IMAGE}).save_pretrained(folder)
    return folder


def open_clip(folder: Path) -> Path:
    """A full open_clip model, as `open_clip` puts it on a hub."""
    import open_clip as library

    model = shaken(library.CLIP(**OPEN_CLIP_CONFIG))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP_CONFIG, "preprocess_cfg": {}}))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def as_transformers_clip(visual: nn.Module, hidden_act: str) -> CLIPVisionModel:
    """The same weights in transformers' CLIP."""
    config = CLIPVisionConfig(
        image_size=IMAGE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        hidden_act=hidden_act,
    )
    clip = CLIPVisionModel(config)
    source = visual.state_dict()
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
    }
    tensors = {ours: source[theirs] for ours, theirs in names.items()}
    for kind in ("weight", "bias"):
        tensors[f"pre_layrnorm.{kind}"] = source[f"ln_pre.{kind}"]
        tensors[f"post_layernorm.{kind}"] = source[f"ln_post.{kind}"]
        for layer in range(LAYERS):
            block, target = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            joined = source[f"{block}.attn.in_proj_{kind}"].chunk(3)
            for part, value in zip("qkv", joined, strict=True):
                tensors[f"{target}.self_attn.{part}_proj.{kind}"] = value
            tensors[f"{target}.self_attn.out_proj.{kind}"] = source[f"{block}.attn.out_proj.{kind}"]
            for theirs, ours in {"ln_1": "layer_norm1", "ln_2": "layer_norm2"}.items():
                tensors[f"{target}.{ours}.{kind}"] = source[f"{block}.{theirs}.{kind}"]
            for theirs, ours in {"c_fc": "fc1", "c_proj": "fc2"}.items():
                tensors[f"{target}.mlp.{ours}.{kind}"] = source[f"{block}.mlp.{theirs}.{kind}"]
    clip.load_state_dict(tensors)
    return clip.eval()
