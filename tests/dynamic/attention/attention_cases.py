"""Inputs of policy attention that its tests share, and a battery of cases."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dynamic.attention import policy_attention

INPUTS = ("q", "k", "v", "policy")


class Case(NamedTuple):
    """One row of the table below; B batch, H query heads, K key heads, N length, C width of a head."""

    policy: str
    causal: bool = True
    padding: str | None = None
    shape: tuple[int, int, int, int, int] = (2, 4, 4, 37, 8)  # B, H, K, N, C


CASES = {
    "hard": Case("hard"),
    "soft": Case("soft"),
    "ones": Case("ones"),
    "zeros": Case("zeros"),
    "dominated": Case("dominated"),
    "bidirectional": Case("hard", causal=False),
    "bidirectional_padded": Case("soft", causal=False, padding="right"),
    "right_padding": Case("hard", padding="right"),
    "left_padding": Case("hard", padding="left"),
    "grouped": Case("hard", shape=(2, 6, 2, 37, 8)),
    "one_key_head": Case("soft", padding="left", shape=(3, 4, 1, 20, 16)),
    "one_token": Case("hard", shape=(1, 2, 2, 1, 8)),
}

each_case = pytest.mark.parametrize("name", CASES)


def draw(case: Case, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors that want gradients, and the remaining arguments of `policy_attention`."""
    B, H, K, N, C = case.shape
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(B, H, N, C), normal(B, K, N, C), normal(B, K, N, C)
    uniform = torch.rand(B, N, generator=generator, dtype=torch.float64)
    policy = {
        "hard": (uniform > 0.4).double(),
        "soft": uniform,
        "ones": torch.ones(B, N, dtype=torch.float64),
        "zeros": torch.zeros(B, N, dtype=torch.float64),
        "dominated": (torch.arange(N) != 1).double().expand(B, N),
    }[case.policy]
    if case.policy == "dominated":
        # Every score of the dropped key 1 is 20 larger than it was: e^20 is nearly 1 / 2e-9.
        q[..., 0] = 1
        k[:, :, 1, 0] += 20 * C**0.5
    key_mask = None
    if case.padding is not None:
        missing = torch.arange(B)[:, None] * N // 4
        position = torch.arange(N)
        key_mask = position >= missing if case.padding == "left" else position < N - missing
    tensors = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    tensors["policy"] = policy.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for tensor in tensors.values():
        tensor.requires_grad_()
    return tensors, {"causal": case.causal, "key_mask": key_mask}


def run(tensors: dict[str, Tensor], **arguments: Any) -> dict[str, Tensor]:
    """Output `y` and the gradients of a fixed weighted sum of it, by the name of the input."""
    y = policy_attention(*(tensors[name] for name in INPUTS), **arguments)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(y)
    gradients = torch.autograd.grad((y * weights).sum(), [tensors[name] for name in INPUTS])
    return {"y": y.detach(), **dict(zip(INPUTS, gradients, strict=True))}


def relative_errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm of the exact value, or of ones where that is larger; in float64."""
    errors = {}
    for name, value in exact.items():
        difference = (found[name].double() - value.double()).norm()
        errors[name] = float(difference / value.double().norm().clamp(min=value.numel() ** 0.5))
    return errors
