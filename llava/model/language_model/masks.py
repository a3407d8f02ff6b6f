"""The attention masks of a pass, one for each kind of layer, as transformers makes them, or smaller.

Behind causal attention padding on the right needs no mask: every real token sees only what is in front of it. Torch's
attention keeps its fast kernels then, which a 4-D mask excludes, and nothing of size B times L times L is made.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionMaskInterface, Cache
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    eager_mask,
    is_tracing,
    sdpa_mask,
)

from llava.runtime.cache_name import cache_keyword

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
"""How the mask of a kind of layer is made, by transformers' name of the kind."""

_MASK_CACHE = {kind: cache_keyword(make_mask) for kind, make_mask in MASKS.items()}

_WHOLE_MATRIX = (sdpa_mask, eager_mask)
"""Kinds of masks that have an entry for each query and key, or are left out; others have forms of their own."""


def layer_kinds(config: Any) -> list[str]:
    """Kind of attention of each layer: by `layer_types` (Qwen), or the same for all by `sliding_window` (Mistral)."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    everywhere = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return [everywhere] * config.num_hidden_layers


def is_right_padded(attention_mask: Tensor) -> bool:
    """True if every row of a mask (B, L) begins with its tokens and ends with its padding. Waits for the device."""
    return bool((attention_mask[:, 1:].bool() <= attention_mask[:, :-1].bool()).all())


def layer_masks(
    config: Any,
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    cache: Cache | None,
    right_padded: bool | None = None,
) -> dict[str, Any]:
    """The masks by the kind of layer; what they hide from padding on the right is not said, as nobody reads it.

    Args:
        config: of the decoder.
        hidden: (B, L, D), what enters the first layer.
        attention_mask: (B, L_total), zero at padding, or None.
        position_ids: (B or 1, L).
        cache: keys and values of earlier positions, or None.
        right_padded: True: the mask is known to be padded on the right alone; None: look, which waits for the device
            like transformers' own search for padding.

    Returns:
        In the form that the attention implementation wants: None, (1, 1, L, L_total) for rows padded on the right where
        it wants a matrix, (B, 1, L, L_total) for others.
    """
    kinds = dict.fromkeys(layer_kinds(config))
    if _needs_no_padding_mask(config, hidden, attention_mask, cache, right_padded):
        # No positions: those of padding would be taken for the beginnings of packed sequences. One row serves all.
        hidden, attention_mask, position_ids = hidden[:1], None, None  # type: ignore[assignment]
    return {
        kind: MASKS[kind](
            config=config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{_MASK_CACHE[kind]: cache},
        )
        for kind in kinds
    }


def _needs_no_padding_mask(
    config: Any, hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None, right_padded: bool | None
) -> bool:
    """True if a 2-D mask says nothing that causality does not."""
    makes_matrix = AttentionMaskInterface().get(config._attn_implementation) in _WHOLE_MATRIX
    # A later pass hides what earlier ones have stored of padding.
    begins = cache is None or cache.get_seq_length() == 0
    if attention_mask is None or attention_mask.ndim != 2 or not (makes_matrix and begins):
        return False
    if attention_mask.shape[1] != hidden.shape[1] or not getattr(config, "is_causal", True):
        return False
    if right_padded is None and not is_tracing(attention_mask):
        right_padded = is_right_padded(attention_mask)
    return bool(right_padded)
