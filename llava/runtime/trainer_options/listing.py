"""`--help` of a training program: its own options first, transformers' in a short list by what becomes of them.

`--help-all` explains transformers' options too. Both list one spelling of each; `--learning-rate` is accepted as well.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import transformers
from transformers.hf_argparser import string_to_bool

from llava.runtime.trainer_options.row import Kind, Table
from llava.runtime.trainer_options.table import fields_of_transformers

TITLE = "options of transformers' Trainer"
WIDTH = 120


class _Formatter(argparse.HelpFormatter):
    """Lists the first spelling of an option, which has underscores, and its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        if action.choices is not None:
            return f"{action.option_strings[0]} {{{','.join(map(str, action.choices))}}}"
        return f"{action.option_strings[0]} {_kind(action)}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, argparse.SUPPRESS, "", []) and action.default is not False
        return f"{action.help or ''} (default: %(default)s)".strip() if shown else action.help


def _kind(action: argparse.Action) -> str:
    """What the value of an option is, in a word."""
    if action.nargs == 0:
        return ""
    kinds = {int: "NUMBER", float: "NUMBER", str: "TEXT"}
    if action.type in kinds:
        return kinds[action.type] + (" ..." if action.nargs in ("+", "*") else "")
    return "BOOL" if action.nargs == "?" else "VALUE"


def _switch_or_text(word: str) -> bool | str:
    try:
        return bool(string_to_bool(word))
    except argparse.ArgumentTypeError:
        return word


class OptionParser(transformers.HfArgumentParser):
    """Parser over classes of options with a short `--help`.

    Args:
        classes: of options.
        table: what becomes of transformers' options in the program.
        kwargs: as `ArgumentParser` takes them.
    """

    def __init__(self, classes: Sequence[type], table: Table, **kwargs: Any) -> None:
        self.table = table
        super().__init__(list(classes), add_help=False, formatter_class=_Formatter, allow_abbrev=False, **kwargs)
        group = self.add_argument_group("help")
        self._accept_what_is_documented()
        group.add_argument("-h", "--help", action="help", help="show this and exit")
        group.add_argument(
            "--help-all", "--help_all", action=_HelpAll, help="explain transformers' options too, and exit"
        )

    def _accept_what_is_documented(self) -> None:
        """Read values that `HfArgumentParser` takes for malformed: texts of a switch, and of refused options any."""
        for action in self._actions:
            row = self.table.get(action.dest)
            if action.dest == "include_num_input_tokens_seen":  # a switch that has names for its values too
                action.type, action.choices = _switch_or_text, None
            elif row is not None and row.kind is Kind.REFUSED and action.type not in (string_to_bool, str, int, float):
                action.type, action.choices = str, None

    def format_help(self) -> str:
        """The program's own options, then the names of transformers' by what becomes of them."""
        return self._help(everything=False)

    def format_full_help(self) -> str:
        """As `format_help`, with an explanation of each of transformers' options."""
        return self._help(everything=True)

    def _help(self, everything: bool) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        inherited = set(fields_of_transformers())
        for group in self._action_groups:
            own = [
                action for action in group._group_actions if action.dest not in inherited and not _is_complement(action)
            ]
            if own:
                formatter.start_section(group.title)
                formatter.add_arguments(own)
                formatter.end_section()
        found = {action.dest: action for action in self._actions if not _is_complement(action)}
        shared = [found[name] for name in self.table if name in found and name in inherited]
        parts = [formatter.format_help().rstrip(), "", f"{TITLE}:"]
        parts += [self._explained(shared)] if everything else _names(shared, self.table)
        hint = (
            "docs/options.md has the reasons"
            if everything
            else "--help-all explains them, docs/options.md has the reasons"
        )
        return "\n".join([*parts, f"  {hint}", "", str(self.epilog or ""), ""])

    def _explained(self, actions: Iterable[argparse.Action]) -> str:
        formatter = self._get_formatter()
        formatter._indent()
        for action in actions:
            row = self.table[action.dest]
            said = f"[{row.kind}: {row.words}] ".replace("%", "%%").replace("`", "")
            copied = argparse.Action(action.option_strings, action.dest)
            copied.__dict__.update(action.__dict__)
            copied.help = said + (action.help or "")
            formatter.add_argument(copied)
        return formatter.format_help().rstrip()


class _HelpAll(argparse.Action):
    """Prints the full help and ends the program."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        """Print and exit."""
        parser._print_message(getattr(parser, "format_full_help", parser.format_help)(), sys.stdout)
        parser.exit()


def _is_complement(action: argparse.Action) -> bool:
    """True for `--no_NAME`, which `HfArgumentParser` adds to switches that are on by default."""
    return isinstance(action, argparse._StoreFalseAction)


def _names(actions: Sequence[argparse.Action], table: Table) -> list[str]:
    """The names of options in a paragraph for each kind."""
    lines = []
    for kind in Kind:
        names = " ".join(f"--{action.dest}" for action in actions if table[action.dest].kind is kind)
        lines += textwrap.wrap(
            names, WIDTH, initial_indent=f"  {kind}: ", subsequent_indent="    ", break_on_hyphens=False
        )
    return lines
