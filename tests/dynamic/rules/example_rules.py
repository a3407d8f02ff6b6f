"""Two rules that somebody else might publish: one merges in front of the decoder, one drops before a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynamic.rules.rule import ImageRule, ImageView, LayerRule, RowView, register
from dynamic.rules.selection import Selection, best


@register
@dataclass(frozen=True)
class Neighbors(ImageRule):
    """Evenly spread tokens, each the mean of itself and the one behind it."""

    name = "example-neighbors"
    reference = "nobody's"
    place = "tower"

    def select(self, image: ImageView, keep: int) -> Selection:
        n = len(image.received)
        kept = torch.arange(keep) * n // keep
        merge = torch.zeros(keep, n)
        merge[torch.arange(keep), kept] += 0.5
        merge[torch.arange(keep), (kept + 1) % n] += 0.5
        return Selection(kept, merge)


@register
@dataclass(frozen=True)
class LastRow(LayerRule):
    """What the last token of the prompt has looked at most in the layer before."""

    name = "example-last-row"
    reference = "nobody's"
    layers = (1,)

    def select(self, row: RowView, keep: int) -> Selection:
        seen = row.attention(row.text_places[-1:]).mean(dim=(0, 1))[row.image_places]
        return Selection(best(seen, keep))

    def counts(self, keep: int, tokens: int, layers: tuple[int, ...]) -> list[int]:  # type: ignore[override]
        return [keep + (len(layers) - 1 - at) * (tokens - keep) // len(layers) for at in range(len(layers))]
