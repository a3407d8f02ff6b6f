"""The three modules of an adapter in one layer: the shared A, all B side by side, and the router.

Each is a linear layer without bias, with a weight of LoRA's shape under LoRA's name (`lora_A.default.weight`), and is
only used by calling it. So what acts on modules reaches them: hooks that bring in offloaded weights, sharding, and
programs that copy an adapter by the names of its parameters.

Shape letters: r rank, E experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydralora.layer import shared_code, weighted_experts
from hydralora.tuner import sparse
from hydralora.tuner.head_dropout import HeadDropout
from hydralora.tuner.initialization import Initialization, draw_centered


class SharedA(nn.Linear):
    """A, which all experts share; weight (r, in_features).

    Args:
        in_features: of the adapted layer.
        rank: r.
        gaussian: start with normal numbers of deviation 1/r; otherwise uniform in +-1/sqrt(in_features).
    """

    def __init__(self, in_features: int, rank: int, gaussian: bool = False) -> None:
        self.gaussian = gaussian
        super().__init__(in_features, rank, bias=False)

    def reset_parameters(self) -> None:
        """Draw the start of the weight."""
        if self.gaussian:
            nn.init.normal_(self.weight, std=1 / self.out_features)
        else:
            super().reset_parameters()

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        """`A dropout(x)`, (..., r) of (..., in_features)."""
        return shared_code(x, self.weight, dropout) if dropout else F.linear(x, self.weight)


class Experts(nn.Linear):
    """The matrices B of all experts; weight (out_features, E * r), column e * r + k is column k of B_e.

    Args:
        rank: r.
        out_features: of the adapted layer.
        experts: E.
        identity: start as `init` says, which changes no output; otherwise drawn uniformly in +-1/sqrt(r).
        init: how the experts start.
        head_dropout: dropout of their own in training; None: none.
    """

    def __init__(
        self,
        rank: int,
        out_features: int,
        experts: int,
        identity: bool = True,
        init: Initialization = Initialization.ZERO,
        head_dropout: HeadDropout | None = None,
    ) -> None:
        self.rank, self.experts, self.identity, self.init = rank, experts, identity, init
        super().__init__(experts * rank, out_features, bias=False)
        self.head_dropout = head_dropout or HeadDropout()

    def reset_parameters(self) -> None:
        """Draw the start of the weight; nothing depends on values, so this is harmless on the meta device."""
        if self.identity and self.init is Initialization.CENTERED:
            draw_centered(self.weight, self.experts)
            return
        bound = 0.0 if self.identity else 1 / math.sqrt(self.rank)
        nn.init.uniform_(self.weight, -bound, bound)

    @property
    def matrices(self) -> Tensor:
        """(E, out_features, r), as a view of the weight."""
        return self.weight.unflatten(1, (self.experts, self.rank)).transpose(0, 1)

    def forward(
        self,
        code: Tensor,
        weights: Tensor | None,
        scaling: float = 1.0,
        onto: Tensor | None = None,
        chosen: bool = False,
    ) -> Tensor:
        """`onto + scaling * sum_e weights_e B_e code`, (..., out_features) of code (..., r) and weights (..., E).

        Without weights, for one expert, these are LoRA's own products. `chosen`: weights of zero are those of experts
        that a rule left out, so that nothing is lost where these are not computed.
        """
        if weights is None:
            update = F.linear(code, self.weight) * scaling
        elif self.training and self.head_dropout.drops:
            update = F.linear(self.head_dropout.weighted_code(code, weights * scaling), self.weight.to(code.dtype))
        elif chosen and sparse.pays(code, weights):
            return sparse.grouped_experts(code, self.weight, weights, scaling, onto)
        else:
            return weighted_experts(code, self.weight, weights, scaling, onto)
        if onto is None:
            return update
        return onto + (update if update.dtype == onto.dtype else update.to(onto.dtype))


class Router(nn.Linear):
    """The router of one layer; weight (E, in_features).

    Args:
        in_features: of the adapted layer.
        experts: E.
        even: start with zeros, equal weights for all experts; otherwise drawn as by `nn.Linear`.
    """

    def __init__(self, in_features: int, experts: int, even: bool = False) -> None:
        self.even = even
        super().__init__(in_features, experts, bias=False)

    def reset_parameters(self) -> None:
        """Draw the start of the weight."""
        if self.even:
            nn.init.zeros_(self.weight)
        else:
            super().reset_parameters()

    def forward(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        """Probabilities (..., E) float32 of the experts, of (..., in_features); a temperature above 1 evens them."""
        logits = F.linear(x, self.weight)
        return torch.softmax(logits if temperature == 1 else logits / temperature, -1, torch.float32)
