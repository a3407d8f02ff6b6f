"""SCOPE (Deng et al., arXiv 2510.24214): tokens that stand for many others, weighted by the class token's attention.

Shape letters: n tokens that are judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dynamic.rules.rule import ImageRule, ImageView, register
from dynamic.rules.selection import Selection
from dynamic.rules.similarity import cosine
from llava.errors import FlagError


@register
@dataclass(frozen=True)
class ScopeRule(ImageRule):
    """Greedy coverage on features of the tower, by cosine.

    Each step takes the token whose gain times attention**alpha is highest. Its gain is by how much it raises the
    similarity of each token that is not chosen yet to its most similar chosen token, summed; before the first step
    that similarity counts as 0. Attention is that of the class token. By tile, since attention is shared out within
    one.

    Attributes:
        alpha: exponent of the attention; 0 looks at coverage alone.
    """

    name: ClassVar[str] = "scope"
    reference: ClassVar[str] = "Deng et al., SCOPE: Saliency-Coverage Oriented Token Pruning, arXiv 2510.24214"
    place: ClassVar[str] = "features"
    per_tile: ClassVar[bool] = True

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise FlagError(f"--reduce scope: alpha is {self.alpha}; give 0 or more")

    def select(self, image: ImageView, keep: int) -> Selection:
        """One token per step."""
        similarity = cosine(image.tower)  # (n, n)
        weight = image.received.float() ** self.alpha  # (n,)
        covered = torch.zeros_like(weight)
        taken = torch.zeros_like(weight, dtype=torch.bool)
        kept = torch.empty(keep, dtype=torch.long, device=weight.device)
        for step in range(keep):
            gain = (similarity - covered).clamp_(min=0).sum(dim=1)  # (n,)
            pick = (gain * weight).masked_fill(taken, -torch.inf).argmax(dim=0, keepdim=True)  # (1,)
            # An index of one number would be waited for.
            covered = torch.maximum(covered, similarity.index_select(0, pick)[0])
            covered.index_fill_(0, pick, torch.inf)  # what is chosen needs no more cover
            taken.index_fill_(0, pick, True)
            kept[step : step + 1] = pick
        return Selection(kept)
