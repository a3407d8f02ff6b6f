"""VisPruner (Zhang et al., arXiv 2412.01818 v3): half by attention of the class token, half by removing duplicates.

Shape letters: n tokens that are judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dynamic.rules.rule import ImageRule, ImageView, register
from dynamic.rules.selection import Selection, best
from dynamic.rules.similarity import cosine
from llava.errors import FlagError


@register
@dataclass(frozen=True)
class VisPrunerRule(ImageRule):
    """Important tokens, and of the others those that have no double.

    Half of the budget, rounded down, goes to the tokens that receive most attention from the class token. The others
    are thinned out in rounds until they fit: every second one, the first included, is compared by cosine of the
    features of the tower with those between; the most similar go, `step` in a round at most. What is left of a round
    is in raster order again before the next.

    Attributes:
        step: tokens removed in a round at most.
    """

    name: ClassVar[str] = "vispruner"
    reference: ClassVar[str] = "Zhang et al., VisPruner: Beyond Text-Visual Attention, arXiv 2412.01818"
    place: ClassVar[str] = "features"
    per_tile: ClassVar[bool] = True

    step: int = 8

    def __post_init__(self) -> None:
        if self.step < 1:
            raise FlagError(f"--reduce vispruner: step is {self.step}; at least one token goes in a round")

    def select(self, image: ImageView, keep: int) -> Selection:
        """Important tokens, then what the rounds leave."""
        received = image.received  # (n,)
        important = best(received, keep // 2)
        stays = torch.ones_like(received, dtype=torch.bool)
        stays[important] = False
        left = stays.nonzero().flatten()  # (left,)

        similarity = cosine(image.tower)  # (n, n)
        wanted = keep - len(important)
        while (surplus := len(left) - wanted) > 0:
            even, odd = left[::2], left[1::2]
            doubles = similarity[even[:, None], odd].amax(dim=1)  # (even,)
            going = even[best(doubles, min(self.step, surplus, len(even)))]
            stays[going] = False
            left = stays.nonzero().flatten()
        return Selection(torch.cat([important, left]))
