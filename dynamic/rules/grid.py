"""Evenly spread patches, whatever they show: a baseline (Wen et al., arXiv 2502.11501)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dynamic.rules.cells import cells, central
from dynamic.rules.rule import ImageRule, ImageView, register
from dynamic.rules.selection import Selection


@register
@dataclass(frozen=True)
class GridRule(ImageRule):
    """Of each of `keep` cells (see `cells.py`) the patch in its middle; where two or four share it, the first."""

    name: ClassVar[str] = "grid"
    reference: ClassVar[str] = "Wen et al., Token Pruning in Multimodal LLMs, arXiv 2502.11501 (as a baseline)"
    place: ClassVar[str] = "features"
    per_tile: ClassVar[bool] = True

    def select(self, image: ImageView, keep: int) -> Selection:
        """The middle of each cell."""
        places = image.places
        return Selection(central(places, cells(places, keep)).to(places.device))
