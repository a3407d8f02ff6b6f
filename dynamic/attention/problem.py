"""What an implementation of policy attention is given, and what it must compute.

Shape letters: B batch, L sequence length, H query heads, K key heads (K divides H), C width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """The inputs of one attention without gradients, checked and brought to one form.

    Attributes:
        q: (B, H, L, C).
        k: (B, K, L, C), same dtype as `q`.
        v: (B, K, L, C), same dtype as `q`.
        policy: (B, L), float64 beside float64 queries and float32 otherwise; weight of each key for all queries but
            its own.
        causal: query i sees no key after i.
        key_mask: (B, L) bool, False at keys that nobody sees; or None.
        mask: (B or 1, H or 1, L, L) bool (True: visible) or additive; or None.
        scale: factor on q k^T.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    policy: Tensor
    causal: bool
    key_mask: Tensor | None
    mask: Tensor | None
    scale: float


class Forward(NamedTuple):
    """Result of a forward pass with eps = 0.

    Attributes:
        output: (B, H, L, C) in the dtype of `q`; zero in rows that see no key.
        log_sum: (B, H, L) in the dtype of the policy, log of the weighted sum of exponentials; +inf in rows that see no
            key, so that every `exp(score - log_sum)` of such a row is 0.
        top: (B, H, L) largest visible score, of dropped keys too; None unless asked for.
        top_key: (B, H, L) int64, the key that has it; None unless asked for.
    """

    output: Tensor
    log_sum: Tensor
    top: Tensor | None
    top_key: Tensor | None


class Gradients(NamedTuple):
    """Gradients of `Problem.q`, `k`, `v` (shapes and dtypes as there) and `policy` ((B, L), its dtype)."""

    q: Tensor
    k: Tensor
    v: Tensor
    policy: Tensor


class Kernels(NamedTuple):
    """Forward and backward pass of one implementation.

    Attributes:
        forward: takes the problem and whether `top` and `top_key` are wanted.
        backward: takes the problem, the gradient of the output (B, H, L, C), and per row the logarithm of the
            denominator and the inner product of output and its gradient, both (B, H, L) in the dtype of the policy.
    """

    forward: Callable[[Problem, bool], Forward]
    backward: Callable[[Problem, Tensor, Tensor, Tensor], Gradients]


LARGEST_EXPONENT = 80.0
"""exp(score - log_sum) is cut off here, just inside float32.

It exceeds 1 only at a dropped key that outscores everything kept, where it does not enter the output but is the
derivative of the policy. Where it reaches e^80 that derivative has no meaning, but must stay finite.
"""
