"""What `benchmarks/mma.py` compares: one decoder of random weights, adapted in several ways, and its passes.

Training: with adapters routed as here; with the modality token in the sequence, as the original has it; with PEFT's
LoRA of as many trained parameters; unadapted. Inference: unadapted, with adapters, with merged adapters.

Shape letters: B batch, L sequence length, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks import sparse_models
from benchmarks.sparse_models import Prompt, Size
from llava.constants import IGNORE_INDEX
from llava.segments import Segments, Span
from mma.config import MmaConfig
from mma.decoder_layer import FIRST_POSITION, ROUTING
from mma.extension import MmaExtension
from mma.lavin.merging import merge
from mma.layer import RepAdapter
from mma.modality import start

LORA_TARGETS = ("q_proj", "v_proj")


def settings_of(kind: str) -> MmaConfig:
    """Adapters of the language model alone, without dropout."""
    return MmaConfig(adapter_type=kind, visual_adapter_type="none", adapter_dropout=0.0)


def build(size: Size, kind: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    """The decoder, with adapters of a kind whose up-projections are not zero, or without; the base is frozen."""
    model = sparse_models.build(size, None, device, dtype).requires_grad_(False)
    if kind is not None:
        model.extensions.attach(model, MmaExtension(), settings_of(kind).to_dict())
        with torch.no_grad():
            for adapter in (module for module in model.modules() if isinstance(module, RepAdapter)):
                for conv in (adapter.conv_B, adapter.conv_D):
                    conv.weight.normal_(std=0.1)
    return model


def build_merged(size: Size, kind: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The same with its adapters merged for images."""
    model = build(size, kind, device, dtype)
    merge(model, "image")
    return model


def trained_parameters(model: nn.Module) -> int:
    """Number of parameters with a gradient."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def with_lora(model: Any, size: Size, parameters: int) -> nn.Module:
    """PEFT's LoRA on queries and values, of the rank that comes nearest to a number of parameters."""
    rank = max(1, round(parameters / (len(LORA_TARGETS) * 2 * size.width * size.layers)))
    names = [f"model.layers.{index}.self_attn.{name}" for index in range(size.layers) for name in LORA_TARGETS]
    return get_peft_model(model, LoraConfig(r=rank, target_modules=names, lora_dropout=0.0))


def mixed_prompt(model: Any, size: Size, batch: int) -> Prompt:
    """Sequences of one length, every other one without an image."""
    prompt = sparse_models.make_prompt(model, size, batch)
    length = prompt.embeddings.shape[1]
    text = Segments(Span(0, 0), (), Span(0, length), Span(0, length), Span(length, length))
    return Prompt(prompt.embeddings, [text if row % 2 else each for row, each in enumerate(prompt.segments)])


class Step(nn.Module):
    """Loss of a batch of embeddings (B, L, D), whose second half is the answer."""

    def __init__(self, model: nn.Module, prompt: Prompt) -> None:
        super().__init__()
        self.model, self.segments = model, prompt.segments
        batch, length = prompt.embeddings.shape[:2]
        labels = sparse_models.random_ids(model, batch, length)  # (B, L)
        self.labels = labels.masked_fill(torch.arange(length, device=labels.device) < length // 2, IGNORE_INDEX)

    def forward(self, embeddings: Tensor) -> Tensor:
        """The loss, a scalar."""
        return self.model(inputs_embeds=embeddings, labels=self.labels, segments=self.segments).loss


class InSequence(Step):
    """The same with the modality token in front of the sequence, hidden from all others by a mask."""

    def forward(self, embeddings: Tensor) -> Tensor:
        """The loss, a scalar."""
        model: Any = self.model
        decoder, batch = model.get_decoder(), len(embeddings)
        rows = torch.tensor([int(sample.has_image) for sample in self.segments], device=embeddings.device)
        hidden = torch.cat([start(decoder, embeddings.dtype)[rows], embeddings], dim=1)  # (B, 1 + L, D)
        length = hidden.shape[1]
        positions = torch.arange(length, device=hidden.device)[None]
        visible = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        visible[1:, 0] = False
        rotary = decoder.rotary_emb(hidden, position_ids=positions)
        for layer in decoder.layers:
            hidden, _ = layer(
                hidden,
                attention_mask=visible.expand(batch, 1, -1, -1),
                position_ids=positions,
                position_embeddings=rotary,
                **{ROUTING: FIRST_POSITION},
            )
        logits = model.lm_head(decoder.norm(hidden))[:, 1:-1]  # (B, L - 1, V) of the embeddings' own positions
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), self.labels[:, 1:].flatten())
