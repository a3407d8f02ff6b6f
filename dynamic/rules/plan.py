"""A plan of rules as text: `fastv:0.25`, `visionzip:0.5@tower+fastv:0.25@2`, `divprune+cen:64`.

    plan  = part, then "+" and a part, as often as wanted
    part  = rule, in brackets its options `[seed=3]`, "+" and a modifier of it, ":" and its budget, "@" and its place
    place = `tower` or `features`, which a rule has by itself, or decoder layers as `2`, `8,16,24` or `8/16/24`

A part without a budget takes the one that is given for the whole plan.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from dynamic.rules.budget import POSITIONS, Keep, solve_average
from dynamic.rules.registry import find_rule
from dynamic.rules.rule import ImageRule, LayerRule, Rule
from llava.errors import FlagError

_PART = re.compile(r"(?P<rule>[\w-]+)(?:\[(?P<options>[^\]]*)\])?(?::(?P<keep>[\w.:]+))?(?:@(?P<place>[\w,/]+))?")


@dataclass(frozen=True)
class Stage:
    """One rule of a plan with its budget.

    Attributes:
        rule: with its options.
        keep: how much stays of an image, counted before any rule.
        layers: where a `LayerRule` acts; empty for rules in front of the decoder.
    """

    rule: Rule
    keep: Keep
    layers: tuple[int, ...] = ()

    def counts(self, tokens: int, depth: int) -> list[int]:
        """How many of `tokens` image tokens stay from each of its layers on, in a decoder of `depth` layers.

        Raises:
            FlagError: the rule cannot reach the average that is asked for.
        """
        rule = self.rule
        if not isinstance(rule, LayerRule):  # in front of the decoder the average is the number
            wanted = round(self.keep.value) if self.keep.kind == "average" else self.keep.count(tokens)
            return [min(max(1, wanted), tokens)]
        if not tokens:  # of an image that was cut off with the end of its row
            return [0] * len(self.layers)
        if self.keep.kind != "average":
            return rule.counts(self.keep.count(tokens), tokens, self.layers)
        last = solve_average(
            self.keep.value, tokens, lambda keep: rule.counts(keep, tokens, self.layers), self.layers, depth
        )
        return rule.counts(last, tokens, self.layers)


@dataclass(frozen=True)
class Plan:
    """What is done to the image tokens of every row.

    Attributes:
        stages: in the order in which they act.
        positions: `original`: a token keeps the position that it had, as does the answer; `renumber`: what is left is
            counted from 0.
        text: as it was written.
    """

    stages: tuple[Stage, ...]
    positions: str = "original"
    text: str = ""

    @property
    def image_stages(self) -> list[Stage]:
        """Those in front of the decoder."""
        return [stage for stage in self.stages if isinstance(stage.rule, ImageRule)]

    @property
    def layer_stages(self) -> list[Stage]:
        """Those before decoder layers."""
        return [stage for stage in self.stages if isinstance(stage.rule, LayerRule)]

    @property
    def starts(self) -> tuple[int, ...]:
        """Layers before which tokens are dropped, ascending; 0 for rules in front of the decoder."""
        first = [0] if self.image_stages else []
        return (*first, *(layer for stage in self.layer_stages for layer in stage.layers))

    def check(self, depth: int) -> None:
        """Refuse a plan that a decoder of `depth` layers cannot carry out.

        Raises:
            FlagError: a layer does not exist, or two rules act before the same one or in the wrong order.
        """
        layers = [layer for stage in self.layer_stages for layer in stage.layers]
        if layers and max(layers) >= depth:
            raise FlagError(
                f"--reduce {self.text}: a rule acts before layer {max(layers)}, but this decoder has layers 0 to "
                f"{depth - 1}; say where, for example {self.layer_stages[-1].rule.name}@{max(1, depth // 8)}"
            )


def parse_plan(text: str, keep: str | None = None, positions: str = "original") -> Plan:
    """Read a plan.

    Args:
        text: of the form above.
        keep: the budget of parts that have none, see `Keep.parse`.
        positions: one of `POSITIONS`.

    Raises:
        FlagError: a rule, modifier, option, budget or place is not known or does not fit.
    """
    if positions not in POSITIONS:
        raise FlagError(f"--positions {positions}: known are {', '.join(POSITIONS)}")
    parts: list[list[re.Match[str]]] = []
    for word in text.split("+"):
        match = _PART.fullmatch(word.strip())
        if match is None:
            raise FlagError(f"--reduce {text}: '{word}' is not of the form rule[option=value]:budget@place")
        known = find_rule(parts[-1][0]["rule"]).modifiers if parts else {}
        if match["rule"] in known:
            parts[-1].append(match)
        else:
            parts.append([match])
    stages = tuple(_stage(text, part, keep) for part in parts)
    _check_order(text, stages)
    return Plan(stages, positions, text)


def _stage(text: str, matches: list[re.Match[str]], keep: str | None) -> Stage:
    """The rule of a part, with what stands behind it or its modifiers."""
    kind = find_rule(matches[0]["rule"])
    options: dict[str, Any] = {}
    for match in matches[1:]:
        options |= kind.modifiers[match["rule"]]
    options |= _options(text, kind, matches[0]["options"])
    budget = next((match["keep"] for match in matches if match["keep"]), keep)
    if budget is None:
        raise FlagError(f"--reduce {text}: '{kind.name}' has no budget; pass --keep, or write {kind.name}:0.25")
    place = next((match["place"] for match in matches if match["place"]), None)
    try:
        rule = kind(**options)
    except ValueError as error:
        raise FlagError(f"--reduce {text}: {error}") from error
    return Stage(rule, Keep.parse(budget), _layers(text, rule, place))


def _options(text: str, kind: type[Rule], written: str | None) -> dict[str, Any]:
    """Options in brackets, each as the type of its default."""
    defaults = {each.name: each.default for each in dataclasses.fields(kind)}
    found: dict[str, Any] = {}
    for word in filter(None, (written or "").split(",")):
        name, separator, value = (part.strip() for part in word.partition("="))
        if not separator or name not in defaults:
            raise FlagError(
                f"--reduce {text}: '{word}' is not an option of '{kind.name}'; it has {sorted(defaults) or 'none'}"
            )
        try:
            default = defaults[name]
            found[name] = (
                {"true": True, "false": False}[value.lower()] if isinstance(default, bool) else type(default)(value)
            )
        except (ValueError, KeyError) as error:
            wanted = type(defaults[name]).__name__
            raise FlagError(f"--reduce {text}: {name}={value} is not of type {wanted}") from error
    return found


def _layers(text: str, rule: Rule, place: str | None) -> tuple[int, ...]:
    """Where a rule acts: what is written, or what it says itself."""
    if isinstance(rule, ImageRule):
        if place not in (None, rule.place):
            raise FlagError(
                f"--reduce {text}: '{rule.name}' acts at @{rule.place}, in front of the decoder, not @{place}"
            )
        return ()
    if not isinstance(rule, LayerRule):
        raise FlagError(f"--reduce {text}: '{rule.name}' is neither an ImageRule nor a LayerRule")
    if place is None:
        return rule.layers
    if not re.fullmatch(r"\d+([,/]\d+)*", place):
        raise FlagError(f"--reduce {text}: '{rule.name}' acts before decoder layers, as @2 or @8,16,24, not @{place}")
    return tuple(int(number) for number in re.split("[,/]", place))


def _check_order(text: str, stages: tuple[Stage, ...]) -> None:
    """Rules in front of the decoder come first, and layers ascend; an average is of one rule alone."""
    places = [stage.rule.place for stage in stages if isinstance(stage.rule, ImageRule)]
    if places != sorted(places, reverse=True):
        raise FlagError(f"--reduce {text}: a rule at @tower comes before those at @features, which see what it leaves")
    layers = [layer for stage in stages for layer in (stage.layers or (-1,))]
    inner = [layer for layer in layers if layer >= 0]
    if layers != sorted(layers) or len(set(inner)) < len(inner) or 0 in inner:
        raise FlagError(
            f"--reduce {text}: the rules act at {['in front' if n < 0 else f'layer {n}' for n in layers]}; write them "
            "in the order in which they act, each layer once, and from layer 1 on"
        )
    if len(stages) > 1 and any(stage.keep.kind == "average" for stage in stages):
        raise FlagError(
            f"--reduce {text}: an average (avg:) is the budget of a single rule; give shares or numbers here"
        )
