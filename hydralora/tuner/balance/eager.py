"""The losses on the routing of a forward pass in which Python runs: each layer finds its gradient in the backward pass.

An identity on the weights of the experts adds it, whatever the loss is that the backward pass begins with; so it does
in what gradient checkpointing recomputes, which belongs to its own pass and is not counted again. The form for a pass
that torch.compile traces is in `compiled.py`.

Shape letters: B batch, T tokens, E experts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hydralora.tokens import RealTokens
from hydralora.tuner.balance.gradient_scale import GradientScale
from hydralora.tuner.balance.pooled import PooledBalance
from hydralora.tuner.balance.terms import Term
from hydralora.tuner.balance.unpacking import Unpacking

UNCARRIED = (
    "balance_weight: a backward pass recomputed this layer by a reentrant checkpoint that does not say which forward "
    "pass it belongs to. Let the model checkpoint its layers (gradient_checkpointing of the Trainer), or use the kind "
    "that is not reentrant (use_reentrant=False)"
)


def in_backward() -> bool:
    """Whether a backward pass runs here: what is computed then is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class Losses(Protocol):
    """What a part needs of `AuxiliaryLosses`.

    Attributes:
        scale: how the trainer scales its loss at the moment.
    """

    scale: GradientScale

    def note(self, adapter: str, name: str, value: Tensor, share: float = 1.0) -> None:
        """Count the value of a loss, of which this is a `share` of one forward pass."""


@dataclass
class ForwardPass:
    """One forward pass in training.

    Attributes:
        tokens: which of its tokens are real.
        owner: the module whose call it is (its `id`).
        texts: where the texts of packed rows are; None: every row is one.
        pools: the pooled balance and its weight, by adapter and number of experts.
        layers: how many layers of an adapter took part.
        masks: which tokens of a layer are real, float32, by what it sees.
    """

    tokens: RealTokens
    owner: int
    texts: Unpacking | None = None
    pools: dict[tuple[str, int], tuple[Term, PooledBalance]] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def valid(self, tokens: torch.Size, device: torch.device) -> Tensor:
        """`RealTokens.valid`, made once for all layers that see the same tokens."""
        key = (id(self.tokens), tokens, device)
        if key not in self.masks:
            self.masks[key] = self.tokens.valid(tokens, device)
        return self.masks[key]

    def texts_of(self, valid: Tensor) -> Unpacking | None:
        """Where the texts of packed rows are in a layer that sees `valid` (B, T); None: every row is one."""
        return self.texts if self.texts is not None and self.texts.shape == tuple(valid.shape) else None

    def valid_texts(self, valid: Tensor) -> Tensor:
        """`valid` where every text of a packed row has a row of its own; made once, too."""
        texts = self.texts_of(valid)
        if texts is None:
            return valid
        key = (id(valid), "texts")
        if key not in self.masks:
            self.masks[key] = texts.valid(valid)
        return self.masks[key]


@dataclass(frozen=True)
class Part:
    """What one layer contributes to the losses of a forward pass.

    Attributes:
        losses: where values are noted, and the scale.
        within: the pass; None: it is not known.
        adapter: its name.
        layer: its name.
        terms: the losses that act.
    """

    losses: Losses
    within: ForwardPass | None
    adapter: str
    layer: str
    terms: list[Term]

    def count(self, weights: Tensor, probabilities: Tensor) -> None:
        """Take part in the pass, with the router's probabilities (B, T, E) or (B * T, E) and the weights that act."""
        if self.within is None:
            return
        valid = self.within.valid(probabilities.shape[:-1], probabilities.device)
        self.within.layers[self.adapter] = self.within.layers.get(self.adapter, 0) + 1
        experts, packed = probabilities.shape[-1], self.within.texts_of(valid) is not None
        for term in self.terms:
            if term.of_layer is None:
                pool = self.within.pools.setdefault((self.adapter, experts), (term, PooledBalance()))[1]
                acting = weights.detach().expand(probabilities.shape) if packed else weights
                pool.add(self._apart(probabilities, valid), self._apart(acting, valid), self.within.valid_texts(valid))

    def _apart(self, values: Tensor, valid: Tensor) -> Tensor:
        """Values (B, T, E) or (B * T, E) of a layer that sees `valid`; of packed rows (texts, places, E)."""
        texts = None if self.within is None else self.within.texts_of(valid)
        return values if texts is None else texts.apart(values.detach().reshape(*valid.shape, values.shape[-1]))

    def attached(self, weights: Tensor, probabilities: Tensor) -> Tensor:
        """The weights, whose backward pass adds `gradient`."""
        attached: Tensor = _Attach.apply(weights, probabilities, self)
        return attached

    def gradient(self, probabilities: Tensor) -> Tensor:
        """Gradient of the weighted losses for the router's probabilities, in their shape, scaled as the loss is."""
        if self.within is None:
            raise RuntimeError(UNCARRIED)
        valid = self.within.valid(probabilities.shape[:-1], probabilities.device)
        experts, layers = probabilities.shape[-1], self.within.layers[self.adapter]
        scale, parts = self.losses.scale, list[Tensor]()
        texts, mask = self.within.texts_of(valid), self.within.valid_texts(valid)
        shape = probabilities.shape if texts is None else torch.Size((*mask.shape, experts))

        def placed(gradient: Tensor) -> Tensor:
            return gradient if texts is None else texts.together(gradient).view(probabilities.shape)

        for term in self.terms:
            if term.of_layer is None:
                pool = self.within.pools[self.adapter, experts][1]
                factor = term.weight * pool.layers / layers * scale.number()
                parts.append(scale.with_scaler(placed(pool.gradient(mask, shape, factor))))
                continue
            with torch.enable_grad():
                leaf = self._apart(probabilities.detach(), valid).reshape(*mask.shape, experts).requires_grad_()
                loss = term.of_layer(leaf, mask, self.layer)
                (found,) = torch.autograd.grad(loss, leaf)
            parts.append(scale.of(placed(found.view(shape)) * (term.weight / layers)))
            self.losses.note(self.adapter, term.name, loss.detach() * term.weight / layers, 1 / layers)
        return functools.reduce(torch.add, parts)


class _Attach(torch.autograd.Function):
    """The weights of the experts as they are; backward adds the gradient of a part for the router's probabilities."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, probabilities: Tensor, part: Part) -> Tensor:
        ctx.part = part
        ctx.save_for_backward(probabilities)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (probabilities,) = ctx.saved_tensors
        return gradients[0], ctx.part.gradient(probabilities), None
