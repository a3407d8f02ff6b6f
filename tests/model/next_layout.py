"""Tiny folders of exactly the layout of the published LLaVA-1.6 (NeXT) checkpoints, with random weights.

The tower was trained and is inside the full weights, under the names of transformers 4.36; `config.json` names the one
that it was trained from, which is written next to the folder with other weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tests.golden import golden_dir

LLAVA = golden_dir("llava")
TOWER_NAME = "openai/clip-vit-large-patch14-336"
KINDS = ("vicuna", "mistral", "34b")
TEMPLATES = {"vicuna": "vicuna_v1", "mistral": "mistral_instruct", "34b": "chatml_direct"}
ADDED = ("<|im_start|>", "<|im_end|>")
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
WORDS, WIDTH, VISION_WIDTH = 896, 40, 32

SETTINGS: dict[str, Any] = {
    "_name_or_path": "./checkpoints/vicuna-7b-v1-6",
    "architectures": ["LlavaLlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": PINPOINTS,
    "image_split_resolution": 224,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "max_position_embeddings": 4096,
    "mm_hidden_size": VISION_WIDTH,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": TOWER_NAME,
    "mm_vision_tower_lr": 2e-06,
    "model_type": "llava",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.2",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": True,
    "use_cache": True,
    "use_mm_proj": True,
    "vocab_size": WORDS,
}
"""`config.json` of llava-v1.6-vicuna-7b, sizes apart."""

CHANGES: dict[str, dict[str, Any]] = {
    "vicuna": {},
    "mistral": {
        "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
        "architectures": ["LlavaMistralForCausalLM"],
        "model_type": "llava_mistral",
        "num_key_value_heads": 2,
        "intermediate_size": 112,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "34b": {
        "_name_or_path": "./checkpoints/Nous-Hermes-2-Yi-34B",
        "num_key_value_heads": 2,
        "rope_theta": 5000000.0,
        "vocab_size": WORDS + len(ADDED),
        "eos_token_id": WORDS + 1,
    },
}


def _spread(model: nn.Module, scale: float = 0.15) -> dict[str, Tensor]:
    """Its weights, large enough for each to matter, in bfloat16."""
    return {
        name: (weight + scale * torch.randn_like(weight)).to(torch.bfloat16)
        for name, weight in model.named_parameters()
    }


def write_tower(folder: Path) -> Path:
    """The tower that the checkpoints name, next to `folder`."""
    path = folder.parent / TOWER_NAME
    if not path.exists():
        shutil.copytree(LLAVA / "tiny-clip", path)
    return path


def tower_weights(position_ids: bool = False) -> dict[str, Tensor]:
    """A trained tower under the names of transformers 4.36's `CLIPVisionModel`."""
    model = CLIPVisionModel(CLIPVisionConfig.from_pretrained(LLAVA / "tiny-clip"))
    tensors = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in _spread(model).items()}
    if position_ids:
        tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    return tensors


def weights_of_kind(kind: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a checkpoint by the names in its files."""
    config_class, model_class = (
        (MistralConfig, MistralForCausalLM) if kind == "mistral" else (LlamaConfig, LlamaForCausalLM)
    )
    known = config_class().to_dict()
    model = model_class(config_class(**{key: value for key, value in settings.items() if key in known}))
    projector = nn.Sequential(nn.Linear(VISION_WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    tower = tower_weights(position_ids=kind == "vicuna")
    return {
        **_spread(model),
        **{f"model.mm_projector.{name}": tensor for name, tensor in _spread(projector, 0.3).items()},
        "model.image_newline": torch.randn(WIDTH).to(torch.bfloat16),
        **{f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()},
    }


def write_next(kind: str, folder: Path, **changes: Any) -> Path:
    """A checkpoint folder.

    Args:
        kind: one of `KINDS`.
        folder: to write; the tower that it names is written next to it.
        changes: of `config.json`; None takes a key away.
    """
    settings = SETTINGS | CHANGES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5 + KINDS.index(kind))
        tensors = weights_of_kind(kind, settings)
    folder.mkdir(parents=True)
    save_torch_state_dict(tensors, folder, max_shard_size="100KB", metadata={"format": "pt"})
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    settings = {key: value for key, value in (settings | changes).items() if not (key in changes and value is None)}
    (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": settings["eos_token_id"], "pad_token_id": 0})
    )
    write_tokenizer(kind, folder)
    write_tower(folder)
    return folder


def write_tokenizer(kind: str, folder: Path) -> None:
    """The SentencePiece tokenizer of the base; that of 34b has ChatML's marks behind the base's ids."""
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(LLAVA / "tiny-vicuna" / name, folder / name)
    content = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 4096}
    if kind == "34b":
        plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        for index, token in enumerate(ADDED, start=WORDS):
            content["added_tokens_decoder"][str(index)] = {"content": token} | plain
        content |= {"eos_token": ADDED[1], "add_bos_token": True}
        special = json.loads((folder / "special_tokens_map.json").read_text()) | {"eos_token": ADDED[1]}
        (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
        added = {token: index for index, token in enumerate(ADDED, start=WORDS)}
        (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
