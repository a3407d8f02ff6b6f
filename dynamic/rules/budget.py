"""One unit of budget for all rules: how many image tokens stay, as a share, a number, or an average over the layers.

The layer before which tokens are dropped is the first that works on fewer; the layers in front of it count in full, as
in FastV's own average (arXiv 2403.06764). Shares and numbers are of one image; of an image in tiles, of all its tiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from llava.errors import FlagError

POSITIONS = ("original", "renumber")
"""Which positions the tokens that are left have: their own, or counted from 0."""


@dataclass(frozen=True)
class Keep:
    """A budget as it was asked for.

    Attributes:
        value: a share from 0 to 1, or a number of tokens.
        kind: `share`, `count`, or `average`: tokens on average over the decoder's layers.
    """

    value: float
    kind: str

    @classmethod
    def parse(cls, text: str) -> Keep:
        """`0.25`, `128` or `avg:128`.

        Raises:
            FlagError: it is neither.
        """
        match = re.fullmatch(r"(avg:)?(\d+(?:\.\d+)?)", text.strip())
        if match is None:
            raise FlagError(
                f"--keep {text}: give a share as 0.25, tokens of an image as 128, or avg:128 for an average"
            )
        value = float(match.group(2))
        kind = "average" if match.group(1) else "share" if "." in text else "count"
        if not math.isfinite(value) or value <= 0 or (kind == "share" and value > 1) or (kind != "share" and value < 1):
            raise FlagError(f"--keep {text}: a share is above 0 and at most 1.0, a number of tokens at least 1")
        if kind == "count" and value != int(value):
            raise FlagError(f"--keep {text}: a number of tokens is whole")
        return cls(value, kind)

    def __str__(self) -> str:
        number = repr(self.value) if self.kind == "share" else f"{self.value:g}"
        return f"avg:{number}" if self.kind == "average" else number

    def count(self, tokens: int) -> int:
        """How many of the `tokens` of an image stay where this budget is reached; not for averages.

        A share is rounded down as in Dynamic-LLaVA, and one token always stays.
        """
        if self.kind == "average":
            raise ValueError("an average is solved by `solve_average`")
        wanted = int(tokens * self.value) if self.kind == "share" else int(self.value)
        return min(tokens, max(1, wanted))


def average(tokens: int, counts: Sequence[int], starts: Sequence[int], layers: int) -> float:
    """Image tokens of a layer on average.

    Args:
        tokens: of the image.
        counts: that stay from each of `starts` on.
        starts: layers before which tokens are dropped, ascending; 0 for rules in front of the decoder.
        layers: of the decoder.
    """
    bounds = [*starts, layers]
    total = tokens * bounds[0]
    for count, start, end in zip(counts, bounds, bounds[1:], strict=False):
        total += count * (end - start)
    return total / layers


def solve_average(
    wanted: float, tokens: int, counts: Callable[[int], Sequence[int]], starts: Sequence[int], layers: int
) -> int:
    """The last count of a rule whose average comes closest to `wanted`, as published counts do; of two the lower one.

    Args:
        wanted: tokens on average.
        tokens: of the image.
        counts: of a rule for a last count, not falling as that grows.
        starts: see `average`.
        layers: of the decoder.

    Raises:
        FlagError: even a single token is more, or the average is above all tokens; names the least one.
    """
    wanted = min(wanted, tokens)  # as a number of tokens above those of an image keeps all of them
    least = average(tokens, counts(1), starts, layers)
    if wanted < least:
        raise FlagError(
            f"--keep avg:{wanted:g}: before layers {list(starts)} of {layers} this rule reaches averages from "
            f"{least:.1f} to {tokens}; drop earlier, or keep more"
        )
    low, high = 1, tokens  # low fits, and nothing above high is asked for
    while low < high:
        middle = (low + high + 1) // 2
        if average(tokens, counts(middle), starts, layers) <= wanted:
            low = middle
        else:
            high = middle - 1
    above = min(low + 1, tokens)
    over, under = (abs(average(tokens, counts(last), starts, layers) - wanted) for last in (above, low))
    return above if over < under else low


def largest_remainder(weights: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """`total` shared out in proportion to `weights`, none above its size; what rounding leaves goes by remainders.

    What is above a size is shared out among the others in the same proportion. Of equal remainders the first one is
    served first. Weights that are all zero count as equal.
    """
    total = min(total, sum(sizes))
    exact = [Fraction(weight) for weight in weights]  # equal remainders compare as equal
    shares = [Fraction(0)] * len(sizes)
    open_ = list(range(len(sizes)))
    left = Fraction(total)
    while open_:
        mass = sum(exact[index] for index in open_)
        for index in open_:
            shares[index] = left * exact[index] / mass if mass else left / len(open_)
        full = [index for index in open_ if shares[index] > sizes[index]]
        if not full:
            break
        for index in full:
            shares[index] = Fraction(sizes[index])
            left -= sizes[index]
        open_ = [index for index in open_ if index not in full]
    given = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda index: (given[index] - shares[index], index))
    for index in by_remainder[: total - sum(given)]:
        given[index] += 1
    return given
