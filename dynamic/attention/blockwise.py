"""Policy attention by blocks of query rows, in plain torch: any device, memory linear in the length.

The forward pass keeps no probabilities; the backward pass computes those of one block of rows again from the row's
log-sum (as FlashAttention does, Dao et al. 2022, arXiv 2205.14135). Everything inside is float32, or float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dynamic.attention.problem import LARGEST_EXPONENT, Forward, Gradients, Kernels, Problem

ROWS = 128
"""Rows in a block: temporaries are (B, H, ROWS, L)."""


class Block(NamedTuple):
    """Some rows of the attention matrix, with the keys that they can see at all.

    Attributes:
        rows: which rows; there are b of them.
        keys: which keys; there are n of them, fewer than L before the end of a causal matrix.
        own: (b, n) bool, True where row and key are the same token.
        weights: (B, 1, 1, b, n) how often each key counts: the policy, and 1 where `own`.
        scores: (B, K, H / K, b, n), -inf where masked.
    """

    rows: slice
    keys: slice
    own: Tensor
    weights: Tensor
    scores: Tensor


def _grouped(x: Tensor, problem: Problem) -> Tensor:
    """(B, H, L, ...) as (B, K, H / K, L, ...): the query heads that share a key head side by side."""
    return x.unflatten(1, (problem.k.shape[1], -1))


def _wide(x: Tensor, problem: Problem) -> Tensor:
    return x.to(problem.policy.dtype)


def _blocks(problem: Problem, size: int) -> Iterator[Block]:
    """The matrix of scores, block by block."""
    L, device = problem.q.shape[2], problem.q.device
    q, k = _grouped(problem.q, problem), _wide(problem.k, problem)
    positions = torch.arange(L, device=device)
    for start in range(0, L, size):
        rows = slice(start, min(start + size, L))
        keys = slice(0, rows.stop if problem.causal else L)
        own = positions[rows, None] == positions[None, keys]  # (b, n)
        scores = _by_group(_wide(q[..., rows, :], problem) * problem.scale, k[:, :, keys].mT)  # (B, K, H / K, b, n)
        if problem.mask is not None:
            part = problem.mask[..., rows, keys]
            part = part[:, :, None] if part.shape[1] == 1 else _grouped(part, problem)
            if part.dtype == torch.bool:
                scores.masked_fill_(~part, -torch.inf)
            else:
                scores += part
        if problem.key_mask is not None:
            scores.masked_fill_(~problem.key_mask[:, None, None, None, keys], -torch.inf)
        if problem.causal:
            scores.masked_fill_(positions[rows, None] < positions[None, keys], -torch.inf)
        weights = torch.where(own, 1, problem.policy[:, None, None, None, keys])
        yield Block(rows, keys, own, weights, scores)


def _by_group(left: Tensor, right: Tensor) -> Tensor:
    """(B, K, G, b, x) times (B, K, x, y): one product per key head, however many query heads share it."""
    return (left.flatten(2, 3) @ right).unflatten(2, left.shape[2:4])


def _over_group(left: Tensor, right: Tensor) -> Tensor:
    """Sum over query heads and rows: (B, K, G, b, x) and (B, K, G, b, y) give (B, K, x, y)."""
    return left.flatten(2, 3).mT @ right.flatten(2, 3)


def forward(problem: Problem, want_top: bool, size: int = ROWS) -> Forward:
    """See `Kernels`; `size` is the number of rows in a block."""
    v = _wide(problem.v, problem)
    output = torch.empty_like(problem.q, memory_format=torch.contiguous_format)
    log_sum = torch.empty(problem.q.shape[:3], dtype=problem.policy.dtype, device=problem.q.device)
    top, top_key = (
        (torch.empty_like(log_sum), torch.empty_like(log_sum, dtype=torch.int64)) if want_top else (None,) * 2
    )
    for block in _blocks(problem, size):
        rows = block.rows
        if top is not None and top_key is not None:
            best = block.scores.max(dim=-1)
            top[:, :, rows], top_key[:, :, rows] = best.values.flatten(1, 2), best.indices.flatten(1, 2)
        counted = block.scores.masked_fill_(block.weights == 0, -torch.inf)
        shift = counted.amax(dim=-1, keepdim=True)  # (B, K, H / K, b, 1)
        seen = shift > -torch.inf
        shift.masked_fill_(~seen, 0)
        e = counted.sub_(shift).exp_().mul_(block.weights)
        total = e.sum(dim=-1, keepdim=True)
        output[:, :, rows] = (_by_group(e, v[:, :, block.keys]) / total.masked_fill(~seen, 1)).flatten(1, 2)
        log_sum[:, :, rows] = (shift + total.log()).masked_fill(~seen, torch.inf).squeeze(-1).flatten(1, 2)
    return Forward(output, log_sum, top, top_key)


def backward(problem: Problem, grad: Tensor, log_denominator: Tensor, inner: Tensor, size: int = ROWS) -> Gradients:
    """See `Kernels`; `size` is the number of rows in a block.

    With R = exp(scores - log_denominator), P = M R and dP = grad v^T:

        d scores = P (dP - inner),    d policy[j] = sum over heads and rows i != j of R (dP - inner)
    """
    k, v = _wide(problem.k, problem), _wide(problem.v, problem)
    dq = torch.empty_like(problem.q, memory_format=torch.contiguous_format)
    dk, dv, dpolicy = torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(problem.policy)
    q, grad = _grouped(problem.q, problem), _grouped(grad, problem)
    log_denominator, inner = _grouped(log_denominator, problem), _grouped(inner, problem)
    for block in _blocks(problem, size):
        rows, keys = block.rows, block.keys
        grad_rows = _wide(grad[..., rows, :], problem)
        relative = block.scores.sub_(log_denominator[..., rows, None]).clamp_(max=LARGEST_EXPONENT).exp_()  # R
        change = _by_group(grad_rows, v[:, :, keys].mT).sub_(inner[..., rows, None])  # dP - inner
        dv[:, :, keys] += _over_group(relative * block.weights, grad_rows)
        change.mul_(relative)
        dpolicy[:, keys] += change.sum(dim=(1, 2)).masked_fill_(block.own, 0).sum(dim=1)
        change.mul_(block.weights).mul_(problem.scale)  # d scores, times the scale
        dq[:, :, rows] = _by_group(change, k[:, :, keys]).flatten(1, 2).to(dq.dtype)
        dk[:, :, keys] += _over_group(change, _wide(q[..., rows, :], problem))
    return Gradients(dq, dk.to(problem.k.dtype), dv.to(problem.v.dtype), dpolicy)


def blockwise(size: int = ROWS) -> Kernels:
    """Forward and backward pass with `size` rows in a block."""
    return Kernels(partial(forward, size=size), partial(backward, size=size))
