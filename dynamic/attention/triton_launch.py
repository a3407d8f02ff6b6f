"""Starts the Triton kernels of policy attention, and checks them once on every GPU that they run on."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from dynamic.attention import blockwise
from dynamic.attention.problem import Forward, Gradients, Kernels, Problem
from dynamic.attention.triton_kernels import forward_kernel, key_gradient_kernel, query_gradient_kernel

TILES = {
    2: {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
    4: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
}
"""Tiles by the bytes of a number. Compiled for width 128 they take at most 70 KB of shared memory and spill hardly any
registers (sm_80 and sm_90)."""


def constants(problem: Problem) -> dict[str, int | bool]:
    """What the kernels are compiled for."""
    width = problem.q.shape[-1]
    return {
        "GROUP": problem.q.shape[1] // problem.k.shape[1],
        "WIDTH": width,
        "CAUSAL": problem.causal,
        "MASKED": problem.key_mask is not None,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        **TILES[problem.q.element_size()],
    }


def _inputs(problem: Problem) -> list[Tensor]:
    """The tensors that all kernels read, contiguous."""
    policy = problem.policy.contiguous()
    # Unread where there is no mask, but Triton wants a pointer.
    key_mask = policy if problem.key_mask is None else problem.key_mask.to(torch.int8).contiguous()
    return [problem.q.contiguous(), problem.k.contiguous(), problem.v.contiguous(), policy, key_mask]


def forward(problem: Problem, want_top: bool) -> Forward:
    """See `Kernels`."""
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(problem.q):
        return _forward(problem, want_top)


def _forward(problem: Problem, want_top: bool) -> Forward:
    (B, H, L, _), given = problem.q.shape, constants(problem)
    output = torch.empty_like(problem.q, memory_format=torch.contiguous_format)
    log_sum = torch.empty((B, H, L), dtype=torch.float32, device=output.device)
    top = torch.empty_like(log_sum) if want_top else None
    top_key = torch.empty_like(log_sum, dtype=torch.int64) if want_top else None
    forward_kernel[(triton.cdiv(L, given["BLOCK_M"]), B * H)](
        *_inputs(problem),
        output,
        log_sum,
        log_sum if top is None else top,
        log_sum if top_key is None else top_key,
        H,
        L,
        problem.scale,
        WANT_TOP=want_top,
        **given,
    )
    return Forward(output, log_sum, top, top_key)


def backward(problem: Problem, grad: Tensor, log_denominator: Tensor, inner: Tensor) -> Gradients:
    """See `Kernels`."""
    with torch.cuda.device_of(problem.q):
        return _backward(problem, grad, log_denominator, inner)


def _backward(problem: Problem, grad: Tensor, log_denominator: Tensor, inner: Tensor) -> Gradients:
    (B, H, L, _), K, given = problem.q.shape, problem.k.shape[1], constants(problem)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in problem[:3])
    dpolicy = torch.empty((B, K, L), dtype=torch.float32, device=dq.device)
    read = [*_inputs(problem), grad.contiguous(), log_denominator.contiguous(), inner.contiguous()]
    query_gradient_kernel[(triton.cdiv(L, given["BLOCK_M"]), B * H)](*read, dq, H, L, problem.scale, **given)
    key_gradient_kernel[(triton.cdiv(L, given["BLOCK_N"]), B * K)](*read, dk, dv, dpolicy, H, L, problem.scale, **given)
    return Gradients(dq, dk, dv, dpolicy.sum(dim=1))


def triton_kernels(q: Tensor) -> Kernels:
    """The kernels for tensors like `q`.

    Raises:
        ValueError: `q` is not on a CUDA device and the kernels are not interpreted.
        RuntimeError: the kernels' results on this device differ from those of plain torch.
    """
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"policy attention cannot run with Triton on the device '{q.device}'; use implementation='blockwise', or "
            "set TRITON_INTERPRET=1 to try the kernels slowly on the CPU"
        )
    _check_once(q.device, q.dtype, q.shape[-1])
    return Kernels(forward, backward)


@functools.cache
def _check_once(device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Compare with `blockwise.py` on a small problem, once in a process: a new GPU or compiler must not be trusted.

    The problem is causal and padded, and two heads share keys and values; the tests compare the other cases. Plain
    torch computes in float64, which TF32 does not reach: with `--tf32 True` its float32 products have 10 bits.

    Raises:
        RuntimeError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    L = 70  # several tiles, the last one ragged

    def draw(heads: int) -> Tensor:
        return torch.randn(2, heads, L, width, generator=generator).to(device, dtype)

    policy = torch.rand(2, L, generator=generator).round().to(device)
    key_mask = torch.arange(L, device=device) >= torch.tensor([[0], [9]], device=device)
    problem = Problem(draw(2), draw(1), draw(1), policy, True, key_mask, None, width**-0.5)
    exact = problem._replace(**{name: getattr(problem, name).double() for name in ("q", "k", "v", "policy")})
    grad, results = draw(2), []
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for kernels, given in ((Kernels(forward, backward), problem), (blockwise.blockwise(), exact)):
            result = kernels.forward(given, True)
            inner = (grad.to(given.policy.dtype) * result.output).sum(dim=-1)
            results.append([result.output, *kernels.backward(given, grad.to(given.q.dtype), result.log_sum, inner)])
    for what, ours, theirs in zip(("output", "dq", "dk", "dv", "dpolicy"), *results, strict=True):
        error = float((ours.double() - theirs).norm() / theirs.norm())
        # float32 differs by rounding alone; half precision rounds the probabilities, 2^-8 of each.
        if not error < (1e-4 if dtype == torch.float32 else 2e-2):
            raise RuntimeError(
                f"the Triton kernels of policy attention are wrong on {device} ({dtype}, width {width}): {what} "
                f"differs by {error:.1e} from plain torch; use implementation='blockwise' and report this with your "
                "versions of torch and triton"
            )
