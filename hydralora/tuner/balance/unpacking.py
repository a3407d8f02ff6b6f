"""Packed rows in a loss on the routing: every text counts as a sample, as it would in a row of its own.

Shape letters: B batch, T tokens, E experts. The axis `texts` counts the texts of all rows, `places` those of the
longest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hydralora.tuner.calls.inputs import PACKED
from hydralora.tuner.calls.packing import sequence_starts


@dataclass(frozen=True)
class Unpacking:
    """Where the tokens of each text are.

    Attributes:
        index: (texts, places) int, the token's number in the flattened batch.
        member: (texts, places) bool, false behind the end of a text.
        shape: (B, T).
    """

    index: Tensor
    member: Tensor
    shape: tuple[int, int]

    def apart(self, values: Tensor) -> Tensor:
        """(texts, places, ...) of `values` (B, T, ...); what is behind a text is another's and not valid."""
        return values.flatten(0, 1)[self.index.to(values.device)]

    def valid(self, valid: Tensor) -> Tensor:
        """(texts, places) float32 of the mask (B, T) of real tokens."""
        return self.apart(valid) * self.member.to(valid)

    def together(self, values: Tensor) -> Tensor:
        """(B, T, E) of `values` (texts, places, E)."""
        kept = values * self.member.to(values).unsqueeze(-1)
        flat = values.new_zeros(self.shape[0] * self.shape[1], values.shape[-1])
        flat = flat.index_add(0, self.index.to(values.device).flatten(), kept.flatten(0, 1))
        return flat.view(*self.shape, values.shape[-1])


def unpacking(shape: tuple[int, int] | None, mask: Tensor | None, kwargs: Mapping[str, Any]) -> Unpacking | None:
    """How the rows of a call are told apart; None: every row is one text.

    Args:
        shape: (B, T) of its tokens, if known.
        mask: (B, T), false at padding, or None.
        kwargs: its arguments, of which those of packed rows are read.
    """
    given = {name: kwargs[name] for name in PACKED if kwargs.get(name) is not None}
    if shape is None or not given or (mask is not None and tuple(mask.shape) != tuple(shape)):
        return None
    starts = sequence_starts(shape, mask, given, continuous=mask is None)
    if starts is None:
        return None
    rows, columns = shape
    tokens = torch.arange(rows * columns, device=starts.device).view(rows, columns)
    first = tokens[:, :1] + starts  # the number of the first token of its text
    texts = torch.unique(first, return_inverse=True)[1]  # (B, T)
    places = tokens - first
    index = torch.zeros(int(texts.max()) + 1, int(places.max()) + 1, dtype=torch.long, device=starts.device)
    member = torch.zeros_like(index, dtype=torch.bool)
    index[texts, places], member[texts, places] = tokens, True
    return Unpacking(index, member, (rows, columns))
