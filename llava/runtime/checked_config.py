"""The base of every configuration that a checkpoint stores: values of the right type and range, JSON there and back.

Standard library only, and Python 3.10: `moe_patch` carries this file into checkouts of upstream's LLaVA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from llava.runtime.ranges import Range

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "list[str]": (list,),
}
"""Classes of the values that an annotation stands for. JSON does not tell 1 from 1.0, so an int is a float."""


@dataclasses.dataclass(frozen=True)
class CheckedConfig:
    """Base of frozen dataclasses whose values are checked when one is made; annotations are those of `KINDS`.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names all of them.
    """

    subject: ClassVar[str]
    """What is configured, for messages."""

    ranges: ClassVar[Mapping[str, Range]] = {}
    """What the numbers may be, in the order in which messages name them; flags of the same meaning use it too."""

    words: ClassVar[Mapping[str, str]] = {}
    """How messages call an annotation, where it is not clear by itself."""

    def __post_init__(self) -> None:
        problems = [*self._wrong_types(), *self._out_of_range()]
        if problems:
            raise ValueError(f"configuration of {self.subject}: " + "; ".join(problems))

    def _wrong_types(self) -> list[str]:
        """One line per field whose value is not of its type; a bool is not accepted as a number."""
        return [
            f"{item.name} is {value!r}, expected {self.words.get(str(item.type), item.type)}"
            for item in dataclasses.fields(self)
            if not isinstance(value := getattr(self, item.name), KINDS[str(item.type)])
            or (isinstance(value, bool) and item.type != "bool")
        ]

    def _out_of_range(self) -> list[str]:
        """One line per value that is not possible, alone or with others; extended by configurations with more rules."""
        return self._range_problems(*self.ranges)

    def _range_problems(self, *names: str) -> list[str]:
        """One line for each of these numbers outside its range; `_wrong_types` reports what is not a number."""
        problems = []
        for name in names:
            value, limits = getattr(self, name), self.ranges[name]
            if isinstance(value, (int, float)) and value not in limits:
                problems.append(
                    f"{name} is {value}, expected {limits.words}" + (f": {limits.hint}" if limits.hint else "")
                )
        return problems

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Configuration from JSON values; a missing one takes its default.

        Raises:
            ValueError: a name is unknown, or a value is refused.
        """
        known = set(cls.__match_args__)  # type: ignore[attr-defined]  # not by `dataclasses.fields`: the compiler follows this
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"configuration of {cls.subject}: unknown {unknown}; known: {sorted(known)}")
        return cls(**values)
