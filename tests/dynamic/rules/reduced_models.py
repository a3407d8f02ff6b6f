"""A tiny LLaVA, prompts of every kind for it, and what a plan of rules computes, the long way.

The long way: the dense decoder runs over whole sequences, and from each layer on an explicit mask hides what the plan
has dropped there. It shares nothing with the code that drops tokens but the features that rules have merged.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dynamic.inspection import record_decisions
from dynamic.rules.handle import reduced
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.language_model.backbones import backbone_class, load_config
from tests.llava.model.towers import shaken
from tests.model.backbones import save_base

SIDE, PATCH = 24, 4
PATCHES = (SIDE // PATCH) ** 2
"""Of an image: 36."""

_folders = tempfile.TemporaryDirectory()


def clip(folder: Path) -> None:
    """A CLIP tower with its processor."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    shaken(CLIPVisionModel(CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, **sizes))).save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(folder)


def siglip(folder: Path) -> None:
    """A SigLIP tower, which has no class token, with its processor."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    shaken(SiglipVisionModel(SiglipVisionConfig(image_size=SIDE, patch_size=PATCH, **sizes))).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


@functools.cache
def tiny_llava(kind: str = "llama", tower: str = "clip", merge: str = "flat") -> Any:
    """A LLaVA of random weights on the CPU, of any backbone and tower."""
    folder = Path(_folders.name) / f"{kind}-{tower}-{merge}"
    save_base(kind, folder / "base")
    {"clip": clip, "siglip": siglip}[tower](folder / "tower")
    model: Any = backbone_class(folder / "base").from_pretrained(folder / "base", config=load_config(folder / "base"))
    model.config.mm_hidden_size = None
    settings = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_patch_merge_type": merge}
    arguments = {"vision_tower": str(folder / "tower"), "mm_projector_type": "mlp2x_gelu", **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        del model.config.mm_hidden_size
        model.get_model().initialize_vision_modules(SimpleNamespace(**arguments, mm_image_normalization="tower"))
        shaken(model.get_model().mm_projector)
    return model.eval().requires_grad_(False)


class Prompt(NamedTuple):
    """Ids (T,) with image tokens, and images (N, 3, height, width); a row without an image has no images."""

    ids: Tensor
    images: Tensor


@functools.cache
def prompts() -> tuple[Prompt, ...]:
    """One image; two; none; one with a long question."""
    generator = torch.Generator().manual_seed(3)

    def prompt(*parts: int) -> Prompt:
        """Texts of these lengths with an image between two of them."""
        ids: list[int] = []
        for number, length in enumerate(parts):
            ids += [IMAGE_TOKEN_INDEX] * (number > 0)
            ids += torch.randint(10, 90, (length,), generator=generator).tolist()
        return Prompt(torch.tensor(ids), torch.randn(len(parts) - 1, 3, SIDE, SIDE, generator=generator))

    return prompt(4, 6), prompt(2, 3, 5), prompt(7), prompt(1, 14)


class Batch(NamedTuple):
    """Arguments of `generate`."""

    inputs: Tensor
    attention_mask: Tensor
    images: Tensor | None


def batch_of(rows: list[Prompt], side: str = "left", extra: int = 0) -> Batch:
    """Prompts padded on a side, with `extra` more padding than needed; rows without an image get a dummy."""
    length = max(len(row.ids) for row in rows) + extra
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(length - len(row.ids), None) if side == "left" else slice(0, len(row.ids))
        ids[number, place], mask[number, place] = row.ids, 1
    if all(len(row.images) == 0 for row in rows):
        return Batch(ids, mask, None)
    dummy = torch.zeros(1, 3, SIDE, SIDE)
    return Batch(ids, mask, torch.cat([row.images if len(row.images) else dummy for row in rows]))


def logits_of(
    batch: Batch, plan: str, keep: str | None = None, new: int = 4, model: Any = None, **options: Any
) -> Tensor:
    """(B, new, V) of greedy steps under a plan; `options` of `generate`."""
    model, positions = model or tiny_llava(), options.pop("positions", "original")
    output = model.generate(
        **batch._asdict(), extensions=reduced(model, plan, keep, positions), do_sample=False, max_new_tokens=new,
        min_new_tokens=new, output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.stack(output.logits, dim=1)


class Expected(NamedTuple):
    """What the long way gives: logits (1, V) of the last position, and image tokens by layer."""

    logits: Tensor
    kept: list[int]


@torch.no_grad()
def long_way(row: Prompt, plan: str, keep: str | None = None, model: Any = None) -> Expected:
    """The first step of a row alone under a plan, by the dense decoder and explicit masks."""
    model = model or tiny_llava()
    extensions = reduced(model, plan, keep)
    batch = batch_of([row])
    with record_decisions(model) as log:
        model.generate(**batch._asdict(), extensions=extensions, do_sample=False, max_new_tokens=1)
    spliced = model.build_inputs(batch.inputs, None, None, batch.images, extensions=extensions)
    decoder, hidden = model.get_decoder(), spliced.inputs_embeds  # (1, L, D)
    length = hidden.shape[1]
    positions = torch.arange(length)[None]
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    stages = {stage.layer: stage.decision.keep[0] for stage in (log.stages[0] if log.stages else [])}
    counts, images = [], torch.zeros(length, dtype=torch.bool)
    for start, end in spliced.segments[0].images:
        images[start:end] = True
    left = torch.ones(length, dtype=torch.bool)
    for index, layer in enumerate(decoder.layers):
        left = stages.get(index, left)
        counts.append(int((left & images).sum()))
        # A dropped position sees itself alone, so that no row of the mask is empty; nobody sees it.
        mask = (visible & left) | torch.eye(length, dtype=torch.bool)
        hidden = layer(
            hidden, attention_mask=mask[None, None], position_embeddings=rotary, position_ids=positions, use_cache=False
        )
    return Expected(model.lm_head(decoder.norm(hidden)[:, -1]), counts)
