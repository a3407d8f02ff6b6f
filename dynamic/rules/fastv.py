"""FastV (Chen et al., arXiv 2403.06764): tokens with little attention in an early layer are left out of later ones.

Shape letters: n image tokens that are judged, L positions of a row, D width, C head width, K heads of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dynamic.rules.rule import VARIANTS, LayerRule, RowView, register
from dynamic.rules.selection import Selection, best
from llava.errors import FlagError

SCORES = ("attention", "key_norm")

QUERIES_AT_ONCE = 256
"""Of variant "paper": bounds the attention map in memory."""


@register
@dataclass(frozen=True)
class FastVRule(LayerRule):
    """The tokens with the most attention in layer k - 1, mean over the heads.

    The paper's layer K, counted from 1, is layer k - 1 counted from 0: layers 0 to K - 1 see all tokens in both.
    With K = 2 and 576 tokens in 32 layers, averages of 192 / 128 / 64 keep 166 / 98 / 30.

    Attributes:
        variant: which queries vote. "code": the last token of the prompt, one row of the attention map. "paper"
            (section 4.1): all queries; a token's score is the mean of the attention that it receives from the tokens
            behind it. That costs as much as the attention of one layer without a fused kernel, H L L multiply-adds
            per channel, computed 256 queries at a time.
        score: "attention", or "key_norm": the tokens whose keys in layer k - 1 have the smallest L2 norm over all
            heads, as ViTCoP (arXiv 2601.17818) judges them; needs no attention weights and does not see the question.
    """

    name: ClassVar[str] = "fastv"
    reference: ClassVar[str] = (
        "Chen et al., An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models, ECCV 2024, arXiv 2403.06764"
    )
    layers: ClassVar[tuple[int, ...]] = (2,)

    variant: str = "code"
    score: str = "attention"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise FlagError(f"--reduce fastv: variant is '{self.variant}'; give one of {', '.join(VARIANTS)}")
        if self.score not in SCORES:
            raise FlagError(f"--reduce fastv: score is '{self.score}'; give one of {', '.join(SCORES)}")
        if self.score == "key_norm" and self.variant == "paper":
            raise FlagError("--reduce fastv: variant=paper says which queries vote, and score=key_norm has none")

    def select(self, row: RowView, keep: int) -> Selection:
        """The `keep` best tokens; of equal ones the first."""
        if self.score == "key_norm":
            return Selection(best(-row.keys()[row.image_places].norm(dim=-1), keep))
        return Selection(best(received(row) if self.variant == "paper" else last_row(row), keep))


def last_row(row: RowView, layer: int | None = None) -> Tensor:
    """(n,) attention that the last token of the prompt pays to each image token, mean over the heads.

    Args:
        row: that is judged.
        layer: whose attention, see `RowView.attention`.
    """
    weights = row.attention(row.text_places[-1:], layer=layer)  # (H, 1, L)
    return weights[:, 0, row.image_places].mean(dim=0)


def received(row: RowView) -> Tensor:
    """(n,) attention that each image token receives in layer k - 1, mean over the tokens behind it and the heads."""
    places, length = row.image_places, len(row.hidden)
    total = torch.zeros(len(places), device=places.device)
    for queries in torch.split(torch.arange(int(places[0]) + 1, length, device=places.device), QUERIES_AT_ONCE):
        weights = row.attention(queries)[:, :, places].mean(dim=0)  # (queries, n)
        total += weights.masked_fill(queries[:, None] <= places, 0).sum(dim=0)
    return total / (length - 1 - places).clamp(min=1)  # a token at the end of the row receives nothing
