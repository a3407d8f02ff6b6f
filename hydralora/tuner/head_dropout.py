"""Dropout that differs from expert to expert, so that the experts learn from different inputs.

Dropout before A has one mask for all experts. Here every expert drops numbers of `A x` of its own, as the heads of
R-LoRA (arXiv 2502.15455), or a whole expert is left out for a token.

Shape letters: r rank, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class HeadDropout:
    """The dropout of the experts of one layer; only in training.

    Attributes:
        heads: probability with which an expert drops a number of `A x`; what is kept is divided by 1 - heads.
        experts: probability of leaving out an expert for a token; those that are kept are divided by 1 - experts. So
            the mean over masks of what the experts add is what they add in evaluation, for both.
        start: number of updates before the first one with dropout.
        step: number of updates so far, None until `set_step` says it.
    """

    heads: float = 0.0
    experts: float = 0.0
    start: int = 0
    step: int | None = None

    @property
    def drops(self) -> bool:
        """Whether the present update drops anything.

        Raises:
            RuntimeError: that depends on the number of updates, which nobody said.
        """
        if not (self.heads or self.experts):
            return False
        if self.start and self.step is None:
            raise RuntimeError(
                f"head_dropout_start={self.start}: the adapter does not know how many updates have been made; call "
                "hydralora.set_step(model, step) before each"
            )
        return (self.step or 0) >= self.start

    def weighted_code(self, code: Tensor, weights: Tensor) -> Tensor:
        """Code (..., r) weighted by (..., E), with dropout: (..., E * r) in the dtype of `code`."""
        weighted = weights.unsqueeze(-1) * code.unsqueeze(-2)  # (..., E, r)
        if self.heads:
            weighted = F.dropout(weighted, self.heads)
        if self.experts:
            weighted = weighted * F.dropout(torch.ones_like(weighted[..., :1]), self.experts)
        return weighted.flatten(-2).to(code.dtype)
