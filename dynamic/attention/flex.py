"""Policy attention by torch's FlexAttention: the policy is a term of the scores, the kernels are torch's own.

A key that counts p times is a key whose score is larger by log(p). With p = 0 that is log(1e-20) instead of minus
infinity: the weight of a dropped key is 0 up to rounding, and its derivative, 1e20 * 1e-20 * exp(s - log_sum), is that
of the formula. To cut p off from below would be simpler, but then the gradient of a dropped token would be 0.

torch has a backward pass of it on GPUs only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SMALLEST_WEIGHT = 1e-20
"""Added to the policy; its inverse is inside float32."""

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def log_policy(policy: Tensor) -> Tensor:
    """log(p + 1e-20) of a policy (B, L), in float32."""
    return (policy.float() + SMALLEST_WEIGHT).log()


def score_mod(log_weights: Tensor, key_mask: Tensor | None) -> ScoreMod:
    """What becomes of the score of query i and key j, as FlexAttention calls it.

    Args:
        log_weights: (B, L) of `log_policy`; gradients flow to it.
        key_mask: (B, L) bool, False at keys that nobody sees; or None.
    """

    def counted(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        weighted = torch.where(query == key, score, score + log_weights[batch, key])
        return weighted if key_mask is None else torch.where(key_mask[batch, key], weighted, -torch.inf)

    return counted


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None,
    scale: float,
    function: Callable[..., Any] | None = None,
) -> Tensor:
    """Policy attention; arguments as of `policy_attention`.

    Args:
        q: (B, H, L, C).
        k: (B, K, L, C).
        v: (B, K, L, C).
        policy: (B, L).
        causal: query i sees no key after i.
        key_mask: (B, L) bool, or None.
        scale: factor on q k^T.
        function: `flex_attention`, compiled unless another one is given.

    Returns:
        (B, H, L, C); zero in rows that see no key.
    """
    output = (function or _compiled())(
        q,
        k,
        v,
        score_mod=score_mod(log_policy(policy), key_mask),
        # Only what is the same for all samples and layers: such a mask is made once.
        block_mask=_causal(q.shape[2], q.device) if causal else None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(output, Tensor)  # noqa: S101  it may return more if asked for more
    return output


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Not compiled it would build the whole matrix of scores."""
    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=16)
def _causal(length: int, device: torch.device) -> BlockMask:
    def not_after(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    # It is kept for later passes, in training too, which could not save tensors of inference mode.
    with torch.inference_mode(False):
        return create_block_mask(not_after, None, None, length, length, device=str(device))
