"""How the matrices B of an adapter start.

With B = 0 all experts are equal and so is the router's gradient to zero: ∂L/∂z_e = s p_e (g·B_e h - sum_j p_j g·B_j h)
for logits z, h = A x and g = ∂L/∂y. Random B without their mean, under a router of zeros, leave the base as it is,
since sum_e B_e / E = 0, and give the router a gradient from the first update.

Shape letters: r rank, E experts.
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from torch import Tensor, nn

GAMMA = 64.0
"""Of the spread of random B, out_features^(-1/4) / sqrt(GAMMA), as in R-LoRA (arXiv 2502.15455)."""


class Initialization(StrEnum):
    """How the experts of a new adapter start. Either way the model starts as its base."""

    ZERO = "zero"
    """B = 0, and a random router, as in the paper."""

    CENTERED = "centered"
    """Random B minus their mean over the experts, and a router of zeros. With one expert B = 0, as in LoRA."""


@torch.no_grad()
def draw_centered(weight: Tensor, experts: int) -> None:
    """Fill `weight` (out_features, E * r) with normal numbers whose sum over the E `experts` is zero up to rounding.

    One expert gets zeros. Harmless on the meta device.
    """
    nn.init.normal_(weight, std=len(weight) ** -0.25 / math.sqrt(GAMMA))
    stacked = weight.unflatten(1, (experts, -1))  # (out_features, E, r)
    weight.copy_((stacked - stacked.mean(dim=1, keepdim=True)).flatten(1))
