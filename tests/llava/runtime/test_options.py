"""Options of a command line: one helper, and flags that are made of a configuration."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import pytest
from transformers import HfArgumentParser

from dynamic.config import FLAG_RANGES as SPARSE_RANGES
from dynamic.config import SparseConfig, SparseOptions
from hydralora.config import HydraLoraOptions, RoutedLinearConfig, RoutedMLPConfig
from llava.runtime.checked_config import CheckedConfig
from llava.runtime.options import config_of, flags_of, option
from mma.config import FLAG_RANGES as MMA_RANGES
from mma.config import MmaConfig, MmaOptions

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Example(CheckedConfig):
    subject: ClassVar[str] = "the example"

    rank: int = option("rank of the update", 4)
    kind: str = option("a or b", "a", choices=["a", "b"])
    inner: float = 1.0


@flags_of(Example, after={"first": ["kind"], "second": ["rank"]})
class Options:
    """Options with those of `Example` among them."""

    _argument_group_name: ClassVar[str] = "example"

    first: bool = option("the first", False)
    second: int | None = option("the second")

    def config(self) -> Example:
        return config_of(Example, self)


def test_fields_of_a_configuration_become_options() -> None:
    found = {item.name: (item.type, item.default, dict(item.metadata)) for item in dataclasses.fields(Options)}
    assert list(found) == ["first", "kind", "second", "rank"]
    assert found["rank"] == ("int", 4, {"help": "rank of the update"})
    assert found["kind"] == ("str", "a", {"help": "a or b", "choices": ["a", "b"]})
    (parsed,) = HfArgumentParser(Options).parse_args_into_dataclasses(["--rank", "8", "--kind", "b", "--first", "True"])
    assert parsed == Options(True, "b", None, 8)
    assert parsed.config() == Example(rank=8, kind="b")
    with pytest.raises(SystemExit):
        HfArgumentParser(Options).parse_args_into_dataclasses(["--kind", "c"])


WRONG: dict[str, dict[str, list[str]]] = {
    "after an option that does not exist": {"third": ["rank"]},
    "a field that does not exist": {"first": ["width"]},
    "twice": {"first": ["rank", "rank"]},
    "a field without help": {"first": ["inner"]},
    "an option that the class has too": {"first": ["second"]},
}


@pytest.mark.parametrize("after", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_when_the_class_is_made(after: dict[str, list[str]]) -> None:
    class Own:
        first: bool = option("the first", False)
        second: int = option("the second", 1)

    with pytest.raises(ValueError, match=r"Own with the options of Example: .* do not fit"):
        flags_of(Example, after)(Own)


PAIRS: dict[str, tuple[type, type, str]] = {
    "dynamic": (SparseConfig, SparseOptions, "dynamic/config.py"),
    "mma": (MmaConfig, MmaOptions, "mma/config.py"),
}


def _written(text: str, name: str) -> set[str]:
    """Names of the fields that a class statement writes down."""
    found = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == name)
    return {
        item.target.id for item in found.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def _twice(text: str, config: str, options: str) -> set[str]:
    return {name for name in _written(text, config) & _written(text, options) if name not in ("subject", "ranges")}


def test_what_counts_as_written_twice() -> None:
    text = "class A:\n    rank: int = 1\nclass B:\n    rank: int = 1\n    other: int = 2\n"
    assert _twice(text, "A", "B") == {"rank"}


@pytest.mark.parametrize(("config", "options", "file"), PAIRS.values(), ids=PAIRS)
def test_no_option_is_written_twice(config: type, options: type, file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not _twice(text, config.__name__, options.__name__)
    shared = {item.name: item for item in dataclasses.fields(config)}
    flags = {item.name: item for item in dataclasses.fields(options)}
    assert {"dynamic": 16, "mma": 7}[file.partition("/")[0]] == len(both := shared.keys() & flags.keys())
    assert all(_same(shared[name]) == _same(flags[name]) for name in both)
    types, flag_types = get_type_hints(config), get_type_hints(options)  # a parser resolves `Field.type` in place
    assert all(types[name] == flag_types[name] for name in both)
    assert options().config() == config()


def _same(item: Any) -> tuple[Any, ...]:
    return item.name, item.default, dict(item.metadata)


def test_other_names_have_the_defaults_of_the_configuration() -> None:
    options, mlp = HydraLoraOptions(), RoutedMLPConfig()
    found = (options.llm_moe_num_experts, options.lora_rank, options.dense_moe, options.moe_balance_w)
    assert found == (mlp.experts, mlp.rank, mlp.dense, mlp.balance_weight)
    assert options.hydralora_balance_w == RoutedLinearConfig(["attention"]).balance_weight


@pytest.mark.parametrize(
    ("config", "options", "ranges"), [(SparseConfig, SparseOptions, SPARSE_RANGES), (MmaConfig, MmaOptions, MMA_RANGES)]
)
def test_every_number_has_one_range(config: Any, options: type, ranges: dict[str, Any]) -> None:
    numbers = {item.name for item in dataclasses.fields(options) if item.type in ("int", "float")}
    assert numbers - {"n_prompt"} <= set(ranges)
    assert all(ranges[name] is limits for name, limits in config.ranges.items())
