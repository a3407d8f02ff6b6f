"""Which inputs of a corpus run: a seeded choice that takes seconds, or all of them with `LLAVA_FUZZ=all`."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

SEED = 16

Item = TypeVar("Item")


def amount(most: int, usual: int) -> int:
    """How many inputs of an endless corpus are drawn: `most` with `LLAVA_FUZZ=all`, else `usual`."""
    wanted = os.environ.get("LLAVA_FUZZ", "")
    if wanted == "all":
        return most
    return most // int(wanted.removeprefix("1/")) if wanted.startswith("1/") else usual


def chosen(items: Sequence[Item], count: int) -> list[Item]:
    """All of `items` with `LLAVA_FUZZ=all`, every N-th with `LLAVA_FUZZ=1/N`, else `count` of them."""
    wanted = os.environ.get("LLAVA_FUZZ", "")
    if wanted == "all":
        return list(items)
    shuffled = random.Random(SEED).sample(list(items), len(items))
    if wanted.startswith("1/"):
        return shuffled[:: int(wanted.removeprefix("1/"))]
    return shuffled[:count]
