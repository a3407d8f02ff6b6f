"""Policy attention needs memory linear in the length: what is kept for the backward pass, and the largest temporary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dynamic.attention import policy_attention
from dynamic.attention.blockwise import ROWS

B, H, K, C = 2, 4, 2, 8


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results: Iterable[Any] = result if isinstance(result, tuple | list) else (result,)
        self.elements = max([self.elements, *(x.numel() for x in results if isinstance(x, Tensor))])
        return result


def measure(length: int, implementation: str, eps: float) -> tuple[int, int]:
    """Bytes saved for the backward pass, and elements of the largest tensor in both passes."""
    q, k, v = (torch.randn(B, heads, length, C, requires_grad=True) for heads in (H, K, K))
    policy = torch.ones(B, length, requires_grad=True)
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = policy_attention(q, k, v, policy, causal=True, implementation=implementation, eps=eps)
        y.sum().backward()
    return sum(saved.values()), largest.elements


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_memory_is_linear_in_the_length(eps: float) -> None:
    saved, largest = zip(*(measure(N, "blockwise", eps) for N in (2 * ROWS, 4 * ROWS, 8 * ROWS)), strict=True)
    assert saved[1] == 2 * saved[0]
    assert saved[2] == 4 * saved[0]
    assert largest == tuple(B * H * ROWS * N for N in (2 * ROWS, 4 * ROWS, 8 * ROWS))


def test_the_matrix_of_the_original_is_quadratic() -> None:
    """The measurement sees what it looks for."""
    saved, largest = zip(*(measure(N, "eager", 1e-6) for N in (2 * ROWS, 4 * ROWS)), strict=True)
    assert saved[1] > 3.5 * saved[0]
    assert largest[1] == B * H * (4 * ROWS) ** 2
