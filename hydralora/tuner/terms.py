"""Which losses on the routing an adapter has, by its configuration.

A new one is a function of one layer's probabilities and real tokens, and a line of `AdapterTerms.at`; how its gradient
gets into a backward pass is the matter of `auxiliary.py`.

Shape letters: B batch, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from hydralora.tuner.config import HydraLoraConfig

LayerLoss = Callable[[Tensor, Tensor, str], Tensor]
"""Scalar loss of one layer: of its router's probabilities (B, T, E) float32, of which tokens are real (B, T) float32,
and of the layer's name. Called once for each layer and backward pass."""


class Term(NamedTuple):
    """One loss on the routing of an adapter.

    Attributes:
        name: in the log.
        weight: its factor.
        of_layer: the loss of a layer, of which the mean over the layers is taken; None: the balance pooled over layers.
    """

    name: str
    weight: float
    of_layer: LayerLoss | None = None


class AdapterTerms:
    """The losses of one adapter.

    Args:
        config: of the adapter; what is set in it later counts.
    """

    def __init__(self, config: HydraLoraConfig) -> None:
        self.config = config

    @property
    def at_all(self) -> bool:
        """Whether a loss acts at some time."""
        return self.config.lora_nums > 1 and self.config.balance_weight > 0

    def at(self, step: int) -> list[Term]:
        """The losses that act after `step` updates."""
        weight = self.config.balance_weight
        return [Term("balance_loss", weight)] if weight else []
