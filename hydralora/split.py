"""Weights that a library has split over processes: here they are a part of the matrix, or nothing at all.

Training works on them through the modules' own calls. What reads or writes whole matrices does not.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def is_split(weight: Tensor) -> bool:
    """Whether this process holds only a part of a weight: a DTensor of FSDP2, or an empty share of FSDP1 or ZeRO-3."""
    return hasattr(weight, "full_tensor") or weight.numel() == 0


def refuse_split(weights: Iterable[Tensor], what: str, instead: str) -> None:
    """Stop what needs whole weights, before a number is made.

    Args:
        weights: that are needed.
        what: cannot be done, for the message.
        instead: what to do.

    Raises:
        ValueError: one of them is split.
    """
    if any(is_split(weight) for weight in weights):
        raise ValueError(f"{what}: the weights of the model are split over processes. {instead}")
