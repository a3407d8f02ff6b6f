"""The losses on the routing of a forward pass that torch.compile traces.

`auxiliary.py` computes the gradient of a layer in the backward pass, by Python that a compiled graph does not run. Here
the layers of a pass are kept until it ends, the losses are computed from them as tensors of the graph, and an identity
on the outputs of the pass adds their gradient, whichever of the outputs a loss begins with.

What changes from update to update is asked for by the operations of `operations.py` when the graph runs.

Shape letters: B batch, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from hydralora.layer import expert_balance_loss, routing_of
from hydralora.tokens import RealTokens
from hydralora.tuner.balance.operations import loss_weight, moving_shares
from hydralora.tuner.balance.terms import AdapterTerms
from hydralora.tuner.calls.inputs import PACKED
from hydralora.tuner.calls.packing import sequence_starts

UNGRADED = (
    "balance_weight, information_weight: a compiled model runs this layer without gradients, as in a reentrant "
    "checkpoint. Use the kind that is not reentrant: gradient_checkpointing_kwargs={'use_reentrant': False}"
)


@dataclass(frozen=True)
class Routed:
    """A layer of a traced pass.

    Attributes:
        adapter: its name.
        layer: its name.
        weights: (..., E) by which the experts act.
        probabilities: (B, T, E) or (B * T, E) float32 of the router, or the weights of whole sequences.
    """

    adapter: str
    layer: str
    weights: Tensor
    probabilities: Tensor


@dataclass
class TracedPass:
    """One forward pass in training that is compiled, as a whole or in parts.

    Attributes:
        tokens: which of its tokens are real.
        owner: the module whose call it is (its `id`).
        starts: (B, T) int, the column in which the text of each token begins; None: every row is one.
        routed: the layers that took part so far.
    """

    tokens: RealTokens
    owner: int
    starts: Tensor | None = None
    routed: list[Routed] = field(default_factory=list)

    def keep(self, adapter: str, layer: str, weights: Tensor, probabilities: Tensor) -> None:
        """Take part, with what `Routed` has.

        Raises:
            RuntimeError: no gradient could reach the router from here.
        """
        if not probabilities.requires_grad:
            raise RuntimeError(UNGRADED)
        self.routed.append(Routed(adapter, layer, weights, probabilities))

    def losses(self, number: int, adapters: Mapping[str, AdapterTerms]) -> Iterator[tuple[str, str, Tensor]]:
        """Adapter, name and value (), not weighted, of every loss; arguments as of `attached`."""
        for name in dict.fromkeys(each.adapter for each in self.routed):
            layers, terms = [each for each in self.routed if each.adapter == name], adapters[name]

            def averaged(layer: str, shares: Tensor, name: str = name, decay: float = terms.shares.decay) -> Tensor:
                return moving_shares(shares, number, name, layer) if decay else shares

            for term, of_layer in terms.forms(averaged).items():
                if of_layer is None:
                    yield name, term, self._pooled(layers)
                    continue
                values = [of_layer(*self._decided(each, terms.by_sequence), each.layer) for each in layers]
                device = values[0].device
                yield name, term, torch.stack([value.to(device) for value in values]).mean()

    def _pooled(self, layers: list[Routed]) -> Tensor:
        """The original's balance loss, over all layers and each text by itself."""
        routings = []
        for each in layers:
            mask = self._valid(each)
            shape = (*mask.shape, each.probabilities.shape[-1])
            acting = each.weights.detach().expand(each.probabilities.shape)
            routings.append(routing_of(acting.reshape(shape), each.probabilities.reshape(shape)))
        if self.starts is None:
            return expert_balance_loss(routings, mask)
        places = self.starts.numel()  # as many texts at most; those that are none are not counted in the mean
        columns = torch.arange(self.starts.shape[1], device=self.starts.device)
        texts = (self.starts == columns).sum().to(mask.device)
        return expert_balance_loss(routings, mask, (_text_numbers(self.starts), places)) * (places / texts)

    def _decided(self, each: Routed, by_sequence: bool) -> tuple[Tensor, Tensor]:
        """Probabilities (rows, T, E) of a layer and which are real (rows, T); of packed texts (texts, 1, E)."""
        mask = self._valid(each)
        values = each.probabilities.reshape(*mask.shape, each.probabilities.shape[-1])
        if self.starts is None or not by_sequence or mask.shape != self.starts.shape:
            return values, mask
        numbers = _text_numbers(self.starts).to(values.device).flatten()
        real = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1) * mask.unsqueeze(-1)
        sums = torch.zeros(mask.numel(), real.shape[-1], device=values.device)
        sums = sums.index_add(0, numbers, real.flatten(0, 1))  # (B * T, E + 1), zero where no text begins
        mean = sums[:, :-1] / sums[:, -1:].clamp(min=1)
        return mean.unsqueeze(1), (sums[:, -1:] > 0).float()

    def _valid(self, each: Routed) -> Tensor:
        return self.tokens.valid(each.probabilities.shape[:-1], each.probabilities.device)

    def attached(self, losses: int, adapters: Mapping[str, AdapterTerms], output: Any) -> Any:
        """The output of the pass, with the gradient of its losses on every tensor of it that has a gradient.

        Args:
            losses: number of the `AuxiliaryLosses`.
            adapters: their losses, by name.
            output: a tensor, or what `_map` knows.
        """
        found = list(self.losses(losses, adapters))
        tensors: list[Tensor] = []
        _map(output, lambda tensor: tensors.append(tensor) or tensor)
        if not tensors or not found:
            return output
        names = tuple((adapter, term) for adapter, term, _ in found)
        marked = iter(_WithLosses.apply(losses, names, *(value for _, _, value in found), *tensors))
        return _map(output, lambda _: next(marked))


Output = TypeVar("Output")


def _map(output: Output, function: Callable[[Tensor], Tensor]) -> Output:
    """An output whose tensors with a gradient are those after `function`; an output that is a dictionary is changed."""
    if isinstance(output, Tensor):
        return function(output) if output.requires_grad else output
    if isinstance(output, dict):
        for name, value in list(output.items()):
            if isinstance(value, Tensor | tuple):
                output[name] = _map(value, function)
        return output
    if type(output) in (tuple, list):
        return type(output)(_map(value, function) for value in output)
    return output


class _WithLosses(torch.autograd.Function):
    """Outputs of a pass as they are; backward gives the losses of the pass the gradient of their weight."""

    @staticmethod
    def forward(ctx: Any, losses: int, names: tuple[tuple[str, str], ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.losses, ctx.names = losses, names
        ctx.save_for_backward(*tensors[: len(names)])
        return tuple(tensor.view_as(tensor) for tensor in tensors[len(names) :])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights = [
            loss_weight(value, gradients[0], ctx.losses, adapter, term)
            for value, (adapter, term) in zip(ctx.saved_tensors, ctx.names, strict=True)
        ]
        return None, None, *weights, *gradients


def _text_numbers(starts: Tensor) -> Tensor:
    """(B, T) int of `starts` (B, T): where the text of a token begins in the flattened batch."""
    rows, columns = starts.shape
    return starts + columns * torch.arange(rows, device=starts.device).unsqueeze(1)


def text_starts(shape: tuple[int, int] | None, mask: Tensor | None, kwargs: Mapping[str, Any]) -> Tensor | None:
    """(B, T) int, the column in which the text of each token begins; None: every row is one.

    Args:
        shape: (B, T) of the tokens of a call, if known.
        mask: (B, T), false at padding, or None.
        kwargs: its arguments, of which those of packed rows are read.
    """
    given = {name: kwargs[name] for name in PACKED if kwargs.get(name) is not None}
    if shape is None or not given or (mask is not None and tuple(mask.shape) != tuple(shape)):
        return None
    return sequence_starts(shape, mask, given, continuous=mask is None)
