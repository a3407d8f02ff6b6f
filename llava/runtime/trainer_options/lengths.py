"""The order of `--train_sampling_strategy group_by_length`: rows of similar length in the batches of an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.trainer_pt_utils import get_length_grouped_indices

from llava.errors import FlagError
from llava.runtime.sampling import Order


def lengths_of(dataset: Any) -> Sequence[int]:
    """Lengths of the rows of a data set, which are counted without opening an image.

    Raises:
        FlagError: the data set cannot say them.
    """
    lengths: Sequence[int] | None = getattr(dataset, "lengths", None)
    if lengths is None:
        raise FlagError(
            "--train_sampling_strategy group_by_length: the rows of this data cannot be counted before the run; use "
            "random"
        )
    return lengths


def length_order(lengths: Sequence[int], size: int) -> Order:
    """Draws an epoch as transformers' `LengthGroupedSampler` does.

    Args:
        lengths: of the rows.
        size: rows of an update of one process.
    """
    counted = list(lengths)
    return lambda: list(get_length_grouped_indices(counted, size))
