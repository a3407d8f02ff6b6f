"""The language-model head, and the cross entropy of trained tokens without the logits of all of them at once.

The loss is computed within the call of the head: ZeRO-3 and FSDP gather its weight once a call, and processes with
different numbers of targets must gather equally often.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava.constants import IGNORE_INDEX
from llava.runtime.partition import is_split

CHUNK_BYTES = 2**28
"""Size of the float32 logits that are computed at once; more of them are computed again in the backward pass."""

CHUNK_STEP = 64
"""Rows of a chunk are a multiple of this."""

FusedLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""From hidden states (n, D), weight (V, D), targets (n,) and the smoothing to the summed cross entropy."""


def chunk_rows(vocabulary: int) -> int:
    """How many rows of logits are computed at once."""
    return max(CHUNK_STEP, CHUNK_BYTES // (4 * vocabulary) // CHUNK_STEP * CHUNK_STEP)


def selected_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float, each: bool = False) -> Tensor:
    """Cross entropy in fp32 of logits (n, V) and targets (n,), -100 where ignored: the sum, or `each` of them, (n,)."""
    return nn.functional.cross_entropy(
        logits.float(),
        targets,
        ignore_index=IGNORE_INDEX,
        reduction="none" if each else "sum",
        label_smoothing=smoothing,
    )


def _in_chunks(
    head: Callable[[Tensor], Tensor], rows: int, hidden: Tensor, targets: Tensor, smoothing: float, each: bool
) -> Tensor:
    """`summed_loss` or `token_losses` by chunks of `rows`; only one of them has its logits at any time."""

    def of_chunk(some: Tensor, wanted: Tensor) -> Tensor:
        return selected_cross_entropy(head(some), wanted, smoothing, each)

    if len(targets) <= rows:
        return of_chunk(hidden, targets)
    parts = [
        checkpoint(of_chunk, some, wanted, use_reentrant=False)
        for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(parts) if each else torch.stack(parts).sum()


class LanguageHead(nn.Linear):
    """The usual head, which can give the loss of hidden states in place of their logits.

    Attributes:
        fused: what computes the loss of a head without bias instead, if anything does; see `liger_loss`.
    """

    fused: FusedLoss | None = None

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, smoothing: float = 0.0, each: bool = False
    ) -> Tensor:
        """Logits (..., V) of `hidden` (..., D); with `targets` what `summed_loss` says, or `token_losses` if `each`."""
        if targets is None:
            return super().forward(hidden)
        if self.fused is not None and self.bias is None and torch.is_grad_enabled() and not each:
            return self.fused(hidden, self.weight, targets, smoothing)
        return _in_chunks(super().forward, chunk_rows(self.out_features), hidden, targets, smoothing, each)


def summed_loss(head: nn.Module, hidden: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Summed cross entropy of targets, in fp32, by any head.

    Args:
        head: gives logits (n, V); another one than a `LanguageHead` (an adapter of PEFT is around it, for example) is
            called for each chunk, or once if ZeRO-3 or FSDP has split it.
        hidden: (n, D).
        targets: (n,) int64, -100 where ignored.
        smoothing: of the labels, see `cross_entropy_sum`.
    """
    return _loss(head, hidden, targets, smoothing, each=False)


def token_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each target, (n,) in fp32, 0 where ignored; arguments as of `summed_loss`."""
    return _loss(head, hidden, targets, 0.0, each=True)


def _loss(head: nn.Module, hidden: Tensor, targets: Tensor, smoothing: float, each: bool) -> Tensor:
    if isinstance(head, LanguageHead):
        return head(hidden, targets, smoothing, each)
    weights = list(head.parameters())
    whole = any(is_split(weight) for weight in weights) or not weights
    rows = len(targets) if whole else chunk_rows(max(len(weight) for weight in weights))
    return _in_chunks(head, rows, hidden, targets, smoothing, each)


@functools.cache
def liger_loss() -> FusedLoss | None:
    """Liger's fused linear cross entropy, a Triton kernel; None where the package liger-kernel is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    def fused(hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        loss = LigerFusedLinearCrossEntropyLoss(
            ignore_index=IGNORE_INDEX, label_smoothing=smoothing, reduction="sum", accum_dtype=torch.float32
        )
        if torch.is_autocast_enabled(hidden.device.type):
            # What autocast does with the arguments of torch's own linear layer.
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        return loss(weight, hidden.to(weight.dtype), targets)

    return fused
