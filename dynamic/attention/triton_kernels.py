"""Policy attention as Triton kernels for CUDA, in the manner of FlashAttention-2 (Dao 2023, arXiv 2307.08691).

One kernel for the output, one for the gradients of queries, one for those of keys, values and policy; all three compute
a tile of scores in `_tile`. The arithmetic is that of `blockwise.py`. Needs the package triton, which comes with torch
on Linux.

`python -m pytest -m gpu tests/dynamic` compares them with `blockwise.py` on a GPU. Elsewhere the tests run them in
Triton's interpreter (`TRITON_INTERPRET=1`), and compile them for two generations of GPUs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dynamic.attention.problem import LARGEST_EXPONENT

BIGGEST_EXPONENT = tl.constexpr(LARGEST_EXPONENT)


@triton.jit
def _rows_of(pointer, rows, length, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) of a contiguous (length, WIDTH) matrix, zero outside of it."""
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < length) & (columns[None, :] < WIDTH)
    return tl.load(pointer + rows[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(pointer, rows, values, length, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Opposite of `_rows_of`."""
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < length) & (columns[None, :] < WIDTH)
    address = pointer + rows[:, None] * WIDTH + columns[None, :]
    tl.store(address, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b):
    """Product with a float32 sum; float32 factors are not shortened to TF32."""
    return tl.dot(a.to(b.dtype), b, input_precision="ieee")


@triton.jit
def _tile(q, k, rows, columns, policy, key_mask, length, scale, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """Scores of a tile, -inf where masked; how often each key counts; and where row and key are the same token."""
    visible = (rows[:, None] < length) & (columns[None, :] < length)
    if CAUSAL:
        visible = visible & (columns[None, :] <= rows[:, None])
    if MASKED:
        allowed = tl.load(key_mask + columns, mask=columns < length, other=0)
        visible = visible & (allowed[None, :] != 0)
    scores = tl.where(visible, _dot(q, tl.trans(k)) * scale, -float("inf"))
    own = rows[:, None] == columns[None, :]
    kept = tl.load(policy + columns, mask=columns < length, other=0.0)
    return scores, tl.where(own, 1.0, kept[None, :]), own


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    policy_ptr,
    key_mask_ptr,
    output_ptr,
    log_sum_ptr,
    top_ptr,
    top_key_ptr,
    heads,
    length,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    WANT_TOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program: BLOCK_M queries of one head. int64: B H L C may exceed 2^31.
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    of_key = head // GROUP * length * WIDTH
    of_sample = head // heads * length
    q = _rows_of(q_ptr + head * length * WIDTH, rows, length, WIDTH, BLOCK_D)
    shift = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    top_key = tl.zeros([BLOCK_M], tl.int32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, (tl.program_id(0) + 1) * BLOCK_M)
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = _rows_of(k_ptr + of_key, columns, length, WIDTH, BLOCK_D)
        v = _rows_of(v_ptr + of_key, columns, length, WIDTH, BLOCK_D)
        scores, weights, _ = _tile(
            q, k, rows, columns, policy_ptr + of_sample, key_mask_ptr + of_sample, length, scale, CAUSAL, MASKED
        )
        if WANT_TOP:
            best = tl.max(scores, 1)
            top_key = tl.where(best > top, start + tl.argmax(scores, 1), top_key)
            top = tl.maximum(top, best)
        counted = tl.where(weights != 0, scores, -float("inf"))
        larger = tl.maximum(shift, tl.max(counted, 1))
        finite = tl.where(larger == -float("inf"), 0.0, larger)
        e = tl.exp(counted - finite[:, None]) * weights
        old = tl.exp(shift - finite)
        total = total * old + tl.sum(e, 1)
        output = output * old[:, None] + _dot(e, v)
        shift = larger
    seen = total != 0
    output = output / tl.where(seen, total, 1.0)[:, None]
    log_sum = tl.where(seen, shift + tl.log(tl.where(seen, total, 1.0)), float("inf"))
    _store_rows(output_ptr + head * length * WIDTH, rows, output, length, WIDTH, BLOCK_D)
    tl.store(log_sum_ptr + head * length + rows, log_sum, mask=rows < length)
    if WANT_TOP:
        tl.store(top_ptr + head * length + rows, top, mask=rows < length)
        tl.store(top_key_ptr + head * length + rows, top_key.to(tl.int64), mask=rows < length)


@triton.jit
def _changes(scores, grad, v, log_denominator_ptr, inner_ptr, rows, length):
    """exp(scores - log_denominator), and that times (grad v^T - inner); 0 in rows outside."""
    log_denominator = tl.load(log_denominator_ptr + rows, mask=rows < length, other=float("inf"))
    inner = tl.load(inner_ptr + rows, mask=rows < length, other=0.0)
    relative = tl.exp(tl.minimum(scores - log_denominator[:, None], BIGGEST_EXPONENT))
    return relative, relative * (_dot(grad, tl.trans(v)) - inner[:, None])


@triton.jit
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    policy_ptr,
    key_mask_ptr,
    grad_ptr,
    log_denominator_ptr,
    inner_ptr,
    dq_ptr,
    heads,
    length,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program: BLOCK_M queries of one head.
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    of_key = head // GROUP * length * WIDTH
    of_sample = head // heads * length
    q = _rows_of(q_ptr + head * length * WIDTH, rows, length, WIDTH, BLOCK_D)
    grad = _rows_of(grad_ptr + head * length * WIDTH, rows, length, WIDTH, BLOCK_D)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, (tl.program_id(0) + 1) * BLOCK_M)
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = _rows_of(k_ptr + of_key, columns, length, WIDTH, BLOCK_D)
        v = _rows_of(v_ptr + of_key, columns, length, WIDTH, BLOCK_D)
        scores, weights, _ = _tile(
            q, k, rows, columns, policy_ptr + of_sample, key_mask_ptr + of_sample, length, scale, CAUSAL, MASKED
        )
        _, change = _changes(
            scores, grad, v, log_denominator_ptr + head * length, inner_ptr + head * length, rows, length
        )
        dq += _dot(change * weights, k)
    _store_rows(dq_ptr + head * length * WIDTH, rows, dq * scale, length, WIDTH, BLOCK_D)


@triton.jit
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    policy_ptr,
    key_mask_ptr,
    grad_ptr,
    log_denominator_ptr,
    inner_ptr,
    dk_ptr,
    dv_ptr,
    dpolicy_ptr,
    heads,
    length,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program: BLOCK_N keys of one key head, with all query heads that share it.
    key_head = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    of_sample = key_head * GROUP // heads * length
    k = _rows_of(k_ptr + key_head * length * WIDTH, columns, length, WIDTH, BLOCK_D)
    v = _rows_of(v_ptr + key_head * length * WIDTH, columns, length, WIDTH, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dpolicy = tl.zeros([BLOCK_N], tl.float32)
    first = 0
    if CAUSAL:
        first = tl.program_id(0) * BLOCK_N // BLOCK_M * BLOCK_M
    for member in range(GROUP):
        head = key_head * GROUP + member
        for start in range(first, length, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            q = _rows_of(q_ptr + head * length * WIDTH, rows, length, WIDTH, BLOCK_D)
            grad = _rows_of(grad_ptr + head * length * WIDTH, rows, length, WIDTH, BLOCK_D)
            scores, weights, own = _tile(
                q, k, rows, columns, policy_ptr + of_sample, key_mask_ptr + of_sample, length, scale, CAUSAL, MASKED
            )
            relative, change = _changes(
                scores, grad, v, log_denominator_ptr + head * length, inner_ptr + head * length, rows, length
            )
            dv += _dot(tl.trans(relative * weights), grad)
            dk += _dot(tl.trans(change * weights), q)
            dpolicy += tl.sum(tl.where(own, 0.0, change), 0)
    _store_rows(dk_ptr + key_head * length * WIDTH, columns, dk * scale, length, WIDTH, BLOCK_D)
    _store_rows(dv_ptr + key_head * length * WIDTH, columns, dv, length, WIDTH, BLOCK_D)
    tl.store(dpolicy_ptr + key_head * length + columns, dpolicy, mask=columns < length)
