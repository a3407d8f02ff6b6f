"""An image as rules in front of the decoder see it, made of random tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dynamic.rules.regions import WHOLE, Region


@dataclass(frozen=True)
class PlainView:
    """What `dynamic.rules.rule.ImageView` asks for, as plain fields."""

    grid: tuple[int, int]
    places: Tensor
    tower: Tensor
    projected: Tensor
    received: Tensor
    received_early: Tensor
    keys: Tensor
    question: Tensor
    region: Region | None = WHOLE
    number: int = 0

    def digest(self) -> int:
        return self.number

    def part(self, chosen: Tensor) -> PlainView:
        """The tokens `chosen` in this order, as after an earlier rule or in another order."""
        per_token = ("places", "tower", "projected", "received", "received_early", "keys")
        assert set(per_token) < {field.name for field in fields(self)}
        return replace(self, **{name: getattr(self, name)[chosen] for name in per_token})


def random_view(rows: int, columns: int, seed: int = 0, width: int = 40, like: int = 3) -> PlainView:
    """A view of a whole tile.

    Args:
        rows: of patches.
        columns: of patches.
        seed: of the numbers.
        width: of features.
        like: how many kinds of patches there are, so that some resemble each other.
    """
    draw = torch.Generator().manual_seed(seed)
    count = rows * columns
    kinds = torch.randn(like, width, generator=draw)[torch.randint(like, (count,), generator=draw)]
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2).float()
    return PlainView(
        grid=(rows, columns),
        places=places,
        tower=kinds + torch.randn(count, width, generator=draw),
        projected=kinds + torch.randn(count, width, generator=draw) + 0.5,
        received=torch.rand(count, generator=draw).softmax(0),
        received_early=torch.rand(count, generator=draw).softmax(0),
        keys=torch.randn(count, 16, generator=draw),
        question=torch.randn(5, width, generator=draw),
        number=seed,
    )
