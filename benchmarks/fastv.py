"""FastV (Chen et al., ECCV 2024) by the rule of its paper, on the decoder of a dense LLaVA, to compare with.

After `layer` layers the image tokens are ranked by the attention that the last token of the prompt pays to them in the
layer before, averaged over the heads; those that rank lowest are left out of all later layers and of their caches.
Nothing is trained, and generated tokens are all kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.sparse_models import Prompt
from dynamic.config import kept_count
from llava.segments import Span


@dataclass
class FastVCache:
    """Keys and values of a prompt and what follows it.

    Attributes:
        cache: layers behind the pruning hold fewer tokens.
        length: tokens seen so far, those that were left out included: where the next token is.
    """

    cache: Any
    length: int


@dataclass(frozen=True)
class FastV:
    """The rule with its two numbers.

    Attributes:
        model: dense, a Llama.
        layer: K, layers that see all tokens; at least 1.
        keep: share of the image tokens that the later ones see.
    """

    model: Any
    layer: int = 2
    keep: float = 0.5

    @torch.no_grad()
    def prefill(self, prompt: Prompt) -> tuple[Tensor, FastVCache]:
        """Logits (B, 1, V) of the last position, and the cache.

        Args:
            prompt: all rows have the same image span.
        """
        decoder = self.model.get_decoder()
        hidden = prompt.embeddings
        length = hidden.shape[1]
        cache = DynamicCache(config=self.model.config)
        positions = torch.arange(length, device=hidden.device)[None]  # (1, L)
        scores = hidden.new_zeros(len(hidden), length)  # (B, L)
        for index, layer in enumerate(decoder.layers):
            if index == self.layer:
                kept = self._kept(scores, prompt.segments[0].images[0], length)  # (B, L')
                hidden = hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[-1]))
                positions = kept
            rotary = decoder.rotary_emb(hidden, position_ids=positions)
            before = hidden
            hidden = self._layer(layer, hidden, positions, rotary, cache)
            if index == self.layer - 1:
                scores = self._last_attention(layer, index, before, rotary, cache)
        return self.model.lm_head(decoder.norm(hidden[:, -1:])), FastVCache(cache, length)

    @torch.no_grad()
    def step(self, cache: FastVCache, ids: Tensor) -> Tensor:
        """Logits (B, 1, V) of the next token, given as ids (B, 1)."""
        decoder = self.model.get_decoder()
        hidden = decoder.embed_tokens(ids)
        positions = torch.full((1, 1), cache.length, device=ids.device)
        rotary = decoder.rotary_emb(hidden, position_ids=positions)
        for layer in decoder.layers:
            hidden = self._layer(layer, hidden, positions, rotary, cache.cache)
        cache.length += 1
        return self.model.lm_head(decoder.norm(hidden))

    def feed(self, cache: FastVCache, ids: Tensor) -> None:
        """Decode given tokens (B, T) one by one."""
        for column in ids.unbind(dim=1):
            self.step(cache, column[:, None])

    def _layer(self, layer: Any, hidden: Tensor, positions: Tensor, rotary: Any, cache: Any) -> Tensor:
        """One layer; all rows have as many tokens, so causal attention needs no mask."""
        name = self.model.get_decoder().layer_cache_name
        given = {"attention_mask": None, "position_embeddings": rotary, "position_ids": positions, "use_cache": True}
        output: Tensor = layer(hidden, **given, **{name: cache})
        return output

    def _last_attention(self, layer: Any, index: int, hidden: Tensor, rotary: Any, cache: Any) -> Tensor:
        """Attention (B, L) of the last token in a layer that has run on `hidden`, the mean of its heads."""
        attention = layer.self_attn
        last = layer.input_layernorm(hidden[:, -1:])  # (B, 1, D)
        query = attention.q_proj(last).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (B, H, 1, C)
        cos, sin = (part[:, -1:] for part in rotary)
        query, _ = apply_rotary_pos_emb(query, query, cos, sin)
        keys = cache.layers[index].keys.repeat_interleave(attention.num_key_value_groups, dim=1)  # (B, H, L, C)
        scores = query @ keys.transpose(2, 3) * attention.scaling  # (B, H, 1, L)
        return scores.float().softmax(dim=-1).mean(dim=1)[:, 0]

    def _kept(self, scores: Tensor, image: Span, length: int) -> Tensor:
        """Positions (B, L') that stay, in order: all text, and the image tokens that rank highest."""
        count = kept_count(image.end - image.start, self.keep)
        best = scores[:, image.start : image.end].topk(count, dim=1).indices + image.start  # (B, kept)
        text = [place for place in range(length) if not image.start <= place < image.end]
        rows = torch.tensor(text, device=scores.device).expand(len(scores), -1)
        return torch.cat([rows, best], dim=1).sort(dim=1).values
