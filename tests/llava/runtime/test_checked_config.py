"""The base of configurations: what it accepts, what it says about the rest, and JSON there and back."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar

import pytest

from dynamic.config import SparseConfig
from llava.runtime.checked_config import CheckedConfig
from llava.runtime.ranges import COUNT, PROBABILITY, Range
from mma.config import MmaConfig


@dataclass(frozen=True)
class Example(CheckedConfig):
    subject: ClassVar[str] = "the example"
    ranges: ClassVar[Mapping[str, Range]] = {"share": PROBABILITY, "count": COUNT}

    count: int = 2
    share: float = 0.5
    name: str = "a"
    on: bool = True


@dataclass(frozen=True)
class Named(Example):
    words: ClassVar[Mapping[str, str]] = {"float": "a number"}
    ranges: ClassVar[Mapping[str, Range]] = {"count": Range(1, hint="nothing else would train")}


SOUND: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "an int for a float": {"share": 0},
    "a number larger than every float": {"count": 10**400},
}


@pytest.mark.parametrize("values", SOUND.values(), ids=SOUND)
def test_sound_values_survive_json_and_pickle(values: dict[str, Any]) -> None:
    config = Example(**values)
    assert Example.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301
    assert list(config.to_dict()) == ["count", "share", "name", "on"]


REFUSED: dict[str, tuple[type[Example], dict[str, Any], str]] = {
    "a float for an int": (Example, {"count": 2.0}, "count is 2.0, expected int"),
    "a bool for a number": (Example, {"count": True}, "count is True, expected int"),
    "a number for a bool": (Example, {"on": 1}, "on is 1, expected bool"),
    "text for a number": (Example, {"share": "1"}, "share is '1', expected float"),
    "None": (Example, {"name": None}, "name is None, expected str"),
    "too small": (Example, {"count": 0}, "count is 0, expected at least 1"),
    "too large": (Example, {"share": 1}, "share is 1, expected at least 0 and less than 1"),
    "NaN": (Example, {"share": math.nan}, "share is nan, expected at least 0 and less than 1"),
    "infinity": (Example, {"share": math.inf}, "share is inf, expected at least 0 and less than 1"),
    "several, types first": (
        Example,
        {"count": 0, "share": 2, "on": 0},
        "on is 0, expected bool; share is 2, expected at least 0 and less than 1; count is 0, expected at least 1",
    ),
    "words of its own": (Named, {"share": "1"}, "share is '1', expected a number"),
    "a hint": (Named, {"count": 0}, "count is 0, expected at least 1: nothing else would train"),
}


@pytest.mark.parametrize(("kind", "values", "problems"), REFUSED.values(), ids=REFUSED)
def test_every_problem_is_named(kind: type[Example], values: dict[str, Any], problems: str) -> None:
    for make in (lambda: kind(**values), lambda: kind.from_dict(values)):
        with pytest.raises(ValueError, match="configuration of the example: ") as raised:
            make()
        assert str(raised.value) == f"configuration of the example: {problems}"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"configuration of the example: unknown \['b', 'z'\]; known: \['count', 'name'"
    ):
        Example.from_dict({"z": 1, "count": 1, "b": 2})
    with pytest.raises(FrozenInstanceError):
        Example().count = 3  # type: ignore[misc]


SUBJECTS: dict[type[CheckedConfig], str] = {
    SparseConfig: "the predictors",
    MmaConfig: "the adapters",
}


@pytest.mark.parametrize("kind", SUBJECTS, ids=lambda kind: kind.__name__)
def test_every_configuration_of_an_extension_is_a_checked_one(kind: type[CheckedConfig]) -> None:
    sound = kind()
    assert kind.from_dict(json.loads(json.dumps(sound.to_dict()))) == sound
    assert set(kind.ranges) <= set(sound.to_dict())
    with pytest.raises(ValueError, match=rf"configuration of {SUBJECTS[kind]}: unknown \['foreign'\]; known: "):
        kind.from_dict({"foreign": 1})
