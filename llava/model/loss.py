"""The language-model loss and its reductions.

`target` averages over the positions that are trained on, over the whole global batch when its count is given.
`micro_batch` averages over those of each micro batch, whatever their number, as upstream does. `all` divides by every
shifted position, ignored ones included: what the original MLLM-HydraLoRA computes.
"""

from __future__ import annotations

from enum import StrEnum

from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.runtime.trainer_options.smoothing import cross_entropy_sum


class LossReduction(StrEnum):
    """What the summed cross entropy is divided by (`--loss_reduction`)."""

    TARGET = "target"
    MICRO_BATCH = "micro_batch"
    ALL = "all"


def language_model_loss(
    logits: Tensor,
    labels: Tensor,
    reduction: LossReduction,
    num_items_in_batch: Tensor | int | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of every position's prediction of the next label, in fp32.

    Args:
        logits: (B, L, V), any floating dtype.
        labels: (B, L), -100 where ignored.
        reduction: see `LossReduction`.
        num_items_in_batch: `target` only: targets of all micro batches and ranks that make up one update; None
            averages over this micro batch.
        smoothing: of the labels, see `cross_entropy_sum`.

    Returns:
        fp32 scalar; 0 for a batch without any target.
    """
    shifted = labels[:, 1:]  # (B, L - 1)
    total = cross_entropy_sum(logits, labels, smoothing)
    if reduction is LossReduction.ALL:
        return total / max(1, shifted.numel())
    if num_items_in_batch is None:
        return total / (shifted != IGNORE_INDEX).sum().clamp(min=1)
    return total / num_items_in_batch
