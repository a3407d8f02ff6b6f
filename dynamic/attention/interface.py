"""Policy attention in the models of transformers, through `AttentionInterface` and `AttentionMaskInterface`.

A layer that is called with `policy=` computes policy attention; without, exactly transformers' "sdpa", whose masks are
used too. Such a mask is (B, 1, L, L) as soon as something is padded. Where a policy is passed on, the caller should put
the 2-D padding mask in its place (in llava: `state.causal_mask = state.attention_mask`): that keys come before queries
is known, and nothing quadratic is left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dynamic.attention.dispatch import policy_attention
from llava.errors import FlagError

NAME = "dynamic_policy"
"""What `attn_implementation` and `set_attn_implementation` call it."""


def register() -> str:
    """Make it known to transformers under `NAME`, which is returned. May be called again."""
    AttentionInterface.register(NAME, policy_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def policy_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    policy: Tensor | None = None,
    policy_eps: float = 0.0,
    policy_implementation: str = "auto",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of a decoder layer, called by transformers.

    Args:
        module: the attention layer.
        query: (B, H, L, C).
        key: (B, K, L, C); K divides H.
        value: (B, K, L, C).
        attention_mask: with a policy None or (B, L), both besides causality, or the whole (B, 1, L, L); without one
            what "sdpa" takes.
        dropout: must be 0 with a policy.
        scaling: factor on the scores.
        policy: (B, L) weight of each key, see `policy_attention`; None for ordinary attention.
        policy_eps: `eps` of `policy_attention`.
        policy_implementation: `implementation` of `policy_attention`.
        kwargs: other arguments of the layer; they go to "sdpa".

    Returns:
        (B, L, H, C), and None in place of the probabilities.

    Raises:
        FlagError: dropout or a sliding window that policy attention cannot carry out, or a 2-D mask without a policy.
        ValueError: shapes or dtypes do not fit, as where there are more keys than queries.
    """
    two_dimensional = attention_mask is not None and attention_mask.ndim == 2
    if policy is None:
        if two_dimensional:
            raise FlagError(
                f"the attention '{NAME}' was given the 2-D mask {tuple(attention_mask.shape)} but no policy; keep the "
                "mask that was made for the layers where no policy is passed on"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise FlagError(f"policy attention has no dropout, and attention_dropout is {dropout}; set it to 0")
    whole = attention_mask is not None and not two_dimensional
    window, length = kwargs.get("sliding_window"), query.shape[2]
    if window is not None and length > window and not whole:
        raise FlagError(
            f"{length} tokens do not fit into the sliding window of {window}, and the mask that policy attention was "
            "given does not say so; keep the 4-D mask of the layers"
        )
    if torch.is_autocast_enabled(query.device.type):
        # What autocast does with the arguments of torch's own attention.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    output = policy_attention(
        query,
        key,
        value,
        policy,
        causal=not whole,
        key_mask=attention_mask if two_dimensional else None,
        mask=attention_mask if whole else None,
        scale=scaling,
        implementation=policy_implementation,
        eps=policy_eps,
    )
    return output.transpose(1, 2).contiguous(), None
