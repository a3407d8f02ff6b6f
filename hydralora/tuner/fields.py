"""What the value of an option may be: kinds that `FIELDS` of `config.py` gives to the fields of a configuration.

A value must be of the right type as it is: text that reads as a number, which YAML files and command lines give, a bool
for a number and NaN are refused, and the message says what to pass instead. `a | b` is a kind that takes either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class RefusedValueError(ValueError):
    """A configuration has values of the wrong type or out of range; names them all."""


@dataclass(frozen=True)
class Kind:
    """Values that an option takes.

    Attributes:
        words: what they are, for messages.
        holds: True for one of them; takes any object.
        hint: why another value is not possible, or what to do instead.
    """

    words: str
    holds: Callable[[Any], bool]
    hint: str = ""

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self.words} or {other.words}", lambda value: self.holds(value) or other.holds(value))

    def problem(self, name: str, value: Any) -> str | None:
        """One line that names option, value and what is expected; None if the value is right."""
        if self.holds(value):
            return None
        line = f"{name} is {value!r}, expected {self.words}"
        meant = _meant(value)
        if meant is not None and self.holds(meant):
            line += f"; pass {meant!r} itself, not a {type(value).__name__}"
            if isinstance(meant, float) and isinstance(value, str):
                line += " (YAML reads 1e-3 as text, 1.0e-3 as a number)"
        return f"{line}: {self.hint}" if self.hint else line


def problems(options: Any, kinds: Mapping[str, Kind]) -> list[str]:
    """What is wrong with the attributes of `options`, one line each, in the order of `kinds`."""
    found = [kind.problem(name, getattr(options, name)) for name, kind in kinds.items()]
    return [line for line in found if line is not None]


def _meant(value: Any) -> Any:
    """What a text or a number of an array library stands for; None for everything else."""
    if isinstance(value, str):
        words = {"true": True, "false": False}
        for read in (int, float, lambda text: words[text.lower()]):
            try:
                return read(value)
            except (ValueError, KeyError):
                continue
        return None
    shape = getattr(value, "shape", None)
    return value.item() if shape is not None and len(shape) == 0 else None


def _is_number(value: Any) -> bool:
    """True for a finite number that a float can hold; a bool is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def number(
    least: float = -math.inf, most: float = math.inf, *, above: bool = False, below: bool = False, whole: bool = False
) -> Kind:
    """Finite numbers of a range.

    Args:
        least: smallest number.
        most: largest number.
        above: `least` itself is excluded.
        below: `most` itself is excluded.
        whole: of the class int alone.
    """
    parts = [f"{'more than' if above else 'at least'} {least:g}"] if least > -math.inf else []
    parts += [f"{'less than' if below else 'at most'} {most:g}"] if most < math.inf else []

    def holds(value: Any) -> bool:
        if not _is_number(value) or (whole and not isinstance(value, int)):
            return False
        high_enough = value > least if above else value >= least
        return high_enough and (value < most if below else value <= most)

    noun = "a whole number" if whole else "a number"
    return Kind(f"{noun} of {' and '.join(parts)}" if parts else noun, holds)


def one_of(values: Iterable[str]) -> Kind:
    """One of some words."""
    known = list(values)
    return Kind(f"one of {[str(word) for word in known]}", lambda value: isinstance(value, str) and value in known)


def list_of(kind: Kind, *, empty: bool = True) -> Kind:
    """A list, tuple or set of values of one kind; `empty`: it may have none."""
    return Kind(
        f"a list of ({kind.words})",
        lambda value: (
            isinstance(value, list | tuple | set | frozenset)
            and (empty or len(value) > 0)
            and all(map(kind.holds, value))
        ),
    )


def mapping_of(keys: Kind, values: Kind) -> Kind:
    """A dict whose keys and values are of these kinds."""
    return Kind(
        f"a dict from ({keys.words}) to ({values.words})",
        lambda value: (
            isinstance(value, dict) and all(keys.holds(key) and values.holds(item) for key, item in value.items())
        ),
    )


def _compiles(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


NONE = Kind("None", lambda value: value is None)
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
TEXT = Kind("text that is not empty", lambda value: isinstance(value, str) and value != "")
PATTERN = Kind("a regular expression", lambda value: TEXT.holds(value) and _compiles(value))
DICT = Kind("a dict", lambda value: isinstance(value, dict))
COUNT = number(1, whole=True)
INDEX = number(0, whole=True)
POSITIVE = number(0, above=True)
NOT_NEGATIVE = number(0)
PROBABILITY = number(0, 1, below=True)
"""Of dropping something: with 1 nothing would be left."""
