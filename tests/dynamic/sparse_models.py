"""Tiny models with predictors whose decisions are mixed, and prompts of every kind."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynamic.cache import SparseCache
from dynamic.config import SparseConfig
from dynamic.extension import DynamicExtension
from dynamic.inspection import record_decisions
from dynamic.layer import TextPredictor, VisionPredictor
from llava.model.builder import load_pretrained_model
from llava.runtime.cache_name import cache_of
from llava.segments import Segments, Span
from tests.golden import golden_dir

BASE = golden_dir("llava") / "tiny-llava-v1.5"
SMALL = SparseConfig(vision_keep_rate=0.4, sparse_layer=1, d_model=16, nhead=2, dim_feedforward=32, num_layers=1)


def attach_predictors(model: Any, config: SparseConfig = SMALL, seed: int = 5) -> Any:
    """Attach predictors with large random weights: their decisions differ from token to token."""
    model.extensions.attach(model, DynamicExtension(), config.to_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, VisionPredictor | TextPredictor):
                for linear in (each for each in module.modules() if isinstance(each, nn.Linear)):
                    linear.weight.data = torch.randn_like(linear.weight) / linear.in_features**0.5
                module.output_mlp[-1].weight.data *= 3
    return model.eval().requires_grad_(False)


def sparse_llava(config: SparseConfig = SMALL, **options: Any) -> Any:
    """The tiny LLaVA checkpoint with predictors; `options` of `load_pretrained_model`."""
    return attach_predictors(load_pretrained_model(str(BASE), device="cpu", **options)[1], config)


class Embedded(NamedTuple):
    """Prompts as embeddings (B, L, D), with mask, positions and segments."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    segments: list[Segments]


class Shape(NamedTuple):
    """Lengths of one prompt: text in front, each image, text between two images, the last instruction."""

    system: int
    images: tuple[int, ...]
    instruct: int


SHAPES = (Shape(4, (10,), 6), Shape(2, (5, 13), 9), Shape(3, (), 4), Shape(5, (25,), 3))
"""One image, two of different size, none, and one in tiles; every row has another length."""


def embedded(shapes: tuple[Shape, ...] = SHAPES, side: str = "left", width: int = 40) -> Embedded:
    """A batch of `shapes`; a row has the same embeddings whatever stands beside it."""
    lengths = [shape.system + sum(shape.images) + shape.instruct for shape in shapes]
    longest = max(lengths)
    embeds, mask = torch.zeros(len(shapes), longest, width), torch.zeros(len(shapes), longest, dtype=torch.bool)
    segments = []
    for row, (shape, length) in enumerate(zip(shapes, lengths, strict=True)):
        start = longest - length if side == "left" else 0
        generator = torch.Generator().manual_seed(sum(shape.images) * 100 + length)
        embeds[row, start : start + length] = torch.randn(length, width, generator=generator)
        mask[row, start : start + length] = True
        place, images = start + shape.system, []
        for size in shape.images:
            images.append(Span(place, place + size))
            place += size
        end = start + length
        segments.append(
            Segments(
                Span(start, start + shape.system), tuple(images), Span(place, end), Span(place, end), Span(end, end)
            )
        )
    return Embedded(embeds, mask, (mask.cumsum(1) - 1).clamp(min=0), segments)


def prefill(model: Any, batch: Embedded, cache: SparseCache | None = None) -> Tensor:
    """Logits (B, K, V) of the kept positions."""
    with torch.no_grad():
        return model(**batch._asdict(), cache=cache, use_cache=cache is not None).logits


def new_cache(model: Any) -> SparseCache:
    cache = model.extensions.make_cache(model)
    assert isinstance(cache, SparseCache)
    return cache


class Generated(NamedTuple):
    """Greedy steps: logits (B, T, V), tokens (B, T), stored tokens (B, T - 1) if there is a cache, and the cache."""

    logits: Tensor
    tokens: Tensor
    stored: Tensor | None
    cache: SparseCache | None


def greedy(model: Any, ids: Tensor, images: Tensor | None, new: int = 6, **options: Any) -> Generated:
    """Generate `new` tokens, whatever they are."""
    fixed = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    pixels = None if images is None else images.to(model.dtype)
    with record_decisions(model) as log:
        out = model.generate(ids, images=pixels, output_logits=True, return_dict_in_generate=True, **fixed, **options)
    stored = log.stored() if log.new_tokens else None
    return Generated(torch.stack(out.logits, dim=1).float(), out.sequences, stored, cache_of(out))


class Dialogue:
    """Prompts and what follows them, on one cache."""

    def __init__(self, model: Any, batch: Embedded) -> None:
        self.model, self.cache, self.mask = model, new_cache(model), batch.attention_mask
        self.logits = prefill(model, batch, self.cache)[:, -1]  # (B, V) of the last token

    def follow(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, V) of the last of the new tokens (B, n); `mask` (B, n) is False at padding on their left."""
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        self.mask = torch.cat([self.mask, mask], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad(), record_decisions(self.model) as log:
            output = self.model(input_ids=ids, attention_mask=self.mask, position_ids=positions, cache=self.cache)
        self.stored = log.stored()
        self.logits = output.logits[:, -1]
        return self.logits
