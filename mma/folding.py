"""Folding adapters into the layers behind them, exactly, for one modality.

For a known modality the weights of a routed adapter are constants, and an adapter without activation in front of linear
layers is a linear map: `W (M x + c) + w = (W M) x + (W c + w)`. Nothing of the adapter remains but biases. Plain
adapters of a vision tower are folded in the same way; routed ones there depend on each token and stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mma.config import MODALITIES
from mma.layer import PointwiseConv, RepAdapter, RoutedRepAdapter
from mma.modality import routing_table
from mma.model import EMBEDDING, adapters, detach, norms

ATTENTION = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj")
"""Linear layers that read the output of the norm before attention, and of that before the MLP."""


def dense(conv: PointwiseConv) -> tuple[Tensor, Tensor]:
    """Matrix (out, in) and bias (out) of a grouped convolution, in float64."""
    blocks = conv.weight[..., 0].double().chunk(conv.groups)  # g blocks (out / g, in / g)
    assert conv.bias is not None  # noqa: S101  (it always has one)
    return torch.block_diag(*blocks), conv.bias.double()


def affine(adapter: RepAdapter, routing: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Matrix M (D, D) and vector c (D) of an adapter in evaluation mode, in float64.

    Args:
        adapter: plain or routed.
        routing: weights (2) of a routed one.
    """
    down, down_bias = dense(adapter.conv_A)
    up, up_bias = dense(adapter.conv_B)
    if not isinstance(adapter, RoutedRepAdapter) or routing is None:
        return up @ down, up @ down_bias + up_bias
    other, other_bias = dense(adapter.conv_D)
    first, second = (adapter.scale * routing.double()).unbind()
    mixed, mixed_bias = first * up + second * other, first * up_bias + second * other_bias
    identity = torch.eye(len(mixed), dtype=mixed.dtype, device=mixed.device)
    return identity + mixed @ down, mixed @ down_bias + mixed_bias


@torch.no_grad()
def fold_into(linears: Sequence[nn.Linear], matrix: Tensor, vector: Tensor) -> None:
    """Let linear layers do what they did behind the map `matrix x + vector`; they get biases if they had none."""
    for linear in linears:
        weight, dtype = linear.weight.double(), linear.weight.dtype
        bias = weight @ vector + (0 if linear.bias is None else linear.bias.double())
        linear.weight.copy_((weight @ matrix).to(dtype))
        if linear.bias is None:
            linear.bias = nn.Parameter(bias.to(dtype), requires_grad=linear.weight.requires_grad)
        else:
            linear.bias.copy_(bias.to(dtype))


def readers(layer: nn.Module, names: Sequence[str], where: str) -> list[nn.Linear]:
    """The linear layers of a decoder layer or block behind one of its norms.

    Raises:
        ValueError: they are not there, or are more than plain linear layers: quantised, or adapted by something else.
    """
    holders = [module for module in layer.modules() if all(hasattr(module, name) for name in names)]
    if len(holders) != 1:
        raise ValueError(f"{where} has {len(holders)} modules with the linear layers {names}, expected 1")
    found = [getattr(holders[0], name) for name in names]
    for name, linear in zip(names, found, strict=True):
        plain = type(linear) is nn.Linear and linear.weight.is_floating_point() and not linear._forward_hooks
        if not plain or list(linear.children()):
            raise ValueError(
                f"{where}: '{name}' is a {type(linear).__name__}"
                f"{' with an update of its own' if list(linear.children()) else ''}; adapters fold into plain linear "
                "layers alone, so merge or drop other adapters first and load without quantisation"
            )
    return found


@dataclass(frozen=True)
class Fold:
    """One adapter, and where it goes.

    Attributes:
        layer: decoder layer or block of a tower that has it.
        norm: the norm of that layer that it is a child of.
        routing: weights (2) of a routed one; None for a plain one.
        linears: the layers that read its output.
    """

    layer: nn.Module
    norm: nn.Module
    routing: Tensor | None
    linears: list[nn.Linear]

    def carry_out(self) -> None:
        """Change the linear layers; the adapter stays."""
        adapter: Any = self.norm.adapter
        fold_into(self.linears, *affine(adapter, self.routing))


def plan_decoder(decoder: Any, modality: str, dtype: torch.dtype) -> list[Fold]:
    """How the adapters of a decoder are folded for one modality; nothing is changed yet.

    Args:
        decoder: with adapters, in any mode: the weights of the routing are those of evaluation.
        modality: one of `MODALITIES`.
        dtype: of the hidden states at inference.

    Raises:
        ValueError: a layer behind an adapter is no plain linear layer.
    """
    with torch.no_grad(), _evaluation(decoder.layers):
        table = routing_table(decoder, dtype)[:, MODALITIES.index(modality)]  # (layers, A, 2)
    folds = []
    for index, layer in enumerate(decoder.layers):
        readers_of = [readers(layer, names, f"decoder layer {index}") for names in (ATTENTION, MLP)[: table.shape[1]]]
        folds += map(Fold, (layer, layer), norms(layer), table[index], readers_of)
    return folds


def plan_blocks(blocks: Sequence[nn.Module]) -> list[Fold]:
    """How the plain adapters of a vision tower are folded; nothing is changed yet.

    Raises:
        ValueError: an adapter is routed, or a layer behind it is no plain linear layer.
    """
    folds = []
    for index, block in enumerate(blocks):
        for norm, adapter in zip(norms(block), adapters(block), strict=False):
            if isinstance(adapter, RoutedRepAdapter):
                raise ValueError("routed adapters of a vision tower depend on every token and cannot be folded")
            folds.append(Fold(block, norm, None, readers(block, ATTENTION, f"block {index} of the tower")))
    return folds


def carry_out(folds: Sequence[Fold], decoder: nn.Module) -> None:
    """Fold, and take the adapters and the modality embedding of the decoder away."""
    for fold in folds:
        fold.carry_out()
    for layer in dict.fromkeys(fold.layer for fold in folds):
        detach(layer)
    delattr(decoder, EMBEDDING)


@contextmanager
def _evaluation(modules: nn.Module) -> Iterator[None]:
    """Without dropout for a while; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in modules.modules()}
    modules.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
