"""Attention in which every key has a weight, the policy: how Dynamic-LLaVA trains with dropped tokens (section 3.3).

A dropped token stays in the sequence, but only itself still sees it. The original builds the (B, H, L, L) matrix in
float32 for that; here it is never built, and the result and all gradients are the same.

    from dynamic.attention import policy_attention
    y = policy_attention(q, k, v, policy, causal=True)
"""

from dynamic.attention.dispatch import IMPLEMENTATIONS, policy_attention
from dynamic.attention.reference import policy_softmax

__all__ = ["IMPLEMENTATIONS", "policy_attention", "policy_softmax"]
