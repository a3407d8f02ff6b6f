"""One token in evaluation: the step of decoding, where what surrounds the products takes longer than they do.

The numbers are those of `HydraLoraLayer.update`, of the same operations, for the most common case alone: a router that
decides for this token, and nothing that has to see the modules of the adapter being called. What that takes is looked
up in every call, so that nothing has to be told of a change: no matrix is kept next to the weights. One product with A
and router stacked, which would need such a copy, is not faster than two, since its result has to be cut in two again.

Shape letters: r rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydralora.layer import Routing
from hydralora.tuner.parts import Experts, Router, SharedA
from hydralora.tuner.routing.rule import Rule


class DecodingLayer(Protocol):
    """What this module needs of a layer; `HydraLoraLayer` is one."""

    rules: dict[str, Rule]
    scaling: dict[str, float]
    observers: list[Callable[[Routing], None]]
    passes: Any
    training: bool
    _modules: dict[str, nn.Module | None]


def one_token(layer: DecodingLayer, adapter_name: str, x: Tensor, onto: Tensor) -> Tensor | None:
    """`onto` with what an adapter adds for a single token; None where `update` has to compute it.

    Args:
        layer: the layer.
        adapter_name: the adapter.
        x: (..., in_features) of one token; gradients are disabled.
        onto: (..., out_features).
    """
    if x.numel() != x.shape[-1] or layer.training or layer.observers or not layer.rules[adapter_name].plain:
        return None
    if torch.compiler.is_compiling() or x.is_meta or torch.is_autocast_enabled(x.device.type):
        return None
    parts = layer._modules
    router = _weight(parts["lora_router"], adapter_name, Router)
    shared_a = _weight(parts["lora_A"], adapter_name, SharedA)
    experts_b = _weight(parts["lora_B"], adapter_name, Experts)
    if router is None or shared_a is None or experts_b is None:
        return None
    dropout: Any = parts["lora_dropout"]
    dropout = dropout._modules[adapter_name]
    if dropout.training and dropout.p:  # by itself, as for draws at inference
        return None
    rule, scaling = layer.rules[adapter_name], layer.scaling[adapter_name]
    if not x.dtype == onto.dtype == shared_a.dtype == router.dtype == experts_b.dtype:
        return None
    if (
        not isinstance(scaling, float)
        or nn.modules.module._has_any_global_hook()
        or layer.passes.given_now() is not None
    ):
        return None
    code, logits = F.linear(x, shared_a), F.linear(x, router)  # (..., r), (..., E)
    weights = torch.softmax(logits if rule.temperature == 1 else logits / rule.temperature, -1, torch.float32)
    rows = torch.kron(weights, code)  # (..., E * r) float32
    update = F.linear(rows if rows.dtype == code.dtype else rows.to(code.dtype), experts_b)  # (..., out_features)
    return torch.add(onto, update, alpha=scaling)


def _weight(parts: Any, adapter_name: str, kind: type[nn.Module]) -> Tensor | None:
    """The weight of an adapter's module, by the dictionaries of `nn.Module`; None: it has to be called.

    Hooks, as of offloading and sharding, and a `forward` put onto the module act in a call only. A weight that is no
    plain parameter, such as a split or a quantized one, is the matter of the module too, and so is one of another class
    than `kind`, or one that draws since it is in training mode by itself.
    """
    found: Any = parts._modules.get(adapter_name)
    if type(found) is not kind:
        return None
    module: Mapping[str, Any] = found.__dict__
    drawn = module["training"] and kind is Experts and found.head_dropout.drops
    if drawn or module["_forward_hooks"] or module["_forward_pre_hooks"] or "forward" in module:
        return None
    weight = module["_parameters"].get("weight")
    return weight if type(weight) is nn.Parameter else None
