"""A linear layer with the bytes and the operations of bitsandbytes' 4-bit layer, for tensors without numbers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a constant, and constants that share one of theirs (QLoRA, section 3)."""


class _Product(torch.autograd.Function):
    """x W^T whose weight is unpacked in forward and again in backward, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, state: Any) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.state = state
        return nn.functional.linear(x, _unpacked(packed, state).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return gradients[0] @ _unpacked(packed, ctx.state).to(gradients[0].dtype), None, None


def _unpacked(packed: Tensor, state: Any) -> Tensor:
    """(outputs, inputs) in the dtype that was quantized; the constants are unpacked first."""
    constants = torch.empty(state.blocks, dtype=torch.float32, device=packed.device) if state.nested else None
    weight = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    del constants
    return weight


@functools.cache
def shape_class() -> type[nn.Module]:
    """A subclass of bitsandbytes' 4-bit layer, which is a package of an extra; made of a linear layer and settings."""
    import bitsandbytes as bnb

    class Linear4bitShape(bnb.nn.Linear4bit):
        """Takes the place of a linear layer of a rehearsal; `forward` takes (..., inputs) to (..., outputs)."""

        def __init__(self, linear: nn.Linear, settings: Any) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.compute_dtype = settings.bnb_4bit_compute_dtype
            self.compute_type_is_set = True
            self.quant_state = None
            self.quant_storage = torch.uint8
            self.weight, self.bias = packed_weight(linear, settings), linear.bias

        def forward(self, x: Tensor) -> Tensor:
            y = _Product.apply(x.to(self.compute_dtype), self.weight, self.weight.quant_state)
            y = y if self.bias is None else y + self.bias.to(y.dtype)
            return y.to(x.dtype)

    return Linear4bitShape


def packed_weight(linear: nn.Linear, settings: Any) -> nn.Parameter:
    """Two weights in each byte, with the constants and the attributes of bitsandbytes' own parameter."""
    from bitsandbytes.functional import QuantState

    device, numbers = linear.weight.device, linear.weight.numel()
    blocks, nested = -(-numbers // BLOCK), bool(settings.bnb_4bit_use_double_quant)
    packed = torch.empty((numbers + 1) // 2, 1, dtype=torch.uint8, device=device)
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32, device=device),
        shape=linear.weight.shape,
        code=torch.empty(16, device=device),
        blocksize=BLOCK,
        quant_type=settings.bnb_4bit_quant_type,
        dtype=linear.weight.dtype,
    )
    if nested:
        constants = torch.empty(-(-blocks // NESTED_BLOCK), device=device)
        state.state2 = QuantState(absmax=constants, code=torch.empty(256, device=device), blocksize=NESTED_BLOCK)
        state.offset = torch.empty((), device=device)
        state.nested = True
    state.blocks = blocks
    weight: Any = nn.Parameter(packed, requires_grad=False)
    weight.quant_state, weight.compress_statistics = state, nested  # PEFT asks for these
    weight.quant_type = settings.bnb_4bit_quant_type
    return weight
