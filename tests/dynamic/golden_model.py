"""The tiny model of the golden cases, built from `weights_a.safetensors`, with our predictors attached."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from dynamic.config import SparseConfig
from dynamic.extension import DynamicExtension
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.segments import MultimodalInputs, Segments, Span
from tests.golden import golden_dir

TOWER = "model.vision_tower.vision_tower.vision_model."


def arch() -> dict[str, Any]:
    """Configuration of the tiny model."""
    content = json.loads((golden_dir("dynamic") / "weights_a.json").read_text(encoding="utf-8"))
    return content["arch"]


def golden_weights() -> dict[str, Tensor]:
    """Its tensors by the original's state-dict keys."""
    return {k.removeprefix("w/"): v for k, v in load_file(golden_dir("dynamic") / "weights_a.safetensors").items()}


def write_tower(folder: Path) -> Path:
    """Write the vision tower with an image processor as a CLIP folder."""
    settings = arch()["vision"]
    tower = CLIPVisionModel(CLIPVisionConfig(**settings))
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in tower.state_dict()) else ""
    stored = {f"{prefix}{key.removeprefix(TOWER)}": v for key, v in golden_weights().items() if key.startswith(TOWER)}
    result = tower.load_state_dict(stored, strict=False)
    assert not result.missing_keys
    tower.save_pretrained(folder)
    size = settings["image_size"]
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder
    )
    return folder


def llava_config(tower: Path, **overrides: Any) -> LlavaConfig:
    """Configuration of the model around it; `overrides` are the case's `config_override`."""
    settings = arch()
    llama = dict(settings["llama"])
    return LlavaConfig(
        **llama | settings["mm"] | {"mm_vision_tower": str(tower), "use_mm_proj": True} | overrides,
        user_marker_ids=settings["special_text"]["USER:"],
    )


def golden_model(
    tower: Path, sparse_config: Mapping[str, Any], **overrides: Any
) -> tuple[LlavaLlamaForCausalLM, DynamicExtension]:
    """The model with all weights of the file, in evaluation mode, and the extension that is attached to it.

    Args:
        tower: what `write_tower` wrote.
        sparse_config: of the case; predictors that it switches off do not exist.
        overrides: of the LLaVA configuration.
    """
    model = LlavaLlamaForCausalLM(llava_config(tower, **overrides))
    model.get_model().load_vision_tower([tower])
    extension = DynamicExtension()
    model.extensions.attach(model, extension, SparseConfig.from_dict(sparse_config).to_dict())
    result = model.load_state_dict(golden_weights(), strict=False)
    assert not [key for key in result.missing_keys if not key.startswith("model.vision_tower.")]
    return model.to(torch.float32).eval(), extension


def segments_of(indices: Sequence[Mapping[str, list[int]]]) -> list[Segments]:
    """Segments from a case's `input_embeds_indices`."""
    return [
        Segments(
            system=Span(*row["system"]),
            images=(Span(*row["image"]),),
            instruct=Span(*row["instruct"]),
            last_instruct=Span(*row["last_instruct"]),
            answer=Span(*row["answer"]),
        )
        for row in indices
    ]


def inputs_of(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MultimodalInputs:
    """The spliced batch of a case that gives embeddings; they get a gradient."""
    mask = tensors.get("in/attention_mask")
    return MultimodalInputs(
        inputs_embeds=tensors["in/inputs_embeds"].clone().requires_grad_(),
        labels=tensors.get("in/labels"),
        attention_mask=None if mask is None else mask.bool(),
        position_ids=None,
        segments=segments_of(case["hp"]["input_embeds_indices"]),
    )
