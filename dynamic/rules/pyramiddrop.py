"""PyramidDrop (Xing et al., arXiv 2410.17247): in stages, each with a share of the tokens of the one in front.

Shape letters: n image tokens that are judged, H attention heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dynamic.rules.fastv import last_row
from dynamic.rules.rule import LayerRule, RowView, register
from dynamic.rules.selection import Selection, best


@register
@dataclass(frozen=True)
class PyramidDropRule(LayerRule):
    """The tokens that the last token of the prompt attends to most in layer k itself, mean over the heads.

    Its query and their keys are computed by layer k's own norm, projections and rotary embedding before that layer
    runs (section 3.2), so what the layer drops never enters it.

    From stage i on, floor(lambda^i n) of n tokens stay. The budget is what stays after the last of s stages, and lambda
    = (last / n)^(1 / s): a share of 0.125 is the paper's 0.5, 0.25 and 0.125. Averages depend on where the stages are.
    Before layers 8, 16, 24 of 32 no lambda reaches less than 144 of 576 tokens, with a token that stays 163.5. For less
    write `pyramiddrop@2,8,16`, as the authors advise; 192 / 128 / 64 are lambda = 0.560 / 0.420 / 0.192 there.

    The published code renumbers positions at each stage (`--positions renumber`).
    """

    name: ClassVar[str] = "pyramiddrop"
    reference: ClassVar[str] = (
        "Xing et al., PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy "
        "Reduction, CVPR 2025, arXiv 2410.17247"
    )
    layers: ClassVar[tuple[int, ...]] = (8, 16, 24)

    def select(self, row: RowView, keep: int) -> Selection:
        """The `keep` best tokens; of equal ones the first."""
        return Selection(best(last_row(row, layer=row.layer), keep))

    def counts(self, keep: int, tokens: int, layers: Sequence[int]) -> list[int]:
        """Computed in whole numbers: floor(lambda^i n) is the s-th root of keep^i n^(s - i), rounded down."""
        stages = len(layers)
        return [root(keep**stage * tokens ** (stages - stage), stages) for stage in range(1, stages + 1)]


def root(number: int, degree: int) -> int:
    """The largest whole number whose power of `degree` is at most `number`."""
    found: int = round(number ** (1 / degree))
    while found**degree > number:
        found -= 1
    while (found + 1) ** degree <= number:
        found += 1
    return found
