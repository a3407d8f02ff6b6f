"""The balance loss of the original's form, pooled over layers, without a graph that spans them.

Its value is that of `hydralora.layer.expert_balance_loss`: the mean over samples of `sum_e F_e P_e`, with F the shares
and P the mean probabilities of the experts over all layers and real tokens of a sample. F has no gradient, so the
gradient for the probabilities of one layer is F of all layers, divided by the number of tokens: once the forward pass
has ended, each layer knows its own without the others' graphs.

Shape letters: B batch, T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hydralora.layer import one_hot_argmax


class PooledBalance:
    """The sums of one forward pass over layers with equally many experts."""

    def __init__(self) -> None:
        self.layers = 0
        self._chosen: Tensor | None = None  # (B, E) float32, tokens by their most probable expert
        self._probability: Tensor | None = None  # (B, E) float32
        self._tokens: Tensor | None = None  # (B, 1) float32, of one layer
        self._slope: Tensor | None = None  # (B, 1, E) float32

    @torch.no_grad()
    def add(self, probabilities: Tensor, acting: Tensor, valid: Tensor) -> None:
        """Count a layer.

        Args:
            probabilities: (B, T, E) float32, of the router.
            acting: (B, T, E), the weights by which the experts act.
            valid: (B, T) float32, 1 at real tokens.
        """
        mask = valid.unsqueeze(1)  # (B, 1, T)
        chosen = (mask @ one_hot_argmax(acting)).squeeze(1)  # (B, E)
        probability = (mask @ probabilities).squeeze(1)
        self.layers += 1
        if self._chosen is None or self._probability is None:
            self._chosen, self._probability = chosen, probability
            self._tokens = valid.sum(dim=1, keepdim=True)
        else:  # layers of a model that is spread over devices meet on the device of the first one
            self._chosen = self._chosen + chosen.to(self._chosen.device)
            self._probability = self._probability + probability.to(self._chosen.device)

    def gradient(self, valid: Tensor) -> Tensor:
        """Gradient (B, T, E) of the loss for the probabilities of a layer, after all layers were counted."""
        if self._slope is None:
            tokens = self._all_tokens()
            self._slope = (self._chosen / tokens.square() / len(tokens)).unsqueeze(1)
        return self._slope.to(valid.device) * valid.unsqueeze(-1)

    def value(self) -> Tensor:
        """The loss, a scalar on the device of the first layer."""
        tokens = self._all_tokens()
        return (self._chosen / tokens * (self._probability / tokens)).sum(dim=-1).mean()

    def _all_tokens(self) -> Tensor:
        """Real tokens of each sample in all layers, (B, 1), at least 1."""
        if self._tokens is None:
            raise RuntimeError("no layer was counted")
        return (self.layers * self._tokens).clamp(min=1)
