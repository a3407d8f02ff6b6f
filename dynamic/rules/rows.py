"""What rules see of the rows in front of a decoder layer: hidden states, and attention weights of few queries.

Attention is computed once more for the queries that a rule asks for, from the projections of the layer, so the model
keeps its attention kernels and no layer runs twice.

Shape letters: B batch, L positions of a row without padding, D width, H attention heads, K heads of keys, C head width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.segments import DecoderState, Segments


@dataclass(frozen=True)
class LayerInput:
    """What enters a decoder layer.

    Attributes:
        layer: the module.
        hidden: (B, L, D).
        rotary: cosine and sine, (B or 1, L, C) each.
        arguments: of the layer, further ones.
    """

    layer: nn.Module
    hidden: Tensor
    rotary: tuple[Tensor, Tensor]
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, layer: nn.Module, state: DecoderState) -> LayerInput:
        """As it is now; nothing is copied."""
        return cls(layer, state.hidden_states, state.position_embeddings, dict(state.layer_kwargs))

    @functools.cached_property
    def normed(self) -> Tensor:
        """(B, L, D): what the attention reads."""
        adapted: Any = getattr(self.layer, "attention_input", None)
        if adapted is not None:  # a layer whose norm is not all that stands in front of its attention
            return adapted(self.hidden, **self.arguments)
        return self.layer.input_layernorm(self.hidden)  # type: ignore[operator]

    def queries(self, row: int, places: Tensor, rotary: bool) -> Tensor:
        """(H, queries, C) at `places` of a row, padding counted."""
        return self._projected("q", row, places, rotary)

    def keys(self, row: int, places: Tensor, rotary: bool) -> Tensor:
        """(K, L, C) at `places` of a row, padding counted."""
        return self._projected("k", row, places, rotary)

    def _projected(self, kind: str, row: int, places: Tensor, rotary: bool) -> Tensor:
        """On the device of `places`, whichever the layer is on."""
        attention: Any = self.layer.self_attn
        normed = self.normed[row, places.to(self.normed.device)][None]  # (1, places, D)
        states = getattr(attention, f"{kind}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{kind}_norm", None)  # Qwen3
        states = (states if norm is None else norm(states)).transpose(1, 2)  # (1, H or K, places, C)
        if rotary:
            cos, sin = (
                part.expand(len(self.hidden), -1, -1)[row, places.to(part.device)][None].to(states.device)
                for part in self.rotary
            )
            states, _ = apply_rotary_pos_emb(states, states, cos, sin)
        return states[0].to(places.device)


@dataclass(frozen=True)
class Entered:
    """What entered layer 0, where rules in front of the decoder have left it.

    Attributes:
        hidden: (B, L, D).
        segments: of each row then.
    """

    hidden: Tensor
    segments: Sequence[Segments]

    def of(self, row: int) -> tuple[Tensor, Tensor]:
        """(images, D) and (text, D): image tokens of a row, and tokens of its last instruction."""
        mine = self.segments[row]
        parts = [self.hidden[row, start:end] for start, end in mine.images]
        start, end = mine.last_instruct
        return torch.cat(parts) if parts else self.hidden[row, :0], self.hidden[row, start:end]


@dataclass(frozen=True)
class Row:
    """One row; see `rule.RowView`.

    Attributes:
        number: of the row in the batch.
        layer: k.
        now: the input of layer k.
        before: that of layer k - 1.
        valid: (L,) int64 places of the row that are not padding.
        segments: of the row as it is now.
        norm: the last norm of the decoder.
        start: what entered layer 0.
    """

    number: int
    layer: int
    now: LayerInput
    before: LayerInput | None
    valid: Tensor
    segments: Segments
    norm: nn.Module
    start: Entered

    @functools.cached_property
    def hidden(self) -> Tensor:
        """(L, D)."""
        return self.now.hidden[self.number, self.valid]

    @functools.cached_property
    def image_places(self) -> Tensor:
        """(n,) int64."""
        return self._within(*self.segments.images)

    @functools.cached_property
    def text_places(self) -> Tensor:
        """(text,) int64; of a row that ends with an image, or says nothing behind it, its last position."""
        found = self._within(self.segments.last_instruct)
        return found if len(found) else torch.tensor([len(self.valid) - 1], device=self.valid.device)

    def _within(self, *spans: Any) -> Tensor:
        """Places in `valid` of the positions of spans."""
        first = int(self.valid[0])
        last = first + len(self.valid)
        parts = [torch.arange(max(start, first) - first, max(min(end, last), first) - first) for start, end in spans]
        return torch.cat(parts).to(self.valid.device) if parts else self.valid[:0]

    def _input(self, layer: int | None) -> LayerInput:
        wanted = self.layer - 1 if layer is None else layer
        if wanted == self.layer:
            return self.now
        if wanted != self.layer - 1 or self.before is None:
            raise ValueError(
                f"a rule before layer {self.layer} asks for layer {wanted}; it sees layers {self.layer - 1} and "
                f"{self.layer}, and before layer 0 that one alone"
            )
        return self.before

    def attention(self, queries: Tensor, *, layer: int | None = None, rotary: bool = True) -> Tensor:
        """(H, queries, L) float32."""
        given = self._input(layer)
        q = given.queries(self.number, self.valid[queries], rotary).float()  # (H, queries, C)
        k = given.keys(self.number, self.valid, rotary).float()  # (K, L, C)
        k = k.repeat_interleave(len(q) // len(k), dim=0)  # (H, L, C)
        attention: Any = given.layer.self_attn
        scores = q @ k.transpose(-1, -2) * attention.scaling  # (H, queries, L)
        hidden = torch.arange(len(self.valid), device=q.device) > queries[:, None].to(q.device)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)

    def keys(self, *, layer: int | None = None) -> Tensor:
        """(L, K C) float32."""
        found = self._input(layer).keys(self.number, self.valid, True).float()  # (K, L, C)
        return found.transpose(0, 1).flatten(1)

    def normed(self) -> Tensor:
        """(L, D)."""
        return self.norm(self.hidden).to(self.valid.device)

    def entered(self) -> tuple[Tensor, Tensor]:
        """(images, D) and (text, D); without a text behind the images the last position stands for it."""
        images, text = self.start.of(self.number)
        text = text if len(text) else self.start.hidden[self.number, -1:]
        return images.to(self.valid.device), text.to(self.valid.device)
