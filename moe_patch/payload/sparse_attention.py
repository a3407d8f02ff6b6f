"""Attention of a layer that works on kept tokens, in the classes of transformers 4.37, which have no argument for it.

With a policy dropped tokens stay and count for nobody but themselves; without one they are gone, and the positions of
those that are left have gaps, for which the rotary table of these classes would be too short.

Shape letters: B batch, L sequence length, D width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from dynamic.attention.blockwise import blockwise
from dynamic.attention.function import PolicyAttention

ARGUMENT = "tokens_of_pass"
"""Keyword argument of a decoder layer, which hands it to its attention."""


@dataclass(frozen=True)
class TokensOfPass:
    """What the layers from the sparse one on need to know of a pass.

    Attributes:
        positions: no position is as high as this.
        policy: (B, L) float32, how much each key counts for the others; None where dropped tokens are gone.
        key_mask: (B, L) bool, False at padding, with a policy; or None.
    """

    positions: int
    policy: Tensor | None = None
    key_mask: Tensor | None = None


@functools.cache
def sparse_attention(plain: type[nn.Module]) -> type[nn.Module]:
    """The attention class `plain` that obeys `TokensOfPass`; of the same name, and without it equal to `plain`."""
    inner: Any = plain

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Any = None,
        *args: Any,
        tokens_of_pass: TokensOfPass | None = None,
        **kwargs: Any,
    ) -> Any:
        if tokens_of_pass is None:
            return inner.forward(self, hidden_states, attention_mask, position_ids, past_key_value, *args, **kwargs)
        mixed = _attend(self, hidden_states, attention_mask, position_ids, past_key_value, tokens_of_pass)
        return mixed, None, past_key_value

    own = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (plain,), {**own, "forward": forward})


def _attend(
    layer: Any, hidden: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Any, tokens: TokensOfPass
) -> Tensor:
    """Output (B, L, D) of an attention module for `hidden` (B, L, D); `mask` is additive, (B, 1, L, S + L)."""
    batch, length, width = hidden.shape
    q, k, v = (
        projection(hidden).view(batch, length, heads, layer.head_dim).transpose(1, 2)  # (B, heads, L, C)
        for projection, heads in (
            (layer.q_proj, layer.num_heads),
            (layer.k_proj, layer.num_key_value_heads),
            (layer.v_proj, layer.num_key_value_heads),
        )
    )
    cos, sin = layer.rotary_emb(v, seq_len=tokens.positions)
    q, k = apply_rotary_pos_emb(q, k, cos, sin, position_ids)
    if cache is not None:
        k, v = cache.update(k, v, layer.layer_idx)
    if tokens.policy is not None:
        visible = (True, tokens.key_mask, None)  # causal, keys without padding, no further mask
        mixed = PolicyAttention.apply(q, k, v, tokens.policy, visible, layer.head_dim**-0.5, 0.0, blockwise())
    else:
        groups = layer.num_key_value_groups
        k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        causal = mask is None and length > 1
        mixed = scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask, is_causal=causal)
    return layer.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))


def let_layers_be_sparse(layers: Any) -> None:
    """Change the attention of these decoder layers.

    Raises:
        ValueError: a layer has dropout in its attention, or something has wrapped it in the object itself.
    """
    for layer in layers:
        attention = layer.self_attn
        if attention.attention_dropout:
            raise ValueError(
                f"attention_dropout is {attention.attention_dropout}; policy attention has none, set it to 0"
            )
        check_unwrapped(attention)
        attention.__class__ = sparse_attention(type(attention))


def check_unwrapped(module: nn.Module) -> None:
    """Raise `ValueError` if a program keeps a `forward` in the object, under which another class would not be seen."""
    if "forward" in vars(module):
        raise ValueError(
            f"the {type(module).__name__} is wrapped already, as accelerate does where it spreads a model over several "
            "devices; --dynamic is carried for models on one device, so pass a device_map of one"
        )


def length_of(position_ids: Tensor) -> int:
    """One more than the highest position."""
    return int(torch.max(position_ids)) + 1
