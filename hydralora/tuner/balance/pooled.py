"""The balance loss of the original's form, pooled over layers, without a graph that spans them.

Its value is that of `hydralora.layer.expert_balance_loss`: the mean over samples of `sum_e F_e P_e`, with F the shares
and P the mean probabilities of the experts over all layers and real tokens of a sample. F has no gradient, so the
gradient for the probabilities of one layer is F of all layers, divided by the number of tokens: once the forward pass
has ended, each layer knows its own without the others' graphs.

Shape letters: B batch, T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hydralora.layer import one_hot_argmax, stacked


class PooledBalance:
    """The sums of one forward pass over layers with equally many experts.

    A layer is kept until the pass ends, so that all of them are counted in the same operations.
    """

    def __init__(self) -> None:
        self.layers = 0
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._chosen: Tensor | None = None  # (B, E) float32, tokens by their most probable expert
        self._probability: Tensor | None = None  # (B, E) float32
        self._tokens: Tensor | None = None  # (B, 1) float32, of one layer
        self._gradients: dict[tuple[Any, ...], Tensor] = {}

    def add(self, probabilities: Tensor, acting: Tensor, valid: Tensor) -> None:
        """Keep a layer.

        Args:
            probabilities: (B, T, E) or (B * T, E) float32, of the router.
            acting: the weights by which the experts act, which broadcast to the same shape.
            valid: (B, T) float32, 1 at real tokens; the same tensor for all layers with the same tokens.
        """
        self.layers += 1
        self._pending.append((probabilities, acting, valid))

    @torch.no_grad()
    def count(self) -> None:
        """Count the layers that were kept, and let go of their graph."""
        pending, self._pending = self._pending, []
        groups: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, Tensor]]] = {}
        for kept in pending:
            groups.setdefault((kept[0].shape, kept[1].shape, id(kept[2])), []).append(kept)
        for group in groups.values():
            valid = group[0][2]
            shape = (len(group), *valid.shape, group[0][0].shape[-1])
            routed = stacked([probabilities for probabilities, _, _ in group])
            same = all(acting is probabilities for probabilities, acting, _ in group)
            acting = routed if same else stacked([acting for _, acting, _ in group]).to(routed).expand_as(routed)
            mask = valid.unsqueeze(-1)  # (B, T, 1)
            chosen = (one_hot_argmax(acting).reshape(shape) * mask).sum(dim=(0, 2))  # (B, E)
            probability = (routed.reshape(shape) * mask).sum(dim=(0, 2))
            if self._chosen is None or self._probability is None:
                self._chosen, self._probability = chosen, probability
                self._tokens = valid.sum(dim=1, keepdim=True)
            else:  # layers of a model that is spread over devices meet on the device of the first one
                self._chosen = self._chosen + chosen.to(self._chosen.device)
                self._probability = self._probability + probability.to(self._chosen.device)

    @torch.no_grad()
    def gradient(self, valid: Tensor, shape: torch.Size, factor: float) -> Tensor:
        """Gradient of `factor` times the loss for the probabilities of a layer, after all layers were added.

        Args:
            valid: as of `add`.
            shape: of the probabilities, and of the result, which all such layers share: it must not be changed.
            factor: of the loss.
        """
        key = (id(valid), shape, factor)
        if key not in self._gradients:
            tokens = self._all_tokens()
            slope = (self._chosen / tokens.square() * (factor / len(tokens))).unsqueeze(1)  # (B, 1, E)
            self._gradients[key] = (slope.to(valid.device) * valid.unsqueeze(-1)).view(shape)
        return self._gradients[key]

    def value(self) -> Tensor:
        """The loss, a scalar on the device of the first layer."""
        tokens = self._all_tokens()
        return (self._chosen / tokens * (self._probability / tokens)).sum(dim=-1).mean()

    def _all_tokens(self) -> Tensor:
        """Real tokens of each sample in all layers, (B, 1), at least 1."""
        self.count()
        if self._tokens is None:
            raise RuntimeError("no layer was counted")
        return (self.layers * self._tokens).clamp(min=1)
