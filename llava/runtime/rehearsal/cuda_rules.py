"""What CUDA does above single operations, for fake tensors: autocast, fused attention, copies that are none.

Without a CUDA device torch switches autocast for it off, chooses attention for the CPU, and believes a fake tensor to
be on another device than it says. Here Python's calls of torch are answered as a GPU would have them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

HALVED = frozenset(
    {
        *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.conv1d, torch.conv2d),
        *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.bmm),
        *(Tensor.bmm, torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.einsum, torch.addbmm),
    }
)
"""Calls whose arguments autocast rounds to half precision (torch's list "CUDA Ops that can autocast to float16")."""

WIDENED = frozenset(
    {
        *(F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.softplus),
        *(F.layer_norm, F.group_norm, F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.kl_div, F.normalize),
        *(torch.exp, Tensor.exp, torch.log, Tensor.log, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt),
        *(Tensor.rsqrt, torch.sum, Tensor.sum, torch.prod, Tensor.prod, torch.cumsum, Tensor.cumsum, torch.norm),
        *(Tensor.norm, F.cosine_similarity, torch.reciprocal, Tensor.reciprocal),
    }
)
"""Calls whose half-precision arguments autocast makes float32."""


class CudaRules(TorchFunctionMode):
    """Python's calls of torch on fake CUDA tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._casts: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def forget(self) -> None:
        """Drop the rounded copies of weights, which autocast keeps until its outermost block ends."""
        self._casts.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call."""
        kwargs = dict(kwargs or {})
        on_cuda = _is_cuda(args)
        if func is Tensor.to and on_cuda:
            args, kwargs = _without_place(args, kwargs)
            if len(args) == 1 and not kwargs:
                return args[0]
        if func is Tensor.cuda and on_cuda:
            return args[0]
        if on_cuda and (func in HALVED or func in WIDENED) and torch.is_autocast_enabled("cuda"):
            cast = self._halved if func in HALVED else _widened
            args, kwargs = tree_map(cast, args), tree_map(cast, kwargs)
        if func is F.scaled_dot_product_attention and on_cuda:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _halved(self, leaf: Any) -> Any:
        """As `cached_cast` of torch's autocast does: the copy of a trained weight is made once."""
        dtype = torch.get_autocast_dtype("cuda")
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dtype in (dtype, torch.float64):
            return leaf
        keeps = leaf.requires_grad and leaf.is_leaf and leaf.dtype == torch.float32 and not leaf._is_view()
        if not keeps or not torch.is_autocast_cache_enabled():
            return leaf.to(dtype)
        known = self._casts.get(id(leaf))
        if known is None or known[0]() is not leaf:
            known = (weakref.ref(leaf), leaf.to(dtype))
            self._casts[id(leaf)] = known
        return known[1]


def _is_cuda(args: Any) -> bool:
    first = args[0] if args else None
    if isinstance(first, tuple | list) and first:
        first = first[0]
    elif isinstance(first, str) and len(args) > 1:  # einsum
        first = args[1]
    return isinstance(first, FakeTensor) and first.fake_device.type == "cuda"


def _widened(leaf: Any) -> Any:
    half = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if half else leaf


def _without_place(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Arguments of `Tensor.to` without a device and a dtype that the tensor has already."""
    tensor: FakeTensor = args[0]
    place: list[Any] = [kwargs.pop("device")] if kwargs.get("device") is not None else []
    dtype = [kwargs.pop("dtype")] if kwargs.get("dtype") is not None else []
    rest: list[Any] = []
    for word in args[1:]:
        if isinstance(word, Tensor):
            place, dtype = [_device(word)], [word.dtype]
        elif isinstance(word, torch.dtype):
            dtype = [word]
        elif isinstance(word, str | torch.device):
            place = [word]
        elif word is not None:
            rest.append(word)
    copies = kwargs.pop("copy", False) or any(word is True for word in rest[1:])
    kwargs.pop("non_blocking", None)
    new: dict[str, Any] = {}
    if place and not _same(torch.device(place[0]), tensor.fake_device):
        new["device"] = place[0]
    if dtype and dtype[0] != tensor.dtype:
        new["dtype"] = dtype[0]
    if copies:
        new["copy"] = True
    return (tensor,), kwargs | new


def _device(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _same(asked: torch.device, has: torch.device) -> bool:
    return asked.type == has.type and (asked.index is None or asked.index == has.index)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that torch takes on an A100 or H100: flash without a mask in half precision, else memory-efficient."""
    if enable_gqa and key.shape[1] != query.shape[1]:
        copies = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:  # torch makes an additive mask of it
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias.logical_not(), -float("inf"))
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return efficient(query, key, value, bias, needs_gradient, dropout_p, is_causal, scale=scale)[0]


@contextlib.contextmanager
def cuda_rules() -> Iterator[CudaRules]:
    """Answer calls of torch as with a GPU, and let autocast for CUDA be switched on."""
    rules = CudaRules()
    clear = torch.clear_autocast_cache

    def cleared() -> None:
        rules.forget()
        clear()

    engine = torch.autograd.graph._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with rules:  # which are off while `Tensor.backward` is answered; checkpointed layers are computed again inside
            return engine(*args, **kwargs)

    with (
        patch("torch.autograd._engine_run_backward", backward),
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda including_emulation=True: True),
        patch("torch.clear_autocast_cache", cleared),
        rules,
    ):
        yield rules
