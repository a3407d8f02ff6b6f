"""Which MLP of a decoder layer becomes a routed block, and whether the block is what the MLP was.

An MLP is chosen by its class and content, never by words in its name; what cannot be chosen or adapted is refused with
the reason. Imports torch alone.

Shape letters: D width, M width inside the MLP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hydralora.block import KINDS, RoutedMLP, problem

TOKENS = (2, 3)
"""Shape of the batch on which a block is compared with its MLP."""


def is_gated_mlp(module: nn.Module) -> bool:
    """True for `LlamaMLP` and every class built like it, unadapted.

    Such a module has linear layers `gate_proj` and `up_proj`, D -> M, and `down_proj`, M -> D.
    """
    found = [getattr(module, name, None) for name in KINDS]
    if isinstance(module, RoutedMLP) or not all(isinstance(linear, nn.Linear) for linear in found):
        return False
    gate, up, down = ((linear.in_features, linear.out_features) for linear in found)  # type: ignore[union-attr]
    return gate == up == down[::-1]


def only_gated_mlp(layer: nn.Module, index: int) -> str:
    """Name within decoder layer number `index` of the gated MLP that becomes a block.

    It is the only one; or, where the layer chooses among experts of its own, the only one that is not an element of a
    list of modules, as the shared expert of Qwen2-MoE: every token runs through it.

    Raises:
        ValueError: there is none, or no one in particular, or it cannot become a block.
    """
    kind = f"decoder layer {index} ({type(layer).__name__})"
    if any(isinstance(module, RoutedMLP) for module in layer.modules()):
        raise ValueError(f"decoder layer {index} has a routed MLP block already")
    names = [name for name, module in layer.named_modules() if is_gated_mlp(module)]
    chosen = names if len(names) == 1 else [name for name in names if not _is_element(layer, name)]
    if len(chosen) != 1:
        among = f", {len(chosen)} of them outside lists of experts" if names else ""
        raise ValueError(
            f"{kind} holds {len(names)} gated MLPs{among}, expected 1: a module with the linear layers gate_proj, "
            f"up_proj and down_proj, not adapted by something else{_what_it_has_instead(layer) if not names else ''}"
        )
    if (reason := problem(layer.get_submodule(chosen[0]))) is not None:
        raise ValueError(f"{kind}: {reason}")
    return chosen[0]


def _is_element(layer: nn.Module, name: str) -> bool:
    """Whether the module `name` of a layer is in a list of modules, of which a token may run through some alone."""
    parts = name.split(".")
    owners = (layer.get_submodule(".".join(parts[:length])) for length in range(1, len(parts)))
    return any(isinstance(owner, nn.ModuleList | nn.ModuleDict) for owner in owners)


def _what_it_has_instead(layer: nn.Module) -> str:
    """The reason why a layer has no gated MLP, as the end of a message; empty if none is known."""
    for module in layer.modules():
        fused = getattr(module, "gate_up_proj", None)
        if isinstance(fused, nn.Linear):
            return (
                f"; its {type(module).__name__} computes both in one linear layer gate_up_proj, which the PEFT method "
                "adapts as a whole: HydraLoraConfig(target_modules=...)"
            )
        if isinstance(fused, nn.Parameter):
            return f"; its {type(module).__name__} keeps the weights of all experts in tensors, not in linear layers"
    return ""


def reference(mlp: nn.Module) -> tuple[Tensor, Tensor] | None:
    """A random input (2, 3, D) and what a gated MLP makes of it, for `check`; the global random state stays.

    Returns:
        None if there is nothing to run: weights on the meta device or in the hands of another process, or a device
        that has no such operation in the dtype of the weights.

    Raises:
        ValueError: the MLP is not called with hidden states alone, or does not return a tensor of their shape.
    """
    tensors = [*mlp.parameters(), *mlp.buffers()]
    if any(tensor.is_meta or tensor.numel() == 0 for tensor in tensors):
        return None
    linear: Any = mlp.gate_proj
    dtype = linear.weight.dtype if linear.weight.is_floating_point() else torch.float32
    x = torch.randn(*TOKENS, linear.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(linear.weight.device, dtype)
    # With gradients: bitsandbytes repacks 4-bit weights for inference at the first pass without them on some CPUs.
    with _quiet(mlp):
        try:
            with torch.enable_grad():
                output = type(mlp).forward(mlp, x.clone().requires_grad_())
        except RuntimeError:
            return None
        except Exception as error:
            raise ValueError(f"{type(mlp).__name__} cannot be run on hidden states alone: {error}") from error
    if not isinstance(output, Tensor) or output.shape != x.shape:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{type(mlp).__name__} returns {got} for hidden states {tuple(x.shape)}, expected that shape")
    return x, output.detach()


def check(block: RoutedMLP, x: Tensor, expected: Tensor) -> None:
    """Compare a block, its experts set to zero for that, with what the MLP made of `x` before; see `reference`.

    Raises:
        ValueError: the MLP does not call one of its three linear layers, or the block computes something else.
    """
    kind, calls = block.base_class.__name__, Counter[str]()
    with _quiet(block), _zero_experts(block):
        try:
            handed = block.begin(x.clone().requires_grad_())
            call = block.call_class(block, handed)
            for name in KINDS:
                setattr(call, name, partial(_counted, calls, name, getattr(call, name)))
            with torch.enable_grad():
                output = block.base_class.forward(call, handed.x).detach()
        except Exception as error:
            raise ValueError(
                f"{kind} cannot run with adapted linear layers ({type(error).__name__}: {error}); it has to call "
                f"{', '.join(KINDS)} as functions of hidden states"
            ) from error
    idle = [name for name in KINDS if not calls[name]]
    if idle:
        raise ValueError(f"{kind} does not call {', '.join(idle)}, whose experts would not act")
    scale = expected.nan_to_num().abs().max()  # memory that no weights were read into may hold anything
    if not torch.allclose(output, expected, rtol=1e-4, atol=1e-4 * float(scale), equal_nan=True):
        difference = float((output - expected).abs().max())
        raise ValueError(
            f"{kind} with adapted linear layers, all experts zero, differs from {kind} by {difference:.3g} on random "
            f"hidden states, its largest output is {float(scale):.3g}: it does not compute the same twice"
        )


def _counted(calls: Counter[str], name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    calls[name] += 1
    return function(x)


@contextmanager
def _zero_experts(block: RoutedMLP) -> Iterator[None]:
    """Set what a block has added to zero while a block of code runs.

    A program that reads weights afterwards may have switched drawing off; then they are memory that holds anything.
    """
    added = [parameter for _, parameter in block.added_parameters()]
    with torch.no_grad():
        values = [parameter.clone() for parameter in added]
        try:
            for parameter in added:
                parameter.zero_()
            yield
        finally:
            for parameter, value in zip(added, values, strict=True):
                parameter.copy_(value)


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Run a module without gradients and dropout; its modes are what they were afterwards."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, mode in modes.items():
            each.training = mode
