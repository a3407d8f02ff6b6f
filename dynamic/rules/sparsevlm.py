"""SparseVLM (Zhang et al., arXiv 2410.04417), its second version: tokens that the relevant words attend to.

Shape letters: n image tokens that are judged, D width, H attention heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor

from dynamic.rules.rule import LayerRule, RowView, register
from dynamic.rules.selection import Selection, best
from llava.errors import FlagError

TOKENS = 576
TABLES = ((0, 0, 0), (66, 34, 20), (238, 108, 60), (300, 200, 118), (TOKENS, TOKENS, TOKENS))
"""Published tokens after each of three stages of 576, for 64, 128 and 192; nothing and everything at the ends."""


@register
@dataclass(frozen=True)
class SparseVlmRule(LayerRule):
    """The tokens that raters attend to most in layer k - 1, mean over raters and over the heads that look at images.

    Raters are the tokens of the last instruction that image tokens point at (section 3): see `raters`. Attention is
    that of queries and keys without rotary embedding, of the heads with the most attention from raters to image tokens.
    Tokens are not recycled and keep their positions, as in the version "SparseVLM+" of the published code.

    That code cuts behind layers 2, 6 and 15, so this rule acts before 3, 7 and 16. The paper's adaptive count (by the
    rank of the attention map) is in neither version of the code; counts follow its tables, see `counts`. Averages
    that count a layer in full if all of it is computed are 207 / 144 / 82 for the tables of 192 / 128 / 64; `--keep
    avg:192` is 192 by that measure, hence fewer tokens than the published table.

    Attributes:
        heads: share of the heads that counts, rounded and at least one; published are 14 of 32.
    """

    name: ClassVar[str] = "sparsevlm"
    reference: ClassVar[str] = (
        "Zhang et al., SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, ICML "
        "2025, arXiv 2410.04417"
    )
    layers: ClassVar[tuple[int, ...]] = (3, 7, 16)

    heads: float = 14 / 32

    def __post_init__(self) -> None:
        if not 0 < self.heads <= 1:
            raise FlagError(f"--reduce sparsevlm: heads is {self.heads}; give a share above 0 and at most 1")

    def select(self, row: RowView, keep: int) -> Selection:
        """The `keep` best tokens; of equal ones the first."""
        chosen = row.text_places[raters(*row.entered())]
        weights = row.attention(chosen, rotary=False)[:, :, row.image_places]  # (H, raters, n)
        count = max(1, round(self.heads * len(weights)))
        looking = best(weights.sum(dim=(1, 2)), count)
        return Selection(best(weights[looking].mean(dim=(0, 1)), keep))

    def counts(self, keep: int, tokens: int, layers: Sequence[int]) -> list[int]:
        """The published tables, and straight lines between them, in shares of `tokens`; rounded down.

        Exact at the tables of 576 tokens, and no count falls as `keep` grows. Of another number of stages than three
        the first and last one are those of the table and the others evenly in between; one alone keeps `keep`.
        """
        column = [interpolated(Fraction(keep * TOKENS, tokens), at) for at in range(3)]
        found = []
        for stage in range(len(layers)):
            at = Fraction(2 * stage, len(layers) - 1) if len(layers) > 1 else Fraction(2)
            low = min(int(at), 1)
            share = column[low] + (at - low) * (column[low + 1] - column[low])
            found.append(math.floor(share * tokens / TOKENS))
        return found


def interpolated(last: Fraction, stage: int) -> Fraction:
    """Tokens of 576 after `stage` (0 to 2) where `last` are left in the end."""
    high = next(at for at in range(1, len(TABLES)) if last <= TABLES[at][2])
    (start, start_last), (end, end_last) = ((TABLES[at][stage], TABLES[at][2]) for at in (high - 1, high))
    return start + (last - start_last) * Fraction(end - start, end_last - start_last)


def raters(images: Tensor, text: Tensor) -> Tensor:
    """Which tokens of a text rate image tokens, (text,) bool.

    Each image token shares itself out over the text, softmax of its dot products. Raters receive more than the mean;
    if none does, since all receive the same, all of them rate.

    Args:
        images: (n, D), as they enter the decoder.
        text: (text, D).
    """
    received = (images.float() @ text.float().T).softmax(dim=-1).mean(dim=0)  # (text,)
    found = received > received.mean()
    return found if bool(found.any()) else ~found
