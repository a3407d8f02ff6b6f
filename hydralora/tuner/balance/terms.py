"""Which losses on the routing an adapter has, by its configuration.

A new one is a function of one layer's probabilities and real tokens, and a line of `AdapterTerms.at`; how its gradient
gets into a backward pass is the matter of `auxiliary.py`.

Shape letters: B batch, T tokens, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from hydralora.tuner.balance.losses import (
    BalanceForm,
    MovingShares,
    batch_balance,
    expert_shares,
    information,
    of_prompts,
    warmed_up,
)
from hydralora.tuner.config import HydraLoraConfig, RoutingUnit

LayerLoss = Callable[[Tensor, Tensor, str], Tensor]
"""Scalar loss of one layer: of its router's probabilities (B, T, E) float32, of which tokens are real (B, T) float32,
and of the layer's name. Called once for each layer and backward pass."""


Averaged = Callable[[str, Tensor], Tensor]
"""The running mean (E,) of the shares of a layer, of its name and the shares (E,) of a batch in it."""


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

    Attributes:
        shares: the running means of `balance_ema`, which belong to the run.
    """

    def __init__(self, config: HydraLoraConfig) -> None:
        self.config = config
        self.shares = MovingShares(config.balance_ema)

    @property
    def at_all(self) -> bool:
        """Whether a loss acts at some time."""
        has_router = self.config.most_experts > 1 and self.config.routing != RoutingUnit.TASK
        return has_router and bool(self.config.balance_weight or self.config.information_weight)

    @property
    def idle(self) -> str | None:
        """Losses that the configuration asks for and that routing by task does not have, for a warning."""
        wanted = {name: getattr(self.config, name) for name in ("balance_weight", "information_weight")}
        wanted = {name: weight for name, weight in wanted.items() if weight}
        if not wanted or self.config.routing != RoutingUnit.TASK:
            return None
        return (
            f"{wanted} has no effect with routing='task': the losses on the routing act on routers, and the weights of "
            "a task come from a table; leave it out"
        )

    @property
    def of_prompts(self) -> bool:
        """Whether what a layer hands over are the weights of whole sequences, instead of its router's by token."""
        pooled = self.config.balance_weight and self.config.balance != BalanceForm.BATCH
        return self.config.routing == RoutingUnit.SEQUENCE and not pooled

    @property
    def by_sequence(self) -> bool:
        """Whether the router decides for whole sequences."""
        return self.config.routing == RoutingUnit.SEQUENCE

    def forms(self, averaged: Averaged) -> dict[str, LayerLoss | None]:
        """The losses that act at some time, by name, as `Term.of_layer` has them; `averaged` keeps running means."""
        found: dict[str, LayerLoss | None] = {}
        if self.config.balance_weight:
            by_layer = functools.partial(self._balance, averaged)
            found["balance_loss"] = by_layer if self.config.balance == BalanceForm.BATCH else None
        if self.config.information_weight:
            found["information_loss"] = self._information
        return found

    def at(self, step: int | None) -> list[Term]:
        """The losses that act after `step` updates; None: nobody said how many there were.

        Raises:
            RuntimeError: a loss depends on that.
        """
        config = self.config
        if step is None and config.balance_weight and config.balance_warmup:
            raise RuntimeError(
                f"balance_warmup={config.balance_warmup}: the adapter does not know how many updates have been made; "
                "call hydralora.set_step(model, step) before each"
            )
        weights = {
            "balance_loss": warmed_up(config.balance_weight, step or 0, config.balance_warmup),
            "information_loss": config.information_weight,
        }
        forms = self.forms(self.shares.update)
        return [Term(name, weights[name], of_layer) for name, of_layer in forms.items() if weights[name]]

    def _balance(self, averaged: Averaged, probabilities: Tensor, valid: Tensor, layer: str) -> Tensor:
        """`balance='batch'`; the running shares belong to the backward pass that counts them."""
        decided = self._decided(probabilities, valid)
        return batch_balance(*decided, averaged(layer, expert_shares(*decided)))

    def _information(self, probabilities: Tensor, valid: Tensor, layer: str) -> Tensor:
        return -information(*self._decided(probabilities, valid))

    def _decided(self, probabilities: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """What the router decides: of every token, or of every row by the mean over its real tokens."""
        if self.config.routing == RoutingUnit.TOKEN or probabilities.shape[1] == 1:
            return probabilities, valid
        return of_prompts(probabilities, valid), valid.any(dim=1).float()
