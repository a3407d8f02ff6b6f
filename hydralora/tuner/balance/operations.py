"""What the losses on the routing ask for while a compiled graph runs: operations that the compiler takes as they are.

The weight of a loss in its warm-up, the scale of the trainer, the values for the log and the running means of
`balance_ema` change from update to update. As values of the graph they would have it compiled again for each.

Shape letters: E experts.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

UNRECORDED = (torch.Tag.cudagraph_unsafe,)
"""Their Python runs every time, which it would not as a part of a CUDA graph."""
_NUMBERS = itertools.count()
_NUMBERED: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class Numbered:
    """What operations of a compiled graph find by its number; a copy of the object has one of its own."""

    number: int

    def take_number(self) -> None:
        """Be found by a number from now on."""
        self.number = next(_NUMBERS)
        _NUMBERED[self.number] = self

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self.take_number()


def numbered(number: int) -> Any:
    """The object of a number."""
    return _NUMBERED[number]


@torch.library.custom_op("hydralora::loss_weight", mutates_args=(), tags=UNRECORDED)
def loss_weight(value: Tensor, arrived: Tensor, losses: int, adapter: str, term: str) -> Tensor:
    """Gradient () float32 for a loss of `value` (), of what is trained; its weighted value is noted for the log.

    Args:
        value: of the loss of one forward pass, not weighted.
        arrived: any gradient of this backward pass, so that this is computed in it.
        losses: number of the `AuxiliaryLosses`.
        adapter: its name.
        term: name of the loss.
    """
    weight: Tensor = numbered(losses).weight_of(adapter, term, value)
    return weight


@loss_weight.register_fake
def _(value: Tensor, arrived: Tensor, losses: int, adapter: str, term: str) -> Tensor:
    return torch.empty_like(value)


@torch.library.custom_op("hydralora::moving_shares", mutates_args=(), tags=UNRECORDED)
def moving_shares(shares: Tensor, losses: int, adapter: str, layer: str) -> Tensor:
    """The running mean (E,) of a layer with the shares (E,) of a batch.

    Args:
        shares: of the batch.
        losses: number of the `AuxiliaryLosses`.
        adapter: its name.
        layer: its name.
    """
    mean: Tensor = numbered(losses).averaged(adapter, layer, shares)
    return mean.clone()


@moving_shares.register_fake
def _(shares: Tensor, losses: int, adapter: str, layer: str) -> Tensor:
    return torch.empty_like(shares)
