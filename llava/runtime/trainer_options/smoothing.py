"""Label smoothing of a language model's loss, as transformers' `LabelSmoother` defines it."""

from __future__ import annotations

from torch import Tensor, nn

from llava.constants import IGNORE_INDEX


def cross_entropy_sum(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Summed cross entropy of every position's prediction of the next label, in fp32.

    With smoothing s, a target counts (1 - s) times its own negative log-likelihood and s times the mean of those of the
    whole vocabulary.

    Args:
        logits: (B, L, V), any floating dtype.
        labels: (B, L), -100 where ignored.
        smoothing: share of the target's probability that is spread over the vocabulary.
    """
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        labels[:, 1:].flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=smoothing,
    )


def smoothing_term(
    logits: Tensor, labels: Tensor, smoothing: float, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """What smoothing adds to a loss that is an average of plain cross entropies: fp32 scalar.

    Args:
        logits: (B, L, V).
        labels: (B, L), -100 where ignored.
        smoothing: see `cross_entropy_sum`.
        num_items_in_batch: what the loss was divided by; None: the targets of this micro batch.
    """
    difference = cross_entropy_sum(logits, labels, smoothing) - cross_entropy_sum(logits, labels)
    if num_items_in_batch is None:
        return difference / (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
    return difference / num_items_in_batch
