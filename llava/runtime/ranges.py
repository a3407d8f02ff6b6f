"""What the numbers of options may be, said once for each option and checked before anything is loaded.

NaN is never a value, and infinity only where an option says so. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava.errors import FlagError


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes; None, which stands for an option that was not given, passes.

    Attributes:
        least: smallest number.
        most: largest number.
        above: `least` itself is excluded.
        below: `most` itself is excluded.
        infinite: infinity is a value.
        hint: what to do, or what a special value means.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    infinite: bool = False
    hint: str = ""

    def __contains__(self, value: float) -> bool:
        """True if the option may have this number."""
        if value != value or (value in (-math.inf, math.inf) and not self.infinite):  # an int may exceed every float
            return False
        high_enough = value > self.least if self.above else value >= self.least
        return high_enough and (value < self.most if self.below else value <= self.most)

    @property
    def words(self) -> str:
        """The range in words: "at least 0 and less than 1"."""
        parts = []
        if not math.isinf(self.least):
            parts.append(f"{'more than' if self.above else 'at least'} {self.least:g}")
        if not math.isinf(self.most):
            parts.append(f"{'less than' if self.below else 'at most'} {self.most:g}")
        return " and ".join(parts) or "a finite number"

    def __str__(self) -> str:
        """What a message says the number must be."""
        return f"must be {self.words}"

    def problem(self, flag: str, value: Any) -> str | None:
        """One line that names flag and value, or None if there is nothing wrong."""
        if value is None or isinstance(value, bool) or not isinstance(value, int | float) or value in self:
            return None
        return f"{flag} {value}: {self}" + (f"; {self.hint}" if self.hint else "")


FINITE = Range()
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
COUNT = Range(1)
PROBABILITY = Range(0, 1, below=True)
"""Of dropping something: with 1 nothing would be left."""


def range_problems(options: Any, ranges: Mapping[str, Range], *, dashes: bool = False) -> list[str]:
    """What is wrong with numbers, one line each.

    Args:
        options: has the numbers as attributes.
        ranges: by name of the option.
        dashes: the flags are written with dashes, as `--max-new-tokens`.
    """
    found = [
        limits.problem("--" + (name.replace("_", "-") if dashes else name), getattr(options, name, None))
        for name, limits in ranges.items()
    ]
    return [line for line in found if line is not None]


def check_ranges(options: Any, ranges: Mapping[str, Range], *, dashes: bool = False) -> None:
    """Refuse numbers out of range; arguments as `range_problems`.

    Raises:
        FlagError: lists all of them.
    """
    problems = range_problems(options, ranges, dashes=dashes)
    if problems:
        raise FlagError("; ".join(problems))
