"""The experts of top-k and top-p computed one by one, where most of them do not act for a token.

Densely, one product with the B of all experts serves every token, and the weights of most are zero. Here the tokens are
grouped by expert, and each B multiplies its own. This saves arithmetic and pays in copies of the output, so it is used
where that was measured to be faster (`benchmarks/sparse_experts.py`): on the CPU, with many experts. It happens within
the module of the experts, which every process calls with its whole weight whatever the routing is.

Shape letters: r rank, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST = 32
"""Experts below which the dense product is faster, or as fast."""
FEWEST_OF_FEW = 64
"""The same for less than `FEW_TOKENS` tokens, as in decoding, where calling a product for each expert takes longer."""
FEW_TOKENS = 16
SHARE, SHARE_WITH_GRADIENTS = 1 / 16, 1 / 32
"""Largest share of the weights that may act."""


def pays(code: Tensor, weights: Tensor) -> bool:
    """Whether the grouped computation is faster; it gives the same numbers to rounding.

    Args:
        code: (..., r).
        weights: (..., E) that broadcast to the tokens of `code`.
    """
    experts, tokens = weights.shape[-1], code.shape[:-1].numel()
    if experts < (FEWEST if tokens >= FEW_TOKENS else FEWEST_OF_FEW) or not tokens or not _is_plain(code):
        return False
    share = SHARE_WITH_GRADIENTS if torch.is_grad_enabled() else SHARE
    return int(weights.count_nonzero()) <= share * weights.numel()


def _is_plain(code: Tensor) -> bool:
    """Whether this runs on the CPU in full precision, and nothing traces or transforms it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # numbers of pairs are not those of one sample
        return False
    full = code.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return code.device.type == "cpu" and full


def grouped_experts(
    code: Tensor, experts_b: Tensor, weights: Tensor, scaling: float = 1.0, onto: Tensor | None = None
) -> Tensor:
    """`onto + scaling * sum_e weights_e * B_e code`, from the experts alone whose weight is not zero.

    A weight of zero gets a gradient of zero: it must be one that a rule has chosen to be zero.

    Args:
        code: (..., r).
        experts_b: (out_features, E * r), as of `weighted_experts`.
        weights: (..., E) float32, that broadcast to the tokens of `code`.
        scaling: factor of the sum.
        onto: (..., out_features), what the sum is added to.

    Returns:
        (..., out_features) in the dtype of `onto`, or of `code`.
    """
    if onto is not None and onto.dtype != code.dtype:
        return onto + grouped_experts(code, experts_b, weights, scaling).to(onto.dtype)
    experts, rank, shape = weights.shape[-1], code.shape[-1], code.shape[:-1]
    code, weights = code.reshape(-1, rank), weights.expand(*shape, experts).reshape(-1, experts)
    tokens, chosen = weights.detach().nonzero(as_tuple=True)
    chosen, order = chosen.sort(stable=True)
    tokens = tokens[order]  # by expert, in the order of the tokens
    factors = (weights[tokens, chosen] * scaling).unsqueeze(-1)
    parts = (code.index_select(0, tokens) * factors).to(code.dtype)  # (pairs, r)
    counts = torch.bincount(chosen, minlength=experts).tolist()
    experts_b = experts_b.to(code.dtype)
    # With gradients one view for each expert, so that the gradient of the whole weight is put together once.
    matrices = experts_b.unflatten(1, (experts, rank)).unbind(1) if torch.is_grad_enabled() else None
    size = (len(code), len(experts_b))
    total = code.new_zeros(size) if onto is None else onto.reshape(size).clone()
    end = 0
    for expert, count in enumerate(counts):
        if count:
            start, end = end, end + count
            matrix = experts_b[:, expert * rank : (expert + 1) * rank] if matrices is None else matrices[expert]
            total.index_add_(0, tokens[start:end], F.linear(parts[start:end], matrix))
    return total.view(*shape, len(experts_b))
