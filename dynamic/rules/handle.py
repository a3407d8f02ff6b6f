"""Putting a plan of rules on a model that is loaded, and taking it off again; for one call, or until it is taken off.

with dynamic.attach(model, rule="fastv", keep=0.25):
    model.generate(ids, images=images)

model.generate(ids, images=images, extensions=reduced(model, "divprune+cen", 128))
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from dynamic.rules.budget import Keep
from dynamic.rules.extension import NAME, ReductionExtension
from dynamic.rules.plan import parse_plan
from dynamic.rules.registry import LEARNED
from llava.errors import FlagError

PREDICTORS = "dynamic"
"""Name of the extension with learned predictors."""


def reduced(model: Any, rule: str, keep: float | str | None = None, positions: str = "original") -> Any:
    """The `ExtensionSet` of a model for one call in which a plan of rules drops image tokens.

    Args:
        model: a LLaVA, bare or inside a PEFT model.
        rule: a plan, see `dynamic.rules.plan`; `learned` stands for the predictors of a Dynamic-LLaVA checkpoint.
        keep: the budget: a share as 0.25, a number as 128, or "avg:128".
        positions: `original` or `renumber`.

    Raises:
        FlagError: the plan cannot be read or carried out.
    """
    given = None if keep is None else str(keep)
    extensions = model.extensions.own
    if rule == LEARNED:
        return _learned(model, given, positions)
    plan = parse_plan(rule, given, positions)
    extension, config = ReductionExtension(), {"plan": plan}
    extension.attach(model, config)
    # A rule takes the place of the predictors, those of text included.
    return extensions.without(PREDICTORS).with_extension(extension, config)


def _learned(model: Any, keep: str | None, positions: str) -> Any:
    """The predictors of a checkpoint with another keep rate."""
    extensions = model.extensions.own
    found = {item.extension.name: item for item in extensions}.get(PREDICTORS)
    if found is None or not found.config.get("use_vision_predictor", True):
        raise FlagError(f"--reduce {LEARNED}: this checkpoint has no predictor of image tokens; name another rule")
    if positions != "original":
        raise FlagError(
            f"--reduce {LEARNED} --positions {positions}: the predictors were trained with original positions"
        )
    if keep is None:
        return extensions
    budget = Keep.parse(keep)
    if budget.kind == "average":
        raise FlagError(f"--reduce {LEARNED} --keep {keep}: give a share or a number of tokens")
    if budget.kind == "count" and getattr(model.config, "image_aspect_ratio", None) == "anyres":
        raise FlagError(f"--reduce {LEARNED} --keep {keep}: images in tiles differ in their tokens; give a share")
    count = model.get_vision_tower().num_features
    # Half a token more, so that rounding down gives the number that was asked for.
    rate = budget.value if budget.kind == "share" else min(1.0, (budget.count(count) + 0.5) / count)
    return extensions.with_extension(found.extension, {**found.config, "vision_keep_rate": rate})


class Handle:
    """A plan that is in use until `remove` is called, or until the end of a `with` block."""

    def __init__(self, model: Any, extensions: Any) -> None:
        self.model, self._before = model, model.extensions.replace_by(extensions)

    def remove(self) -> None:
        """Take the plan off; the model is as it was before."""
        if self._before is not None:
            self.model.extensions.replace_by(self._before)
            self._before = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def attach(model: Any, rule: str, keep: float | str | None = None, positions: str = "original") -> Handle:
    """Let a plan drop image tokens in all calls until the handle is removed; arguments as of `reduced`.

    Raises:
        FlagError: a plan is in use already, or this one cannot be carried out.
    """
    if any(item.extension.name == NAME for item in model.extensions):
        raise FlagError("a plan of rules is in use on this model already; remove its handle first")
    return Handle(model, reduced(model, rule, keep, positions))
