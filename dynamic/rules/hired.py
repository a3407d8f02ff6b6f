"""HiRED (Arif et al., arXiv 2408.10945, section 4): attention of the class token, and a budget for each tile.

Shape letters: n tokens that are judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dynamic.rules.budget import largest_remainder
from dynamic.rules.regions import WHOLE, Region
from dynamic.rules.rule import ImageRule, ImageView, register
from dynamic.rules.selection import Selection, best
from llava.errors import FlagError


@register
@dataclass(frozen=True)
class HiredRule(ImageRule):
    """The tokens of a tile that receive most attention from the class token; of one tile, FasterVLM's rule.

    Of an image in tiles, the image in small gets `alpha` of the budget. The others share the rest by what they show:
    of the patches of the image in small, as many as it may keep that receive most attention in the first block are
    counted in the tile that shows the same place. All shares are rounded by largest remainder, so the budget is exact;
    the published code rounds down and loses tokens.

    Attributes:
        alpha: share of the image in small.
    """

    name: ClassVar[str] = "hired"
    reference: ClassVar[str] = "Arif et al., HiRED: Attention-Guided Token Dropping, arXiv 2408.10945"
    place: ClassVar[str] = "features"
    per_tile: ClassVar[bool] = True

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise FlagError(f"--reduce hired: alpha is {self.alpha}; give a share from 0 to 1")

    def select(self, image: ImageView, keep: int) -> Selection:
        """The `keep` highest."""
        return Selection(best(image.received, keep))

    def quotas(self, tiles: Sequence[ImageView], sizes: Sequence[int], keep: int) -> list[int]:
        """By the early attention of the image in small.

        By size where there is none, since an earlier rule has dropped all of it, or where tiles have no layout.
        """
        regions = [tile.region for tile in tiles[1:]]
        layout = [region for region in regions if region is not None]
        if tiles[0].region != WHOLE or len(layout) < len(regions):
            return super().quotas(tiles, sizes, keep)
        small, rest = largest_remainder([self.alpha, 1 - self.alpha], [sizes[0], sum(sizes[1:])], keep)
        return [small, *largest_remainder(_seen_in(tiles[0], layout, small), sizes[1:], rest)]


def _seen_in(small: ImageView, regions: Sequence[Region], count: int) -> list[int]:
    """How many of the `count` most attended patches of the image in small have their middle in each region."""
    height, width = small.grid
    chosen = small.places[best(small.received_early, count)].tolist()
    middles = [((row + 0.5) / height, (column + 0.5) / width) for row, column in chosen]
    return [sum(top <= y < bottom and left <= x < right for y, x in middles) for top, left, bottom, right in regions]
