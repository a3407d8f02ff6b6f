"""`policy_attention`: checks the arguments and chooses an implementation."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from dynamic.attention.function import PolicyAttention
from dynamic.attention.operators import kernels_named, operators
from dynamic.attention.problem import Kernels
from dynamic.attention.reference import reference_attention

IMPLEMENTATIONS = ("auto", "eager", "blockwise", "triton", "flex")

WIDEST_HEAD = 128
"""Of the Triton kernels, which hold the whole width of a head at once."""


def policy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    implementation: str = "auto",
    eps: float = 0.0,
) -> Tensor:
    """Attention in which key j counts `policy[j]` times for every query but its own, which always sees it fully.

        M[i, j] = policy[j] + (1 - policy[j]) * [i == j]
        y_i = sum_j M[i, j] exp(s_ij) v_j / sum_j M[i, j] exp(s_ij)

    A query that sees nothing gives zeros. Gradients flow to q, k, v and the policy, also to its zeros. Of a dropped key
    whose score is far above all kept ones the gradient is as large as the formula makes it; eps bounds it by 1 / eps.

    Args:
        q: (B, H, L, C), floating.
        k: (B, K, L, C), same dtype; K divides H.
        v: (B, K, L, C), same dtype.
        policy: (B, L), not negative: 1 for kept, 0 for dropped tokens, or anything between.
        causal: query i sees no key after i.
        key_mask: (B, L), true or 1 at keys that may be seen; None: all.
        mask: (B or 1, H or 1, L, L) bool (true: visible) or additive, on top of the others; no gradient flows to it. It
            is quadratic in the length itself: give `causal` and `key_mask` instead where they say the same.
        scale: factor on q k^T; None is 1 / sqrt(C).
        implementation: "eager" builds the matrix as the original does; "blockwise" is plain torch; "triton" needs CUDA
            and takes no `mask`; "flex" is torch's FlexAttention, with CUDA, without `mask` and `eps`; "auto" is triton
            where that can run and blockwise elsewhere.
        eps: 0 is the formula above. 1e-6 gives the numbers of the original, where dropped, masked and future keys all
            keep a weight of eps / L (see `policy_softmax`).

    Returns:
        (B, H, L, C) in the dtype of `q`.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation is unknown or cannot run here.
    """
    _check(q, k, v, policy, key_mask, mask, implementation, eps)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    key_mask = None if key_mask is None else key_mask.to(device=q.device, dtype=torch.bool)
    if implementation == "eager":
        return reference_attention(q, k, v, policy, causal=causal, key_mask=key_mask, mask=mask, scale=scale, eps=eps)
    if implementation == "flex":
        obstacle = _obstacle_for_flex(q, mask, eps)
        if obstacle:
            raise ValueError(f"policy attention cannot run with FlexAttention: {obstacle}; use implementation='auto'")
        from dynamic.attention import flex

        return flex.attend(q, k, v, policy, causal=causal, key_mask=key_mask, scale=scale)
    kernels = _kernels(implementation, q, mask)
    output = PolicyAttention.apply(q, k, v, policy, (causal, key_mask, mask), scale, eps, kernels)
    assert isinstance(output, Tensor)  # noqa: S101  `apply` has no type of its own
    return output


def _kernels(implementation: str, q: Tensor, mask: Tensor | None) -> Kernels:
    """Forward and backward pass for these tensors.

    Raises:
        ValueError: Triton was asked for and cannot run.
    """
    obstacle = _obstacle_for_triton(q, mask)
    if implementation == "blockwise" or (implementation == "auto" and (obstacle or not q.is_cuda)):
        chosen = "blockwise"
    elif obstacle:
        raise ValueError(f"policy attention cannot run with Triton: {obstacle}; use implementation='blockwise'")
    else:
        chosen = "triton"
    return operators(chosen) if torch.compiler.is_compiling() else kernels_named(chosen, q)


def _obstacle_for_triton(q: Tensor, mask: Tensor | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if mask is not None:
        return "its kernels take `causal` and `key_mask`, no 4-D mask"
    if q.shape[-1] > WIDEST_HEAD:
        return f"heads are {q.shape[-1]} wide, the kernels allow {WIDEST_HEAD}"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"queries are {q.dtype}"
    return None


def _obstacle_for_flex(q: Tensor, mask: Tensor | None, eps: float) -> str | None:
    if not q.is_cuda:
        return f"the queries are on the device '{q.device}', where torch has no backward pass of it"
    if mask is not None:
        return "it is given `causal` and `key_mask`, no 4-D mask"
    if eps > 0:
        return f"eps is {eps}, and with the original's eps it is not a term of the scores"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"queries are {q.dtype}"
    return None


def _check(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor, key_mask: Tensor | None, mask: Tensor | None, name: str, eps: float
) -> None:
    """Raise `ValueError` if the arguments of `policy_attention` do not fit together."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation '{name}' of policy attention; there are {', '.join(IMPLEMENTATIONS)}")
    if eps < 0:
        raise ValueError(f"eps is {eps}; it must not be negative")
    (B, H, L, C), heads = q.shape, k.shape[1]
    if k.shape != (B, heads, L, C) or v.shape != k.shape or H % heads:
        raise ValueError(
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit: policy attention "
            "needs as many keys as queries (no cache), and a number of key heads that divides that of query heads"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"queries are {q.dtype}, keys {k.dtype}, values {v.dtype}; they must share a floating dtype")
    for what, given in {"policy": policy, "key_mask": key_mask}.items():
        if given is not None and given.shape != (B, L):
            raise ValueError(f"{what} has the shape {tuple(given.shape)}, the queries ask for {(B, L)}")
    if mask is not None and not (
        mask.ndim == 4 and mask.shape[0] in (1, B) and mask.shape[1] in (1, H) and mask.shape[2:] == (L, L)
    ):
        raise ValueError(f"mask has the shape {tuple(mask.shape)}, the queries ask for {(B, H, L, L)} or 1 for B or H")
