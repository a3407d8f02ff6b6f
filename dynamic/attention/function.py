"""The autograd function around an implementation of policy attention, and the original's eps on top of it.

With eps > 0 the original's formula is exact attention with one more key. With m the largest visible score of a row, of
dropped keys too,

    P_ij = (e_ij + eps/L) / (sum_j e_ij + eps),     e_ij = M_ij exp(s_ij - m)

gives the mean of all values the weight of a key with score m + log(eps). So neither form needs the matrix: what is
saved for the backward pass is linear in the length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynamic.attention.problem import Gradients, Kernels, Problem


class PolicyAttention(torch.autograd.Function):
    """Attention whose gradients are those of the whole formula, that of the policy included."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        policy: Tensor,
        masks: tuple[bool, Tensor | None, Tensor | None],
        scale: float,
        eps: float,
        kernels: Kernels,
    ) -> Tensor:
        """Arguments as of `Problem`, with `masks` its `causal`, `key_mask` and `mask`; the policy in any dtype."""
        problem = Problem(q, k, v, policy.to(torch.promote_types(q.dtype, torch.float32)), *masks, scale)
        # Inside autocast the float32 products would be rounded to half precision.
        with torch.autocast(q.device.type, enabled=False):
            exact, log_denominator, top, top_key = kernels.forward(problem, eps > 0)
            output, lead = exact, None
            if top is not None:
                score = top + math.log(eps)
                lead = score - log_denominator  # (B, H, L), log odds of the mean of all values
                output = torch.lerp(_wide(exact, problem), _mean_value(problem), lead.sigmoid()[..., None]).to(q.dtype)
                log_denominator = torch.logaddexp(log_denominator, score)
        ctx.save_for_backward(q, k, v, policy, *masks[1:], exact, log_denominator, lead, top_key)
        ctx.settings = (masks[0], scale, kernels)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `q`, `k`, `v` and `policy`."""
        q, k, v, policy, key_mask, mask, exact, log_denominator, lead, top_key = ctx.saved_tensors
        causal, scale, kernels = ctx.settings
        problem = Problem(q, k, v, policy.to(log_denominator.dtype), causal, key_mask, mask, scale)
        with torch.autocast(q.device.type, enabled=False):
            inner = (_wide(grad, problem) * exact).sum(dim=-1)  # (B, H, L)
            if lead is None:
                gradients = kernels.backward(problem, grad, log_denominator, inner)
            else:
                difference = (_wide(grad, problem) * _mean_value(problem)).sum(dim=-1) - inner
                gradients = kernels.backward(problem, grad, log_denominator, inner + lead.sigmoid() * difference)
                gradients = _add_gradient_of_mean(problem, gradients, grad, difference, lead, top_key)
        return gradients.q, gradients.k, gradients.v, gradients.policy.to(policy.dtype), None, None, None, None


def _wide(x: Tensor, problem: Problem) -> Tensor:
    return x.to(problem.policy.dtype)


def _mean_value(problem: Problem) -> Tensor:
    """Mean of the values of all positions, masked ones too, for each query head: (B, H, 1, C)."""
    groups = problem.q.shape[1] // problem.k.shape[1]
    return _wide(problem.v, problem).mean(dim=2, keepdim=True).repeat_interleave(groups, dim=1)


def _add_gradient_of_mean(
    problem: Problem, gradients: Gradients, grad: Tensor, difference: Tensor, lead: Tensor, top_key: Tensor
) -> Gradients:
    """Add what flows through the mean of the values and through the score that weights it, that of `top_key`.

    Args:
        problem: as given to the kernels.
        gradients: what the kernels found.
        grad: gradient of the output, (B, H, L, C).
        difference: its inner product with the mean of the values, less that with the exact output, (B, H, L).
        lead: log odds of the mean of the values, (B, H, L).
        top_key: key with the largest score, (B, H, L).
    """
    (B, H, L, C), heads = problem.q.shape, problem.k.shape[1]
    grad, q, k = (_wide(x, problem) for x in (grad, problem.q, problem.k))
    by_group = (B, heads, H // heads * L, C)
    share = lead.sigmoid()
    dmean = (grad * share[..., None]).sum(dim=2).unflatten(1, (heads, -1)).sum(dim=2)  # (B, K, C)
    # 1 - share would be 0 where the mean prevails, the very rows where it counts.
    dscore = problem.scale * share * (-lead).sigmoid() * difference  # (B, H, L)
    index = top_key.reshape(B, heads, -1, 1).expand(by_group)
    dq = dscore[..., None] * k.gather(2, index).view(B, H, L, C)
    dk = torch.zeros_like(k).scatter_add_(2, index, (dscore[..., None] * q).reshape(by_group))
    return Gradients(
        gradients.q + dq.to(gradients.q.dtype),
        gradients.k + dk.to(gradients.k.dtype),
        gradients.v + (dmean[:, :, None] / L).to(gradients.v.dtype),
        gradients.policy,
    )
