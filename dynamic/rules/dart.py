"""DART (Wen et al., arXiv 2502.11494): tokens that repeat least of what a few pivots say.

Shape letters: n image tokens that are judged, L positions of a row, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic.rules.budget import largest_remainder
from dynamic.rules.rule import LayerRule, RowView, register
from dynamic.rules.selection import Selection
from llava.errors import FlagError


@register
@dataclass(frozen=True)
class DartRule(LayerRule):
    """Pivots, and for each of them the tokens with the lowest cosine to it.

    Pivots are the image tokens and the tokens of the last instruction with the largest L1 norm of their keys in layer
    k - 1. Image pivots stay. Then each pivot, image pivots first and larger norms first, adds those of lowest cosine
    that nobody has added yet, compared by the input of layer k behind the last norm of the decoder. No attention
    weights are needed.

    The number that stays is exact: image pivots count, no token is added twice, and what is left of the budget is
    shared out among all pivots evenly, the first ones taking what does not divide. A budget below the number of image
    pivots keeps that many of them.

    Attributes:
        image_pivots: how many.
        text_pivots: how many; fewer if the instruction is shorter.
    """

    name: ClassVar[str] = "dart"
    reference: ClassVar[str] = (
        "Wen et al., Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, "
        "EMNLP 2025, arXiv 2502.11494"
    )
    layers: ClassVar[tuple[int, ...]] = (2,)

    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        if min(self.image_pivots, self.text_pivots) < 0 or not self.image_pivots + self.text_pivots:
            raise FlagError(
                f"--reduce dart: image_pivots is {self.image_pivots} and text_pivots {self.text_pivots}; give 0 or "
                "more, and at least one pivot in all"
            )

    def select(self, row: RowView, keep: int) -> Selection:
        """Pivot by pivot."""
        norms = row.keys().abs().sum(dim=-1)  # (L,)
        chosen = largest(norms[row.image_places], min(self.image_pivots, keep))  # indices of image tokens
        pivots = torch.cat(
            [row.image_places[chosen], row.text_places[largest(norms[row.text_places], self.text_pivots)]]
        )
        states = F.normalize(row.normed().float(), dim=-1)
        cosine = states[pivots] @ states[row.image_places].T  # (pivots, n)

        left = keep - len(chosen)
        for similar, quota in zip(
            cosine, largest_remainder([1] * len(pivots), [left] * len(pivots), left), strict=True
        ):
            added = largest(-similar.index_fill(0, chosen, torch.inf), quota)
            chosen = torch.cat([chosen, added])
        return Selection(chosen)


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices (at most count,) of the highest of `scores` (n,), highest first; of equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:count]
