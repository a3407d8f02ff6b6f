"""Spans of many samples as padded tables of positions, to gather tokens by and to write decisions back.

A batch mixes samples with any number of images and with texts of any length, padded on either side; all of it is
indexed by tensors, without loops over tokens.

Shape letters: B batch, L sequence length, D width, R spans, n longest span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Range = tuple[int, int]
"""Half-open range of positions: start, end."""


class Parts(Protocol):
    """Where the parts of one sample lie in its sequence; the segments of llava are such."""

    @property
    def images(self) -> tuple[Range, ...]:
        """Every image."""

    @property
    def last_instruct(self) -> Range:
        """What the user said last."""

    @property
    def answer(self) -> Range:
        """The last answer."""


@dataclass(frozen=True)
class SpanTable:
    """Where the tokens of R spans lie; there is at least one row, with at least one place.

    Attributes:
        samples: (R,) int64, the sample of each span.
        starts: (R,) int64.
        lengths: (R,) int64, tokens of each span.
        weights: (R,) float32 that turn a sum over spans into a mean over samples: a sample's spans share 1 / B.
        offsets: (n,) int64, 0, 1, ...
        valid: (R, n) bool, False behind the end of a span.
    """

    samples: Tensor
    starts: Tensor
    lengths: Tensor
    weights: Tensor
    offsets: Tensor
    valid: Tensor


def span_table(spans: Sequence[Sequence[Range]], device: torch.device) -> SpanTable:
    """Table of the spans of each sample.

    Without any span it has one row without tokens and of weight 0: predictors then run on padding, so that all
    processes of a distributed run call the same modules whatever their batch holds.
    """
    rows = [(sample, start, end - start) for sample, mine in enumerate(spans) for start, end in mine] or [(0, 0, 0)]
    shares = [1 / (len(mine) * len(spans)) for mine in spans for _ in mine] or [0.0]
    samples, starts, lengths = torch.tensor(rows, device=device).unbind(dim=1)
    weights = torch.tensor(shares, device=device)
    longest = max(1, *(length for *_, length in rows))
    offsets = torch.arange(longest, device=device)
    return SpanTable(samples, starts, lengths, weights, offsets, offsets < lengths[:, None])


def images(samples: Sequence[Parts], device: torch.device) -> SpanTable:
    """Every image of every sample."""
    return span_table([sample.images for sample in samples], device)


def answers(samples: Sequence[Parts], device: torch.device) -> SpanTable:
    """The last answer of each sample."""
    return span_table([[sample.answer] for sample in samples], device)


def instructions(samples: Sequence[Parts], device: torch.device) -> SpanTable:
    """The last instruction of each sample."""
    return span_table([[sample.last_instruct] for sample in samples], device)


def gather(hidden: Tensor, table: SpanTable) -> Tensor:
    """Tokens (R, n, D) of the spans, zero behind their ends; `hidden` is (B, L, D)."""
    positions = (table.starts[:, None] + table.offsets).where(table.valid, 0)  # (R, n)
    flat = (table.samples[:, None] * hidden.shape[1] + positions).flatten()
    tokens = hidden.flatten(0, 1).index_select(0, flat).unflatten(0, positions.shape)  # (R, n, D)
    return tokens.masked_fill(~table.valid[..., None], 0)


def write(values: Tensor, table: SpanTable, new: Tensor) -> Tensor:
    """`values` (B, L) with `new` (R, n) at the places of the spans; differentiable in both."""
    batch, length = values.shape
    # What lies behind the end of a span goes into one place too many, which is cut off again.
    positions = table.samples[:, None] * length + table.starts[:, None] + table.offsets  # (R, n)
    padded = torch.cat([values.flatten(), values.new_zeros(1)])
    flat = positions.where(table.valid, batch * length)
    return padded.index_put((flat.flatten(),), new.flatten().to(values.dtype))[:-1].view(batch, length)
