"""Layers that accelerate keeps elsewhere, on the CPU or on disk, and brings to the execution device for each pass.

The weights of such a layer are on the device meta between passes, and whatever is copied into them is lost. What this
project adds to a base (adapters, extensions, projector, rows of image tokens) is small, so it stays on the execution
device.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from accelerate.utils import named_module_tensors, set_module_tensor_to_device
from torch import nn

from llava.errors import CheckpointError, FlagError

ELSEWHERE = ("cpu", "disk")
"""Places of a `device_map` from which a layer is brought in, if any other layer is on a GPU."""

SHOWN = 5
"""Parts of a model that a message names before it only counts them."""


def align_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook of accelerate that places a module's inputs and weights, or None."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((each for each in hooks if isinstance(each, AlignDevicesHook)), None)


def is_offloaded(module: nn.Module) -> bool:
    """Whether the weights of this very module are elsewhere between passes."""
    hook = align_hook(module)
    return hook is not None and hook.offload


def offloaded_modules(model: nn.Module) -> list[str]:
    """Names of the modules whose weights are elsewhere between passes."""
    return [name for name, module in model.named_modules() if is_offloaded(module)]


def execution_device(model: nn.Module, name: str) -> torch.device:
    """Where the module `name` of `model` computes: where its nearest neighbor does; meta if none has a place.

    Args:
        model: any part of it may be offloaded.
        name: of the module, as in `named_modules`.
    """
    modules = dict(model.named_modules())
    while True:
        for module in modules[name].modules():
            hook = align_hook(module)
            if hook is not None and hook.execution_device is not None:
                return torch.device(hook.execution_device)
            for weight in module.parameters(recurse=False):
                if not weight.is_meta:
                    return weight.device
        if not name:
            return torch.device("meta")
        name = name.rpartition(".")[0]


def bring_in(module: nn.Module, recurse: bool = True) -> None:
    """Let the weights of a module stay on its execution device from now on.

    Args:
        module: its weights may be offloaded, some of them or none.
        recurse: those of its children too.
    """
    for part in module.modules() if recurse else (module,):
        hook = align_hook(part)
        if hook is None or not hook.offload:
            continue
        tensors = named_module_tensors(
            part, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
        )
        for name, tensor in list(tensors):
            # What the base does not have is read from the checkpoint later, or reported as missing.
            value = (
                hook.weights_map[name] if name in hook.weights_map else torch.zeros(tensor.shape, dtype=tensor.dtype)
            )
            set_module_tensor_to_device(part, name, hook.execution_device, value=value)
        options: dict[str, Any] = {"io_same_device": hook.io_same_device, "skip_keys": hook.skip_keys}
        add_hook_to_module(part, AlignDevicesHook(hook.execution_device, **options))


def bring_in_tensor(model: nn.Module, name: str) -> None:
    """Let one tensor that a `device_map` names by itself stay on the execution device; no hook would bring it in.

    Args:
        model: `check_placed` complains afterwards if the tensor is nowhere to be found.
        name: of the tensor, as in `named_parameters`.
    """
    owner, _, leaf = name.rpartition(".")
    for module in model.modules():
        hook = align_hook(module)
        stored = getattr(hook.weights_map, "dataset", {}) if hook is not None and hook.offload else {}
        if name in stored:
            set_module_tensor_to_device(model.get_submodule(owner), leaf, hook.execution_device, value=stored[name])
            return


def materialize(model: nn.Module, names: Iterable[str]) -> None:
    """Give new parameters that are on the device meta memory on their execution device; the values are undefined.

    Args:
        model: to which they were added.
        names: of the parameters, as in `named_parameters`.
    """
    for name in names:
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        parameter = getattr(owner, leaf)
        if parameter.is_meta:
            memory = torch.empty_like(parameter, device=execution_device(model, owner_name))
            setattr(owner, leaf, nn.Parameter(memory, parameter.requires_grad))


def check_placed(model: nn.Module) -> None:
    """Every weight is on a device, or a hook brings it in.

    Raises:
        CheckpointError: names the layers whose weights nothing brings in.
    """
    lost = [name for name, weight in _with_buffers(model) if weight.is_meta and not _brought_in(model, name)]
    if lost:
        owners = {name: name.rpartition(".")[0] for name in lost}
        layers = sorted({name if any(model.get_submodule(o).children()) else o for name, o in owners.items()})
        raise CheckpointError(
            f"the device map leaves {len(lost)} tensors without memory: {', '.join(layers)}; "
            "give these layers a place on a device, or raise max_memory"
        )


def _with_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _brought_in(model: nn.Module, name: str) -> bool:
    """Whether the owner of a tensor, or a module around it that places its children too, has an offloading hook."""
    owner, _, _ = name.rpartition(".")
    if is_offloaded(model.get_submodule(owner)):
        return True
    while owner:
        owner = owner.rpartition(".")[0]
        hook = align_hook(model.get_submodule(owner))
        if hook is not None and hook.offload and hook.place_submodules:
            return True
    return False


def check_quantised_map(device_map: Any, asked: Any = None) -> None:
    """Refuse what bitsandbytes cannot do: bring quantised layers in from the CPU or from disk.

    Args:
        device_map: the place of each part of the model; a word such as `auto`, or None, is not looked at.
        asked: what the caller passed, if `device_map` was computed from it.

    Raises:
        FlagError: names the first of these parts with their places, and says how many there are.
    """
    if not isinstance(device_map, dict):
        return
    places = {str(place) for place in device_map.values()}
    outside = ("disk",) if places <= set(ELSEWHERE) else ELSEWHERE
    parts = [f"{name or 'all layers'} ({place})" for name, place in device_map.items() if str(place) in outside]
    if parts:
        more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
        raise FlagError(
            f"quantised layers stay on their device, but device_map{f' {asked!r}' if isinstance(asked, str) else ''} "
            f"leaves {len(parts)} of {len(device_map)} parts of the model elsewhere: {', '.join(parts[:SHOWN])}{more}; "
            "free memory on the device, raise max_memory or give these parts a device in device_map; weights that are "
            "not quantised can be elsewhere"
        )


def computed_map(error: BaseException) -> dict[str, Any] | None:
    """The map of parts to places that transformers had in its hands when it raised an error, or None.

    A map that it computes from `auto` is in no message and in no attribute of the error; it is a local variable of the
    functions that made and checked it.

    Args:
        error: as it was caught, with its traceback.
    """
    maps = [frame.f_locals.get("device_map") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((each for each in reversed(maps) if isinstance(each, dict)), None)
