"""The mathematics of LaVIN (arXiv 2305.15023): the re-parameterisable adapter, plain and routed.

An adapter is a linear bottleneck without activation in front of a linear layer, so it can be folded into that layer.
The routed one has two up-projections and mixes them by a softmax over two weights, one pair per sample. Parameters are
those of `RepAdapter` and `RepAdapter_Router` in `lavin/mm_adapter.py`: 1x1 convolutions, kept so that checkpoints load.
Imports torch alone.

Shape letters: B batch, L sequence length, D width, h hidden width of an adapter, g groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATHS = 2
"""Number of up-projections that the routed adapter mixes."""


Mixed = tuple[Tensor, Tensor, Tensor]
"""A routed adapter for known weights: down-projection (entries, D), its bias (entries,), up-projection (entries, D)."""


class PointwiseConv(nn.Conv1d):
    """A grouped 1x1 convolution over the last axis: slice i of the outputs sees only slice i of the inputs.

    Its weights are read by calling it, so that a program which splits parameters over processes makes them whole in
    time.
    """

    def __init__(self, width_in: int, width_out: int, groups: int = 1) -> None:
        super().__init__(width_in, width_out, 1, groups=groups)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """`W x + w`, (..., out) for `x` (..., in).

        Without `x` the matrix (out, in / g + 1) with the bias as last column.
        """
        if x is not None and self.groups == 1:
            return F.linear(x, self.weight[..., 0], self.bias)
        columns = torch.cat([self.weight[..., 0], self.bias[:, None]], dim=1)  # type: ignore[index]  # it has one
        if x is None:
            return columns
        return grouped_linear([x], [x.new_ones(())], [columns], self.groups)


def grouped_linear(
    inputs: Sequence[Tensor], factors: Sequence[Tensor], columns: Sequence[Tensor], groups: int
) -> Tensor:
    """Sum of grouped linear maps with a factor each, `sum_k factor_k (W_k x_k + w_k)`, in one product per group.

    What is multiplied by the factors is as narrow as the inputs; nothing as wide as the outputs is kept for backward.

    Args:
        inputs: K tensors (..., in).
        factors: K tensors that broadcast to (..., 1).
        columns: K matrices (out, in / g + 1), as `PointwiseConv` gives them.
        groups: g.

    Returns:
        (..., out).
    """
    shape = inputs[0].shape[:-1]
    scaled = [(x * factor).chunk(groups, dim=-1) for x, factor in zip(inputs, factors, strict=True)]
    ones = [factor.expand(*shape, 1) for factor in factors]
    # For each group the K slices of the inputs, each followed by its factor: (..., K (in / g + 1))
    slices = [
        torch.cat([part for parts, one in zip(scaled, ones, strict=True) for part in (parts[group], one)], dim=-1)
        for group in range(groups)
    ]
    weights = torch.cat(list(columns), dim=1).chunk(groups)  # g matrices (out / g, K (in / g + 1))
    return torch.cat([F.linear(x, weight) for x, weight in zip(slices, weights, strict=True)], dim=-1)


def through(x: Tensor, adapter: Mixed, chosen: Tensor | None = None) -> Tensor:
    """The input with the update of an adapter that `RoutedRepAdapter.mixed` gave.

    Args:
        x: (B, L, D).
        adapter: of one choice of weights, or of all of them.
        chosen: (B, 1 or L, entries), 1 at the hidden entries of the choice of each sample or token and else 0; None for
            one choice.

    Returns:
        (B, L, D) in the dtype of `x`; computed in that of the adapter.
    """
    down, bias, up = adapter
    wide = x.to(up.dtype)
    z = F.linear(wide, down, bias)  # (B, L, entries)
    if chosen is not None:
        z = z * chosen
    return torch.addmm(wide.flatten(0, 1), z.flatten(0, 1), up).view(x.shape).to(x.dtype)


def _check_groups(width: int, hidden: int, groups: int) -> None:
    """Raise `ValueError` unless both widths fall into equal groups."""
    if hidden % groups or width % groups:
        raise ValueError(f"width {width} and hidden width {hidden} must be multiples of the number of groups {groups}")


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
        self.conv_A = PointwiseConv(width, hidden)
        self.conv_B = PointwiseConv(hidden, width, groups)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A by Xavier's rule; biases and the up-projection are zero, so the adapter starts as zero."""
        nn.init.xavier_uniform_(self.conv_A.weight)
        for parameter in (self.conv_A.bias, *self.conv_B.parameters()):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden state (..., h) of `x` (..., D), after dropout; computed in the dtype of the parameters."""
        z = self.conv_A(x.to(self.conv_A.weight.dtype))
        return F.dropout(z, self.dropout, self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) for `x` (..., D), in the dtype of `x`."""
        return self.conv_B(self.hidden(x)).to(x.dtype)


class RoutedRepAdapter(RepAdapter):
    """The routed adapter: `x + scale * (r_0 B z + r_1 D z)` with `z = A x`.

    Args:
        width: D.
        hidden: h.
        groups: g.
        scale: factor of the update.
        temperature: of the softmax that gives the weights r.
        dropout: one mask serves both up-projections.
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
        self.conv_D = PointwiseConv(hidden, width, groups)
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
        r = r.to(z.dtype) * self.scale
        paths = self.conv_B(), self.conv_D()
        update = grouped_linear([z] * PATHS, r.chunk(PATHS, dim=-1), paths, self.conv_B.groups)  # (B, L, D)
        return x + update.to(x.dtype)

    def mixed_up(self, routing: Tensor) -> Tensor:
        """Both up-projections as one for known weights: dense matrices (..., D, h + 1), the bias as last column.

        Args:
            routing: (..., 2).
        """
        paths = []
        for conv in (self.conv_B, self.conv_D):
            columns = conv()  # (D, h / g + 1)
            blocks = torch.block_diag(*columns[:, :-1].chunk(conv.groups))  # type: ignore[no-untyped-call]  # (D, h)
            paths.append(torch.cat([blocks, columns[:, -1:]], dim=1))
        factors = routing.to(paths[0].dtype) * self.scale
        return torch.einsum("...k,kdh->...dh", factors, torch.stack(paths))

    @torch.no_grad()
    def mixed(self, routing: Tensor) -> Mixed:
        """The adapter in evaluation mode for known weights, as two products; its parameters are copied.

        Args:
            routing: (..., 2) for K choices of weights altogether, for example one for each modality.

        Returns:
            For all choices, one after another: K (h + 1) hidden entries.
        """
        ups = self.mixed_up(routing)  # (..., D, h + 1)
        up = ups.reshape(-1, *ups.shape[-2:]).transpose(1, 2).flatten(0, 1)  # (K (h + 1), D)
        down = self.conv_A()  # (h, D + 1)
        one = down.new_zeros(1, down.shape[1])  # the hidden entry that the bias of the up-projection is multiplied by
        one[:, -1] = 1
        columns = torch.cat([down, one]).repeat(len(up) // (len(down) + 1), 1)
        return columns[:, :-1].contiguous(), columns[:, -1].contiguous(), up.contiguous()

    def extra_repr(self) -> str:
        """What `print(model)` shows beside the children."""
        return f"scale={self.scale}, temperature={self.temperature}, dropout={self.dropout}"
