"""Policy attention as the original writes it, with the whole (B, H, L, L) matrix: what the others are tested against.

Corresponds to `softmax_with_policy` and `scaled_dot_product_attention_with_policy` of Dynamic-LLaVA's
`dynamic_modeling_llama.py`, the places where it rounds to another dtype included. Differentiated by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamic.attention.problem import LARGEST_EXPONENT


def policy_softmax(scores: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax in which key j counts `policy[j]` times, except for its own query, which always sees it fully.

        M[i, j] = policy[j] + (1 - policy[j]) * [i == j]
        e = exp(scores - max_j scores) * M
        P = (e + eps / L) / (sum_j e + eps)

    With eps > 0 every position, dropped, masked or in the future, keeps a weight of eps / L, and where a dropped key
    has by far the largest score the row tends to the mean of all values. With eps = 0 the maximum is that of the keys
    that count, so that neither happens.

    Args:
        scores: (B, H, L, L), scaled, -inf where masked. The maximum is subtracted in this dtype; exponential, weights
            and sum are float32 (float64 for float64 scores).
        policy: (B, L), 1 for kept and 0 for dropped tokens, or anything between.
        eps: 1e-6 in the original.

    Returns:
        (B, H, L, L) in the dtype of `scores`; zero in rows that are masked completely.
    """
    L = scores.shape[-1]
    wide = torch.promote_types(scores.dtype, torch.float32)
    own = torch.eye(L, dtype=policy.dtype, device=policy.device)
    weights = (policy[:, None, :] + (1 - policy[:, None, :]) * own)[:, None].to(wide)  # (B, 1, L, L)
    if eps > 0:
        top = scores.max(dim=-1, keepdim=True).values  # its gradient matters: the result is not invariant in it
    else:
        top = scores.detach().masked_fill(weights == 0, -torch.inf).amax(dim=-1, keepdim=True)
    seen = top > -torch.inf
    above = (scores - top.masked_fill(~seen, 0)).to(wide)
    if eps == 0:
        above = above.clamp(max=LARGEST_EXPONENT)  # exceeds 0 at dropped keys only
    e = above.exp() * weights
    total = e.sum(dim=-1, keepdim=True) + eps
    return ((e + eps / L) / total.masked_fill(~seen, 1) * seen).to(scores.dtype)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None,
    mask: Tensor | None,
    scale: float,
    eps: float,
) -> Tensor:
    """Policy attention with explicit probabilities; arguments as of `policy_attention`."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, L, C)
    L = q.shape[2]
    scores = q @ k.transpose(-1, -2) * scale  # (B, H, L, L)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    elif mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    if causal:
        scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return policy_softmax(scores, policy, eps) @ v
