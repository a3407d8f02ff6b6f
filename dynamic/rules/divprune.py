"""DivPrune (Alvar et al., arXiv 2503.02175, section 3): tokens as different from each other as possible.

Shape letters: n tokens that are judged, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dynamic.rules.rule import ImageRule, ImageView, register
from dynamic.rules.selection import Selection
from dynamic.rules.similarity import cosine, distinctiveness


@register
@dataclass(frozen=True)
class DivPruneRule(ImageRule):
    """Greedy max-min diversity on projected features, with 1 - cosine as distance.

    First the token whose nearest neighbor is farthest, then again and again the one that is farthest from the nearest
    of the chosen. Paper and published code agree.

    Attributes:
        cen: Cen-Prune's change: features without their mean, and distances weighted by distinctiveness
            (`similarity.py`), the first choice included.
    """

    name: ClassVar[str] = "divprune"
    reference: ClassVar[str] = "Alvar et al., DivPrune: Diversity-based Visual Token Pruning, arXiv 2503.02175"
    place: ClassVar[str] = "features"
    modifiers: ClassVar[Mapping[str, Mapping[str, Any]]] = {"cen": {"cen": True}}

    cen: bool = False

    def select(self, image: ImageView, keep: int) -> Selection:
        """One token per step; its distances to all others are a row of the matrix."""
        similarity = cosine(image.projected, centered=self.cen)  # (n, n)
        distance = 1 - similarity
        weight = distinctiveness(similarity) if self.cen else torch.ones_like(distance[0])  # (n,)

        # A token has no distance to itself, so no chosen one is chosen again
        alone = distance.clone().fill_diagonal_(torch.inf)
        nearest = alone.amin(dim=1)  # (n,) to any other, from the second step on to the chosen
        taken = torch.zeros_like(nearest, dtype=torch.bool)
        kept = torch.empty(keep, dtype=torch.long, device=distance.device)
        for step in range(keep):
            pick = (weight * nearest).masked_fill(taken, -torch.inf).argmax(dim=0, keepdim=True)  # (1,)
            row = distance.index_select(0, pick)[0]  # (n,); an index of one number would be waited for
            nearest = row if step == 0 else torch.minimum(nearest, row)
            taken.index_fill_(0, pick, True)
            kept[step : step + 1] = pick
        return Selection(kept)
