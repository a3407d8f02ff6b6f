"""One way to define an option of a command line: a field of a dataclass with its help, parsed by `HfArgumentParser`.

What a checkpoint stores and a flag sets is defined once, in the configuration; `flags_of` makes the flag of it.
Standard library only, and Python 3.10: `moe_patch` carries this file into checkouts of upstream's LLaVA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

CHANGED_HELP = (
    "resume although options that change the result, or the data, differ from those of the run; the differences are "
    "printed and appended to run.json"
)
"""Help of `--resume_changed`, an option of every training program."""

Options = TypeVar("Options")
Config = TypeVar("Config")


def option(help_text: str, default: Any = None, **metadata: Any) -> Any:
    """A field of a dataclass of options, or of a configuration whose field is an option too.

    Args:
        help_text: what `--help` says.
        default: value if the option is not given.
        metadata: further arguments of `ArgumentParser.add_argument`, as `choices`.
    """
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


def flags_of(config: type, after: Mapping[str, Sequence[str]]) -> Callable[[type[Options]], type[Options]]:
    """Decorator that makes a dataclass of a class of options, with fields of a configuration among them.

    They have the name, type, default and help of the configuration's fields.

    Args:
        config: dataclass with the fields; those that become options are made by `option`.
        after: names of its fields, by the option of the class after which they come.

    Raises:
        ValueError: an option of the class does not exist, or a field does not, exists twice or has no help.
    """
    shared = {item.name: item for item in dataclasses.fields(config)}

    def complete(options: type[Options]) -> type[Options]:
        own = dict(options.__annotations__)
        taken = [name for names in after.values() for name in names]
        wrong = sorted({*after} - {*own}) + sorted(
            name
            for name in taken
            if name in own or name not in shared or taken.count(name) > 1 or "help" not in shared[name].metadata
        )
        if wrong:
            raise ValueError(f"{options.__name__} with the options of {config.__name__}: {wrong} do not fit")
        kinds: dict[str, Any] = {}
        for name, kind in own.items():
            kinds[name] = kind
            for field in (shared[each] for each in after.get(name, ())):
                kinds[field.name] = field.type
                setattr(options, field.name, dataclasses.field(default=field.default, metadata=field.metadata))
        options.__annotations__ = kinds
        return dataclasses.dataclass(options)

    return complete


def config_of(config: type[Config], options: object) -> Config:
    """The configuration that options say; fields without an option keep their default.

    Args:
        config: dataclass.
        options: instance of a dataclass made with `flags_of(config)`.

    Raises:
        ValueError: the configuration refuses a value.
    """
    names = [item.name for item in dataclasses.fields(config) if hasattr(options, item.name)]  # type: ignore[arg-type]
    return config(**{name: getattr(options, name) for name in names})
