"""A row in front of a decoder layer, of random numbers.

Shape letters: L positions, D width, H attention heads, K heads of keys, C head width, n image tokens.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH, HEADS, KEY_HEADS, HEAD_WIDTH = 12, 4, 2, 3


@dataclass(frozen=True)
class RandomRow:
    """A `RowView` of numbers that are drawn.

    Attributes:
        seed: of all numbers; those of each layer, with and without rotary embedding, are others.
        images: tokens of each image.
        text: tokens of the last instruction.
        layer: k.
        between: tokens of text in front of, between and behind the images.
        same: the states, queries and keys of all positions are equal.
    """

    seed: int
    images: tuple[int, ...] = (24,)
    text: int = 6
    layer: int = 2
    between: int = 2
    same: bool = False

    def _draw(self, *shape: int, of: int) -> Tensor:
        """Numbers of `shape`, the first axis being positions."""
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(100 * self.seed + of))
        return drawn[:1].expand_as(drawn) if self.same else drawn

    @property
    def length(self) -> int:
        """L."""
        return sum(self.images) + self.between * (len(self.images) + 1) + self.text

    @functools.cached_property
    def hidden(self) -> Tensor:
        """(L, D)."""
        return self._draw(self.length, WIDTH, of=0)

    @functools.cached_property
    def image_places(self) -> Tensor:
        """(n,)."""
        places: list[int] = []
        start = self.between
        for tokens in self.images:
            places += range(start, start + tokens)
            start += tokens + self.between
        return torch.tensor(places)

    @functools.cached_property
    def text_places(self) -> Tensor:
        """(text,)."""
        return torch.arange(self.length - self.text, self.length)

    def heads_of(self, layer: int, rotary: bool) -> tuple[Tensor, Tensor]:
        """Queries (L, H, C) and keys (L, K, C)."""
        at = 10 + 4 * layer + 2 * rotary
        return (
            self._draw(self.length, HEADS, HEAD_WIDTH, of=at),
            self._draw(self.length, KEY_HEADS, HEAD_WIDTH, of=at + 1),
        )

    def attention(self, queries: Tensor, *, layer: int | None = None, rotary: bool = True) -> Tensor:
        """(H, queries, L)."""
        q, k = self.heads_of(self.layer - 1 if layer is None else layer, rotary)
        k = k.repeat_interleave(HEADS // KEY_HEADS, dim=1)  # (L, H, C)
        scores: Tensor = torch.einsum("qhc,lhc->hql", q[queries], k) / math.sqrt(HEAD_WIDTH)
        future = torch.arange(self.length) > queries[:, None]
        return scores.masked_fill(future, -torch.inf).softmax(dim=-1)

    def keys(self, *, layer: int | None = None) -> Tensor:
        """(L, K C)."""
        return self.heads_of(self.layer - 1 if layer is None else layer, True)[1].flatten(1)

    def normed(self) -> Tensor:
        """(L, D)."""
        return torch.nn.functional.normalize(self.hidden, dim=-1) * torch.linspace(0.5, 2, WIDTH)

    def entered(self) -> tuple[Tensor, Tensor]:
        """(images, D), some of which are gone by now, and (text, D)."""
        images = self._draw(len(self.image_places) + 5, WIDTH, of=1)
        return images, self._draw(self.text, WIDTH, of=2)
