"""The options `--reduce`, `--keep` and `--positions` of every program that asks a model; imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from dynamic.rules.budget import POSITIONS
from llava.errors import FlagError

OPTIONS = ("reduce", "keep", "positions")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the three options."""
    group = parser.add_argument_group("reduction of image tokens")
    group.add_argument(
        "--reduce",
        metavar="PLAN",
        default=None,
        help="drop image tokens by a rule, or by several, as fastv or visionzip:0.5@tower+fastv:0.25@2; `learned`: by "
        "the predictors of a Dynamic-LLaVA checkpoint; dynamic/README.md lists the rules",
    )
    group.add_argument(
        "--keep", metavar="BUDGET", default=None, help="share (0.25), tokens of an image (128), or average (avg:128)"
    )
    group.add_argument(
        "--positions", choices=POSITIONS, default=None, help="of the tokens that are left (default: original)"
    )


def watch(model: Any) -> AbstractContextManager[Callable[[], str | None]]:
    """See what is kept of the images while a program asks a model."""
    from dynamic.rules.report import metered

    return metered(model)


def extensions(
    model: Any, reduce: str | None = None, keep: float | str | None = None, positions: str | None = None
) -> Any:
    """The `ExtensionSet` of calls in which a plan drops image tokens.

    Raises:
        FlagError: the plan cannot be read or carried out, or there is none.
    """
    if reduce is None:
        flag = f"--keep {keep}" if keep is not None else f"--positions {positions}"
        raise FlagError(f"{flag} is the budget of a rule; name one by --reduce")
    from dynamic.rules.handle import reduced

    return reduced(model, reduce, keep, positions or "original")
