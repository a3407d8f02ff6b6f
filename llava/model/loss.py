"""The language-model loss and its reductions, of all logits or of the trained tokens' hidden states alone.

`target` averages over the positions that are trained on, over the whole global batch when its count is given.
`micro_batch` averages over those of each micro batch, whatever their number, as upstream does. `all` divides by every
shifted position, ignored ones included: what the original MLLM-HydraLoRA computes.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX
from llava.data.targets import Targets, find_targets
from llava.model.head import summed_loss, token_losses
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
    positions: int | None = None,
) -> Tensor:
    """Cross entropy of every position's prediction of the next label, in fp32.

    Args:
        logits: (B, L, V), any floating dtype.
        labels: (B, L), -100 where ignored.
        reduction: see `LossReduction`.
        num_items_in_batch: `target` only: targets of all micro batches and ranks that make up one update; None
            averages over this micro batch.
        smoothing: of the labels, see `cross_entropy_sum`.
        positions: `all` only: what is divided by, where samples share rows; None: the positions of `labels`.

    Returns:
        fp32 scalar; 0 for a batch without any target.
    """
    return reduced(cross_entropy_sum(logits, labels, smoothing), labels, reduction, num_items_in_batch, positions)


def target_loss(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    targets: Targets | None,
    reduction: LossReduction,
    num_items_in_batch: Tensor | int | None = None,
    smoothing: float = 0.0,
    positions: int | None = None,
) -> Tensor:
    """`language_model_loss` of the logits that `head` would give, which are computed for trained tokens alone.

    A batch without targets has entries that count nothing: the head runs in every process, whatever its batch holds.

    Args:
        head: of the language model.
        hidden: (B, L, D) last hidden states.
        labels: (B, L), -100 where ignored.
        targets: as of `find_targets`; None: found here, which waits for the device.
        reduction: as above, like the other arguments.
        num_items_in_batch: as above.
        smoothing: as above.
        positions: as above.

    Raises:
        ValueError: there are more or fewer hidden states than labels.
    """
    places, wanted = _on_device(hidden, labels, targets)
    total = summed_loss(head, hidden.flatten(0, 1).index_select(0, places), wanted, smoothing)  # of (n, D)
    return reduced(total, labels, reduction, num_items_in_batch, positions)


def row_totals(head: nn.Module, hidden: Tensor, labels: Tensor, targets: Targets | None) -> Tensor:
    """Summed cross entropy of each row, (B,) in fp32, without smoothing; arguments and errors as of `target_loss`."""
    places, wanted = _on_device(hidden, labels, targets)
    each = token_losses(head, hidden.flatten(0, 1).index_select(0, places), wanted)  # (n,)
    rows = torch.arange(len(labels), device=places.device)[:, None]  # (B, 1)
    return torch.where(places // labels.shape[1] == rows, each, 0).sum(1)  # of (B, n)


def _on_device(hidden: Tensor, labels: Tensor, targets: Targets | None) -> Targets:
    """The targets where the hidden states are; errors as of `target_loss`."""
    if hidden.shape[:2] != labels.shape:
        raise ValueError(
            f"there are hidden states of {tuple(hidden.shape[:2])} positions and labels of {tuple(labels.shape)}; what "
            "drops tokens from a pass with a loss must drop their labels too"
        )
    places, wanted = find_targets(labels) if targets is None else targets
    return Targets(places.to(hidden.device), wanted.to(hidden.device))


def reduced(
    total: Tensor,
    labels: Tensor,
    reduction: LossReduction,
    num_items_in_batch: Tensor | int | None,
    positions: int | None,
) -> Tensor:
    """The summed cross entropy divided as `reduction` says; arguments as of `language_model_loss`."""
    shifted = labels[:, 1:]  # (B, L - 1)
    if reduction is LossReduction.ALL:
        return total / max(1, shifted.numel() if positions is None else positions)
    if num_items_in_batch is None:
        return total / (shifted != IGNORE_INDEX).sum().clamp(min=1)
    return total / num_items_in_batch
