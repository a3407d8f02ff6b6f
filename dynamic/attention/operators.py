"""The kernels of policy attention as operators of torch, which the compiler calls and does not look into.

The loop of `blockwise` over blocks of rows depends on the length, so a compiler that traces it makes a graph for each
length. As an operator it is one node of a graph for all lengths. What surrounds the kernels in `function.py` is traced.
Used while compiling alone: outside, operations are counted and planned one by one.

Shape letters as in `problem.py`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dynamic.attention.blockwise import blockwise
from dynamic.attention.problem import Forward, Gradients, Kernels, Problem

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor policy, bool causal, Tensor? key_mask, Tensor? mask, float scale, "
    "str implementation"
)


def kernels_named(implementation: str, q: Tensor) -> Kernels:
    """Forward and backward pass of "blockwise" or "triton", for queries like `q`."""
    if implementation == "blockwise":
        return blockwise()
    from dynamic.attention.triton_launch import triton_kernels

    return triton_kernels(q)


def operators(implementation: str) -> Kernels:
    """The kernels of that name as operators."""
    return Kernels(partial(_forward, implementation), partial(_backward, implementation))


def _forward(implementation: str, problem: Problem, want_top: bool) -> Forward:
    output, log_sum, top, top_key = policy_forward(*problem, implementation, want_top)
    return Forward(output, log_sum, top if want_top else None, top_key if want_top else None)


def _backward(implementation: str, problem: Problem, grad: Tensor, log_denominator: Tensor, inner: Tensor) -> Gradients:
    return Gradients(*policy_backward(*problem, implementation, grad, log_denominator, inner))


@torch.library.custom_op(
    "llava_dynamic::policy_forward",
    mutates_args=(),
    schema=f"({_INPUTS}, bool want_top) -> (Tensor, Tensor, Tensor, Tensor)",
)
def policy_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    mask: Tensor | None,
    scale: float,
    implementation: str,
    want_top: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Kernels.forward`; `top` and `top_key` are empty unless they are wanted, as an operator must return tensors."""
    problem = Problem(q, k, v, policy, causal, key_mask, mask, scale)
    output, log_sum, top, top_key = kernels_named(implementation, q).forward(problem, want_top)
    if top is None or top_key is None:
        top, top_key = log_sum.new_empty(0), log_sum.new_empty(0, dtype=torch.int64)
    return output, log_sum, top, top_key


@policy_forward.register_fake
def _shapes_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    mask: Tensor | None,
    scale: float,
    implementation: str,
    want_top: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output = torch.empty_like(q, memory_format=torch.contiguous_format)  # (B, H, L, C)
    log_sum = policy.new_empty(q.shape[:3])  # (B, H, L)
    top = torch.empty_like(log_sum) if want_top else log_sum.new_empty(0)
    return output, log_sum, top, torch.empty_like(top, dtype=torch.int64)


@torch.library.custom_op(
    "llava_dynamic::policy_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor grad, Tensor log_denominator, Tensor inner) -> (Tensor, Tensor, Tensor, Tensor)",
)
def policy_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    mask: Tensor | None,
    scale: float,
    implementation: str,
    grad: Tensor,
    log_denominator: Tensor,
    inner: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Kernels.backward`."""
    problem = Problem(q, k, v, policy, causal, key_mask, mask, scale)
    dq, dk, dv, dpolicy = kernels_named(implementation, q).backward(problem, grad, log_denominator, inner)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dpolicy.contiguous()  # as the compiler is told


@policy_backward.register_fake
def _shapes_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    mask: Tensor | None,
    scale: float,
    implementation: str,
    grad: Tensor,
    log_denominator: Tensor,
    inner: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    as_kernels = {"memory_format": torch.contiguous_format}
    dq, dk, dv = (torch.empty_like(each, **as_kernels) for each in (q, k, v))
    return dq, dk, dv, torch.empty_like(policy, **as_kernels)
