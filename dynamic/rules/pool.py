"""Means of neighboring patches: a baseline that is above many published rules (Wen et al., arXiv 2502.11501).

Shape letters: n tokens that are judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dynamic.rules.cells import cells, central
from dynamic.rules.rule import ImageRule, ImageView, register
from dynamic.rules.selection import Selection


@register
@dataclass(frozen=True)
class PoolRule(ImageRule):
    """The mean of each of `keep` cells (see `cells.py`) at the place of the patch in its middle.

    Where the sides of the grid are multiples of the sides of the lattice, this is adaptive mean pooling; elsewhere
    torch's lets cells overlap and counts patches on edges twice, while here each patch counts once.
    """

    name: ClassVar[str] = "pool"
    reference: ClassVar[str] = "Wen et al., Token Pruning in Multimodal LLMs, arXiv 2502.11501 (as a baseline)"
    place: ClassVar[str] = "features"
    per_tile: ClassVar[bool] = True

    def select(self, image: ImageView, keep: int) -> Selection:
        """Means as weights that sum to 1."""
        places = image.places
        cell = cells(places, keep)  # (n,)
        members = torch.arange(keep)[:, None] == cell  # (keep, n)
        merge = members / members.sum(dim=1, keepdim=True)
        return Selection(central(places, cell).to(places.device), merge.to(places.device))
