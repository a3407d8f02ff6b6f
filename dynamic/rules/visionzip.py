"""VisionZip (Yang et al., arXiv 2412.04467, section 3.2): what the class token attends to, and merged rests.

Shape letters: n tokens that are judged, C width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dynamic.rules.rule import VARIANTS, ImageRule, ImageView, register
from dynamic.rules.selection import Selection, best
from dynamic.rules.similarity import unit
from llava.errors import FlagError


@register
@dataclass(frozen=True)
class VisionZipRule(ImageRule):
    """Dominant tokens as they are, and contextual tokens, each merged of similar ones among the rest.

    Dominant are those that receive most attention from the class token. Of the rest in raster order, every s-th is a
    target, s as large as the number of contextual tokens admits; each of the others joins the target with the most
    similar keys (mean over the heads, by cosine).

    The paper's tables count the class token as a dominant one (54 + 10 of 64, the class token among the 54). Most LLaVA
    read no class token, so its place goes to one more patch. The paper puts contextual tokens behind all dominant
    ones; here each stays at the place of its target.

    Attributes:
        contextual: their share of the budget, rounded to the nearest number.
        variant: `paper`: a contextual token is the mean of its target and all that joined; `code`: the target plus
            the mean of those, about twice as large.
    """

    name: ClassVar[str] = "visionzip"
    reference: ClassVar[str] = "Yang et al., VisionZip: Longer is Better but Not Necessary, arXiv 2412.04467"
    place: ClassVar[str] = "tower"
    per_tile: ClassVar[bool] = True

    contextual: float = 10 / 64
    variant: str = "paper"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise FlagError(f"--reduce visionzip: variant is '{self.variant}'; known values: {VARIANTS}")
        if not 0 <= self.contextual <= 1:
            raise FlagError(f"--reduce visionzip: contextual is {self.contextual}; give a share from 0 to 1")

    def select(self, image: ImageView, keep: int) -> Selection:
        """Dominant tokens, then targets with the weights of what is merged into them."""
        received = image.received  # (n,)
        contextual = math.floor(keep * self.contextual + 0.5)
        dominant = best(received, keep - contextual)
        if contextual == 0:
            return Selection(dominant)

        # Targets: every s-th of what is left
        is_left = torch.ones_like(received, dtype=torch.bool)
        is_left[dominant] = False
        left = is_left.nonzero().flatten()
        step = len(left) // contextual
        targets = left[: step * contextual : step]
        is_left[targets] = False
        others = is_left.nonzero().flatten()

        # Everybody else joins the most similar target
        keys = unit(image.keys)  # (n, C)
        joined = (keys[others] @ keys[targets].T).argmax(dim=1)  # (others,)
        merge = keys.new_zeros(keep, len(received))
        merge[torch.arange(len(dominant), device=dominant.device), dominant] = 1
        merge[len(dominant) :] = self._weights(targets, others, joined, merge[len(dominant) :])
        return Selection(torch.cat([dominant, targets]), merge)

    def _weights(self, targets: Tensor, others: Tensor, joined: Tensor, weights: Tensor) -> Tensor:
        """`weights` (contextual, n) of zeros, filled in for targets and for what joined each of them."""
        members = joined.bincount(minlength=len(targets)).float()  # (contextual,)
        rows = torch.arange(len(targets), device=targets.device)
        of_target = 1 / (members + 1) if self.variant == "paper" else torch.ones_like(members)
        of_member = 1 / (members + 1) if self.variant == "paper" else 1 / members.clamp(min=1)
        weights[rows, targets] = of_target
        weights[joined, others] = of_member[joined]
        return weights
