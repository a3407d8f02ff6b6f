"""The mathematics of LaVIN (arXiv 2305.15023): the re-parameterisable adapter, plain and routed.

An adapter is a linear bottleneck without activation in front of a linear layer, so it can be folded into that layer.
The routed one has two ways up and mixes them by a softmax over two weights, one pair per sample. Parameters are those
of `RepAdapter` and `RepAdapter_Router` in `lavin/mm_adapter.py`: 1x1 convolutions, kept so that checkpoints load.
Imports torch alone.

Shape letters: B batch, L sequence length, D width, h hidden width of an adapter, g groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATHS = 2
"""Number of ways up that the routed adapter mixes."""


def grouped_up(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Grouped linear map: slice i of the outputs sees only slice i of the inputs.

    Args:
        z: (..., h).
        weight: (D, h / g), as a grouped 1x1 convolution has it without its last axis.
        bias: (D), or None.

    Returns:
        (..., D).
    """
    groups = z.shape[-1] // weight.shape[-1]
    sliced = z.reshape(*z.shape[:-1], groups, -1)  # (..., g, h / g)
    y = torch.einsum("...gi,goi->...go", sliced, weight.reshape(groups, -1, weight.shape[-1])).flatten(-2)  # (..., D)
    return y if bias is None else y + bias


def _check_groups(width: int, hidden: int, groups: int) -> None:
    """Raise `ValueError` unless both widths fall into equal groups."""
    if hidden % groups or width % groups:
        raise ValueError(f"width {width} and hidden width {hidden} must be multiples of the number of groups {groups}")


def mixed_up(z: Tensor, routing: Tensor, paths: Sequence[nn.Conv1d]) -> Tensor:
    """Several grouped ways up, mixed: `sum_k routing_k (W_k z + w_k)`, in one multiplication.

    The weights stand beside each other with their biases as last columns, and the hidden state is mixed instead of the
    outputs, so that nothing of width D is kept for the backward pass.

    Args:
        z: (B, L, h).
        routing: (B, 1, K) or (B, L, K).
        paths: K grouped 1x1 convolutions.

    Returns:
        (B, L, D).
    """
    groups = paths[0].groups
    routing = routing.expand(*z.shape[:-1], len(paths))  # (B, L, K)
    mixed = routing[..., None] * z[..., None, :]  # (B, L, K, h)
    slices = mixed.reshape(*mixed.shape[:-1], groups, -1).transpose(-3, -2)  # (B, L, g, K, h / g)
    slices = torch.cat([slices.flatten(-2), routing[..., None, :].expand(*slices.shape[:-2], -1)], dim=-1)
    columns = [path.weight[..., 0] for path in paths] + [path.bias[:, None] for path in paths if path.bias is not None]
    weight = torch.cat(columns, dim=1)
    weight = weight.reshape(groups, -1, weight.shape[-1])  # (g, D / g, K h / g + K)
    return torch.einsum("...gi,goi->...go", slices, weight).flatten(-2)


class RepAdapter(nn.Module):
    """The plain adapter: down, dropout, grouped up. There is no skip connection, as in the original.

    Args:
        width: D.
        hidden: h.
        groups: g.
        dropout: probability of dropping an entry of the hidden state in training.
    """

    def __init__(self, width: int, hidden: int = 8, groups: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        _check_groups(width, hidden, groups)
        self.dropout = dropout
        self.conv_A = nn.Conv1d(width, hidden, 1)
        self.conv_B = nn.Conv1d(hidden, width, 1, groups=groups)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A by Xavier's rule; biases and the way up are zero, so the adapter starts as zero."""
        nn.init.xavier_uniform_(self.conv_A.weight)
        for parameter in (self.conv_A.bias, self.conv_B.weight, self.conv_B.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden state (..., h) of `x` (..., D), after dropout; computed in the dtype of the parameters."""
        z = F.linear(x.to(self.conv_A.weight.dtype), self.conv_A.weight[..., 0], self.conv_A.bias)
        return F.dropout(z, self.dropout, self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) for `x` (..., D), in the dtype of `x`."""
        return grouped_up(self.hidden(x), self.conv_B.weight[..., 0], self.conv_B.bias).to(x.dtype)


class RoutedRepAdapter(RepAdapter):
    """The routed adapter: `x + scale * (r_0 B z + r_1 D z)` with `z = A x`.

    Args:
        width: D.
        hidden: h.
        groups: g.
        scale: factor of the update.
        temperature: of the softmax that gives the weights r.
        dropout: one mask serves both ways up.
    """

    def __init__(
        self,
        width: int,
        hidden: int = 8,
        groups: int = 2,
        scale: float = 1.0,
        temperature: float = 10.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(width, hidden, groups, dropout)
        self.scale, self.temperature = scale, temperature
        self.conv_D = nn.Conv1d(hidden, width, 1, groups=groups)
        self.expert_weights = nn.Linear(width, PATHS)
        for parameter in self.conv_D.parameters():
            nn.init.zeros_(parameter)

    def route(self, x: Tensor) -> Tensor:
        """Weights r (..., 2), float32, from the tokens `x` (..., D) that decide them."""
        logits = self.expert_weights(x.to(self.expert_weights.weight.dtype))
        return torch.softmax(logits / self.temperature, dim=-1, dtype=torch.float32)

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """The input with its update.

        Args:
            x: (B, L, D).
            routing: weights (B, 2) for the whole sequence of each sample, or (B, L, 2) token by token; None takes those
                of the first position of each sample (in the language model that is the modality token).

        Returns:
            (B, L, D) in the dtype of `x`.
        """
        r = self.route(x[:, 0]) if routing is None else routing
        if r.ndim == 2:
            r = r[:, None]  # (B, 1, 2)
        z = self.hidden(x)  # (B, L, h)
        update = mixed_up(z, r.to(z.dtype) * self.scale, (self.conv_B, self.conv_D))  # (B, L, D)
        return x + update.to(x.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows beside the children."""
        return f"scale={self.scale}, temperature={self.temperature}, dropout={self.dropout}"
