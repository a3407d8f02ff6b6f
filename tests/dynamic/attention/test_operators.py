"""Policy attention as operators that the compiler does not look into: one graph for all lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from dynamic.attention import blockwise
from dynamic.attention.dispatch import policy_attention
from dynamic.attention.operators import policy_backward, policy_forward

LENGTHS = (5, 130, 300)
"""One to three blocks of rows."""


def drawn(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values and a policy, which want gradients; keys and values as layers make them, transposed."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k, v = (draw(2, length, heads, 4).transpose(1, 2) for heads in (4, 2, 2))
    kept = torch.rand(2, length, generator=generator) < 0.5
    policy = kept.to(torch.promote_types(dtype, torch.float32))
    return [each.requires_grad_() for each in (q, k, v, policy)]


def results(call: Any, length: int, **options: Any) -> list[Tensor]:
    """Output and gradients."""
    inputs = drawn(length)
    output = call(*inputs, causal=True, **options)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_one_graph_for_all_lengths(eps: float) -> None:
    torch.compiler.reset()
    counters.clear()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(policy_attention, backend=graphs, fullgraph=True, dynamic=True)
    for length in LENGTHS:
        for found, expected in zip(
            results(compiled, length, eps=eps), results(policy_attention, length, eps=eps), strict=True
        ):
            assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def test_the_loop_alone_makes_a_graph_for_each_length() -> None:
    """The negative control: what the operators hide."""
    torch.compiler.reset()
    counters.clear()

    def loop(q: Tensor, k: Tensor, v: Tensor, policy: Tensor) -> Tensor:
        problem = blockwise.Problem(q, k, v, policy, True, None, None, 0.5)
        return blockwise.forward(problem, want_top=False).output

    compiled = torch.compile(loop, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (5, 7):
            compiled(*drawn(length))
    assert counters["stats"]["unique_graphs"] == 2
    torch.compiler.reset()


@pytest.mark.parametrize("want_top", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_strides_are_as_the_compiler_is_told(want_top: bool, dtype: torch.dtype) -> None:
    q, k, v, policy = (each.detach() for each in drawn(9, dtype))
    key_mask = torch.ones(2, 9, dtype=torch.bool)
    inputs = (q, k, v, policy, True, key_mask, None, 0.5, "blockwise")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(policy_forward, (*inputs, want_top), test_utils=checks)
    output, log_sum, _, _ = policy_forward(*inputs, want_top)
    further = (torch.ones_like(output), log_sum, torch.zeros_like(log_sum))
    torch.library.opcheck(policy_backward, (*inputs, *further), test_utils=checks)
