"""Losses on the routing of one layer, as functions of its probabilities and of which tokens are real.

Both are means over the real tokens of a batch, of every layer by itself: a sum over layers would call it even if each
layer used one expert alone, provided that they use different ones. The balance loss in the original's form, over all
layers and each sample by itself, is `hydralora.layer.expert_balance_loss`.

Shape letters: B batch, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import torch
from torch import Tensor

from hydralora.layer import one_hot_argmax


class BalanceForm(StrEnum):
    """What the balance loss compares."""

    SAMPLE = "sample"
    """The shares of the experts in the tokens of one sample, over all layers together: the original's."""

    BATCH = "batch"
    """The shares in the tokens of the whole batch, in each layer."""


def mean_routing(probabilities: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean probability of each expert over real tokens, (E,) float32.

    Args:
        probabilities: (..., E).
        valid: (...), true or 1 at real tokens; None: all are. Without any real token the mean is 0.

    Raises:
        ValueError: they are not of the same tokens.
    """
    if valid is None:
        return probabilities.float().flatten(0, -2).mean(dim=0)
    if valid.shape != probabilities.shape[:-1]:
        raise ValueError(
            f"{tuple(probabilities.shape[:-1])} tokens are routed and the mask is of {tuple(valid.shape)}: give the "
            "mask of the tokens that this layer sees"
        )
    weights = valid.to(device=probabilities.device, dtype=torch.float32)
    total = (probabilities.float() * weights.unsqueeze(-1)).flatten(0, -2).sum(dim=0)
    return total / weights.sum().clamp(min=1)


def expert_shares(probabilities: Tensor, valid: Tensor | None = None) -> Tensor:
    """Share of the real tokens whose most probable expert is each one, (E,) float32, without gradient."""
    return mean_routing(one_hot_argmax(probabilities.detach()), valid)


def batch_balance(probabilities: Tensor, valid: Tensor | None = None, shares: Tensor | None = None) -> Tensor:
    """Balance loss of a layer over a batch, `sum_e F_e P_e`: 1/E when balanced, 1 when one expert takes everything.

    F are shares and P mean probabilities over the batch, as advised by arXiv 2501.11873: a loss on each sample works
    against experts that specialize. The factor E of Switch Transformer (arXiv 2101.03961) is left out, as in
    `expert_balance_loss`, so that one weight serves both.

    Args:
        probabilities: (..., E) of the tokens; for routing by sequence (B, E) or (B, 1, E), one row for each prompt.
        valid: (...), true at real tokens; None: all are.
        shares: (E,), F of more than this batch, as `MovingShares` gives; None: of this batch.

    Returns:
        Scalar float32; its gradient reaches the probabilities through P.
    """
    shares = expert_shares(probabilities, valid) if shares is None else shares.detach()
    return (shares.to(probabilities.device) * mean_routing(probabilities, valid)).sum()


def information(probabilities: Tensor, valid: Tensor | None = None) -> Tensor:
    """What the tokens of a batch and the choice of an expert share: H(mean of p) - mean of H(p), in nats.

    It is log E if every token has one expert and all experts get the same number of tokens, and 0 if all tokens are
    routed equally. Its negative is the information loss, as in HMoRA and LoRA-Mixer.

    Args:
        probabilities: (..., E).
        valid: (...), true at real tokens; None: all are.

    Returns:
        Scalar float32.
    """
    of_mean = entropy(mean_routing(probabilities, valid))
    return of_mean - mean_routing(entropy(probabilities.float()).unsqueeze(-1), valid).squeeze(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy along the last dimension in nats, (...) of (..., E); its gradient is finite where a probability is 0."""
    tiny = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp(min=tiny).log()).sum(dim=-1)


def of_prompts(probabilities: Tensor, prompt: Tensor | None = None) -> Tensor:
    """Weights of whole sequences, (B, E): the mean of `probabilities` (B, T, E) over the tokens of `prompt` (B, T)."""
    if prompt is None:
        return probabilities.mean(dim=1)
    mask = prompt.to(probabilities).unsqueeze(-1)  # (B, T, 1)
    return (probabilities * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class MovingShares:
    """Running means of the shares of the experts, by layer, where one micro batch is too small to balance.

    It belongs to one run of one model and starts with the first batch that it sees; a run that resumes hands over the
    means of its checkpoint.

    Args:
        decay: weight of the past, from 0 (this batch alone) to below 1.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._shares: dict[str, Tensor] = {}

    @property
    def state(self) -> dict[str, list[float]]:
        """The running mean of each layer, as numbers that a JSON file keeps exactly; waits for the device."""
        return {layer: shares.tolist() for layer, shares in self._shares.items()} if self.decay else {}

    @state.setter
    def state(self, state: Mapping[str, Sequence[float]]) -> None:
        self._shares = {layer: torch.tensor(shares) for layer, shares in state.items()}

    def update(self, layer: str, shares: Tensor) -> Tensor:
        """The running mean of a layer, (E,), with these shares (E,) of a batch in it."""
        before = self._shares.get(layer)
        mean = shares if before is None or not self.decay else torch.lerp(shares, before.to(shares), self.decay)
        self._shares[layer] = mean.detach()
        return self._shares[layer]


def warmed_up(weight: float, step: int, updates: int) -> float:
    """`weight` after `step` of the `updates` during which it grows linearly from 0; all of it with 0 updates."""
    return weight * min(1.0, step / updates) if updates else weight
