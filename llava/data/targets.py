"""The trained tokens of a batch whose images are spliced in: which positions predict them, padded to a bucket.

The loss needs the hidden states of these positions alone. Searching them on a GPU makes the host wait and cuts a
compiled graph in two, so it is done where a batch is put together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX

BUCKET = 64
"""Smallest number of positions, those of a batch without any target included."""


class Targets(NamedTuple):
    """What is trained in a batch.

    Attributes:
        positions: (n,) int64, places in the flattened (B L) whose prediction counts, in their order; then 0 up to the
            length of the bucket, so there is always one.
        labels: (n,) int64, what each of them predicts; -100 where `positions` is padded.
    """

    positions: Tensor
    labels: Tensor


def bucket(count: int) -> int:
    """The smallest permitted length for `count` targets: steps of 64 to 1024, then of an eighth of the power of two."""
    step = max(BUCKET, 1 << max(0, count.bit_length() - 4))
    return max(BUCKET, -(-count // step) * step)


def find_targets(labels: Tensor) -> Targets:
    """The targets of labels (B, L), -100 where ignored. On a device, this waits for it."""
    following = torch.full_like(labels, IGNORE_INDEX)
    following[:, :-1] = labels[:, 1:]
    places = (following.flatten() != IGNORE_INDEX).nonzero().flatten()
    size = bucket(len(places))
    positions, wanted = places.new_zeros(size), labels.new_full((size,), IGNORE_INDEX)
    positions[: len(places)], wanted[: len(places)] = places, following.flatten()[places]
    return Targets(positions, wanted)
