"""Values of a file as the words of a command line, put before those that were typed, which therefore win."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import FlagError
from llava.runtime.config_files.record import is_record, recorded_options
from llava.runtime.config_files.yaml_file import read_yaml
from llava.runtime.retired_flags import MEANINGLESS, REFUSED, RENAMED, TRANSLATED, translate_retired_flags

FLAG = "--config"
HELP = (
    "options from a YAML file, by the names of the flags; flags win. Or run.json of a former run: its options, without "
    "where it wrote"
)
RETIRED = frozenset({*RENAMED, *MEANINGLESS, *REFUSED, *TRANSLATED})
NOTHING: Mapping[str, str] = {}


def add_config(parser: argparse.ArgumentParser) -> None:
    """Show `--config` among the options of a parser; `with_config` has taken it out before the parser reads."""
    parser.add_argument(FLAG, metavar="FILE", default=argparse.SUPPRESS, help=HELP)


def with_config(
    argv: Sequence[str],
    parsers: Sequence[argparse.ArgumentParser],
    nothing: Mapping[str, str] = NOTHING,
    translate: Callable[[list[str]], list[str]] = translate_retired_flags,
) -> list[str]:
    """A command line in today's options, whose `--config FILE` is replaced by the options in that file.

    Args:
        argv: without the program's name.
        parsers: of the program; the first that knows an option says how its value is written.
        nothing: words for an option whose recorded value is null, or whose value is an empty list, where leaving it out
            is not the same. A null in a file that is not a record means that the option is not given.
        translate: former options into today's, in the file and on the command line apart, so that flags win.

    Raises:
        FlagError: the file cannot be read, or has an option that the program does not know.
        CheckpointError: a `run.json` is damaged.
    """
    path, rest = _split(argv)
    if path is None:
        return translate(rest)
    values, is_run = _read(path, {name for parser in parsers for name in _names(parser)})
    unknown = sorted(name for name in values if _action(parsers, name) is None and name not in RETIRED)
    if unknown:
        raise FlagError(f"{FLAG} {path}: unknown options {', '.join(_like(name, parsers) for name in unknown)}")
    if is_run and not any(word.partition("=")[0] in ("--output_dir", "--output-dir") for word in rest):
        raise FlagError(
            f"{FLAG} {path}: is the record of a run, whose output folder is not taken over; pass a new --output_dir"
        )
    words: list[str] = []
    for name, value in values.items():
        if value is None and not is_run:
            continue
        words += _words(name, value, _action(parsers, name), parsers, nothing, f"{FLAG} {path}")
    return translate(words) + translate(rest)


def _split(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file of `--config`, and the other words."""
    found: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != FLAG:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise FlagError(f"{FLAG}: needs a file")
        found.append(value)
    if len(found) > 1:
        raise FlagError(f"{FLAG} is given {len(found)} times ({', '.join(found)}); options come from one file")
    return (Path(found[0]) if found else None), rest


def _read(path: Path, known: set[str]) -> tuple[dict[str, Any], bool]:
    """The options in a file, and whether it is the record of a run."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FlagError(f"{FLAG} {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if path.suffix == ".json":
        try:
            content = json.loads(text)
        except ValueError as error:
            raise FlagError(f"{FLAG} {path}: is not JSON ({error})") from error
        if isinstance(content, dict) and is_record(content):
            return recorded_options(path, content, known), True
    return read_yaml(path, text), False  # JSON is YAML too


def _names(parser: argparse.ArgumentParser) -> list[str]:
    """Names of the options of a parser."""
    return [word.removeprefix("--") for word in parser._option_string_actions if word.startswith("--")]


def _action(parsers: Sequence[argparse.ArgumentParser], name: str) -> argparse.Action | None:
    """What a program does with an option; None for one that it does not know."""
    known = (parser._option_string_actions.get(f"--{name}") for parser in parsers)
    found = next((action for action in known if action is not None), None)
    return None if found is None or found.dest in ("help", FLAG.removeprefix("--")) else found


def _like(name: str, parsers: Sequence[argparse.ArgumentParser]) -> str:
    """A name with the option that it may be meant for."""
    near = difflib.get_close_matches(name, [each for parser in parsers for each in _names(parser)], n=1)
    return f"{name} (did you mean {near[0]}?)" if near else name


def _words(
    name: str,
    value: Any,
    action: argparse.Action | None,
    parsers: Sequence[argparse.ArgumentParser],
    nothing: Mapping[str, str],
    source: str,
) -> list[str]:
    """The words that give an option a value."""
    if value is None or value == []:
        return [f"--{name}={nothing[name]}"] if name in nothing else []
    if action is not None and action.nargs == 0:
        return _switch(name, value, action, parsers, source)
    if isinstance(value, list) and not any(isinstance(each, list | dict) for each in value):
        texts = [_text(each) for each in value]
        if action is not None and action.nargs in ("+", "*"):
            return [f"--{name}", *texts]
        return [f"--{name}={('' if action is not None and action.type is list else ',').join(texts)}"]
    if action is not None and action.nargs in ("+", "*"):
        return [f"--{name}", _text(value)]
    return [f"--{name}={_text(value)}"]


def _text(value: Any) -> str:
    """A value as it is typed; tables as JSON."""
    return json.dumps(value, default=str) if isinstance(value, list | dict) else str(value)


def _switch(
    name: str, value: Any, action: argparse.Action, parsers: Sequence[argparse.ArgumentParser], source: str
) -> list[str]:
    """The words of an option that takes no value."""
    text = str(value).lower()
    if text not in ("true", "false", "yes", "no", "1", "0"):
        raise FlagError(f"{source}: {name} is {value!r}, expected true or false")
    if text in ("true", "yes", "1"):
        return [f"--{name}"]
    # One that is on unless another option switches it off.
    opposite = [
        other
        for parser in parsers
        for other in parser._actions
        if other.dest == action.dest and other.nargs == 0 and other.const is not action.const
    ]
    return [opposite[0].option_strings[0]] if opposite else []
