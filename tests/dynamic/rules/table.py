"""The table of rules in dynamic/README.md, made of the rules: `python -m tests.dynamic.rules.table` rewrites it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from dynamic.rules.registry import BUILT_IN, rules
from dynamic.rules.rule import ImageRule, LayerRule, Rule

README = Path(__file__).resolve().parents[3] / "dynamic" / "README.md"
BEGIN, END = "<!-- rules: begin -->\n\n", "\n<!-- rules: end -->"


def line(name: str, rule: type[Rule]) -> str:
    """One row."""
    place = "-"
    if issubclass(rule, ImageRule):
        place = f"in front, `@{rule.place}`"
    elif issubclass(rule, LayerRule):
        place = f"before layer {', '.join(map(str, rule.layers))}"
    options = ", ".join(f"`{each.name}={each.default}`" for each in dataclasses.fields(rule) if each.name != "cen")
    modifiers = ", ".join(f"`+{each}`" for each in rule.modifiers)
    what = " ".join((inspect.getdoc(rule) or "").split("\n\n")[0].split())
    paper = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", rule.reference)
    return f"| `{name}` | {place} | {what} | {', '.join(filter(None, (options, modifiers))) or '-'} | {paper} |"


def table() -> str:
    """The whole table, built-in rules only."""
    own = {name: rule for name, rule in rules().items() if rule.__module__.rpartition(".")[2] in BUILT_IN}
    head = ["| rule | where | what stays | options | paper |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*head, *(line(name, rule) for name, rule in own.items())]) + "\n"


def written() -> str:
    """What the README has."""
    return README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(BEGIN + written() + END, BEGIN + table() + END), encoding="utf-8")
