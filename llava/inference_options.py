"""Options that installed packages add to the programs that ask a LLaVA, found by the entry points "llava.inference".

Such an entry point names a module that imports no torch, so that `--help` is answered at once, with

    OPTIONS = ("reduce", "keep")                      names of its options; None: not given
    def add_options(parser): ...                      adds them to an argparse parser
    def extensions(model, **values): ...              the `ExtensionSet` for calls with these values
    def watch(model): ...                             a context that gives a function: what to say of the calls in it

`dynamic/rules/flags.py` is one. The options of training are those of `Extension.options`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from llava.extension import ExtensionSet

ENTRY_POINT_GROUP = "llava.inference"


class InferenceOptions(Protocol):
    """What such a module has."""

    OPTIONS: tuple[str, ...]

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options, each with the default None."""

    def extensions(self, model: Any, **values: Any) -> ExtensionSet:
        """The extensions of calls with these values, of which at least one is not None.

        Raises:
            FlagError: they cannot be carried out.
        """

    def watch(self, model: Any) -> AbstractContextManager[Callable[[], str | None]]:
        """A context; what it gives says in words what the calls within were like, or None."""


class Loaded(Protocol):
    """Something with a model, as `LoadedModel`."""

    @property
    def model(self) -> Any:
        """A LLaVA."""


L = TypeVar("L", bound=Loaded)


@functools.cache
def installed_options() -> tuple[InferenceOptions, ...]:
    """The modules of all installed packages, in the order of their names."""
    return tuple(point.load() for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda each: each.name))


def add_inference_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all installed packages."""
    for module in installed_options():
        module.add_options(parser)


def option_names() -> tuple[str, ...]:
    """The names of all of them."""
    return tuple(name for module in installed_options() for name in module.OPTIONS)


def given_options(args: Any) -> dict[str, Any]:
    """Those that were given, by name; `args` is anything with options as attributes."""
    found = {name: getattr(args, name, None) for name in option_names()}
    return {name: value for name, value in found.items() if value is not None}


def call_extensions(model: Any, given: Mapping[str, Any]) -> ExtensionSet | None:
    """The extensions of calls with the options `given`; None: those of the model.

    Raises:
        FlagError: the options cannot be carried out on this model.
    """
    for module in installed_options():
        values = {name: given[name] for name in module.OPTIONS if name in given}
        if values:
            return module.extensions(model, **values)
    return None


@contextmanager
def watched(loaded: Loaded, args: Any) -> Iterator[Callable[[], list[str]]]:
    """What the modules whose options were given say of the calls of a model in this context."""
    given = given_options(args)
    with ExitStack() as stack:
        modules = [module for module in installed_options() if any(name in given for name in module.OPTIONS)]
        say = [stack.enter_context(module.watch(loaded.model)) for module in modules]
        yield lambda: [words for each in say if (words := each())]


def put_on(loaded: L, args: Any) -> L:
    """Let all calls of a model be as the options of a program say; returns `loaded`.

    Raises:
        FlagError: the options cannot be carried out on this model.
    """
    if given := given_options(args):
        extensions = call_extensions(loaded.model, given)
        if extensions is not None:
            loaded.model.extensions.replace_by(extensions)
    return loaded
