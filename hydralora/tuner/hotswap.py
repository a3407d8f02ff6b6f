"""Hot-swapping: the weights of an adapter are replaced in place by those of a file, as `peft.utils.hotswap` for LoRA.

PEFT's functions know LoRA's layers alone, so `register_hotswap` makes them call the ones here for HydraLoRA. Rank and
factor may differ between the two adapters; what else decides the outputs has to agree and is compared before any weight
is touched.

Shape letters: r rank, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.utils import hotswap as of_peft
from torch import Tensor, nn

from hydralora.layer import side_by_side
from hydralora.split import is_split
from hydralora.tuner.config import HydraLoraConfig
from hydralora.tuner.linear import HydraLoraLayer
from hydralora.tuner.registration import peft_type
from hydralora.tuner.routing.rule import rule_of
from hydralora.tuner.stored import ROUTER, A, B, from_earlier, split_name, without_lone_routers

TASKS = "lora_tasks.weight"
SIZES = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""Options that are taken over from the file; those of training stay the model's."""

EXTENDED = ("hotswap_adapter_from_state_dict", "_convert_scalings_to_tensor", "_pad_lora_weights")
"""What is extended in PEFT's module."""


class HotswapError(ValueError, RuntimeError):
    """An adapter that cannot take the place of the loaded one; nothing was changed. PEFT raises both kinds."""


def register_hotswap() -> None:
    """Let PEFT's hot-swapping serve HydraLoRA; a PEFT whose module is made differently keeps refusing it."""
    known: dict[Any, list[str]] = of_peft.CONFIG_KEYS_TO_CHECK
    if peft_type() in known or not all(callable(getattr(of_peft, name, None)) for name in EXTENDED):
        return
    of_peft.hotswap_adapter_from_state_dict = _by_method(of_peft.hotswap_adapter_from_state_dict)
    of_peft._convert_scalings_to_tensor = _for_both(of_peft._convert_scalings_to_tensor, scalings_as_tensors)
    of_peft._pad_lora_weights = _for_both(of_peft._pad_lora_weights, pad_ranks)
    known[peft_type()] = []  # `swap` compares more than the active adapter's options, one by one


def _by_method(for_lora: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(for_lora)
    def chosen(
        model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(config, HydraLoraConfig):
            swap(model, state_dict, adapter_name, config)
        else:
            for_lora(model, state_dict, adapter_name, config, *args, **kwargs)

    return chosen


def _for_both(for_lora: Callable[..., bool], ours: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(for_lora)
    def both(model: nn.Module, *args: Any, **kwargs: Any) -> bool:
        found = ours(model, *args, **kwargs)
        return for_lora(model, *args, **kwargs) or found

    return both


def swap(model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str, config: HydraLoraConfig) -> None:
    """Replace the weights of an adapter in place.

    A layer that the new adapter does not have adds nothing afterwards. A rank below that of a layer is filled up with
    zeros; a higher one makes new parameters, after which a compiled model is compiled again.

    Args:
        model: a model of PEFT, compiled or not, or one in which an adapter was injected.
        tensors: of the new adapter, by the names of a file in which PEFT has put `adapter_name`.
        adapter_name: the adapter to replace; it keeps its name, and its options of training.
        config: of the new adapter.

    Raises:
        HotswapError: there is no such adapter, it is merged, or the new one has more layers, another number of
            experts, another routing, damaged tensors, or more than A, B and routers.
    """
    layers, prefix = _layers(model, adapter_name)
    old = _configs(model).get(adapter_name)
    _check_kind(layers, adapter_name, old, config)
    files = _by_layer(tensors, adapter_name, prefix)
    unknown = sorted(files.keys() - layers.keys())
    if unknown:
        names = ", ".join(f"{prefix}{name}.{part}" for name in unknown for part in files[name])
        raise HotswapError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {names}. The model has no adapter "
            f"'{adapter_name}' in these layers; load the new one under a name of its own by load_adapter"
        )
    for name, parts in files.items():
        _check_layer(layers[name], name, adapter_name, parts, config.for_layer(name))
    for name, layer in layers.items():
        _put(layer, adapter_name, files.get(name), config.for_layer(name))
    if old is not None:
        describe(layers, adapter_name, old, config)


def _layers(model: nn.Module, adapter_name: str) -> tuple[dict[str, HydraLoraLayer], str]:
    """The layers of an adapter by name, and what PEFT's names have before these."""
    inner: Any = getattr(model, "_orig_mod", model)  # of torch.compile
    bare, prefix = (inner.base_model.model, "base_model.model.") if isinstance(inner, PeftModel) else (inner, "")
    every = {name: module for name, module in bare.named_modules() if isinstance(module, HydraLoraLayer)}
    layers = {name: layer for name, layer in every.items() if adapter_name in layer.lora_A}
    if not layers:
        known = sorted({name for layer in every.values() for name in layer.lora_A})
        raise HotswapError(f"there is no HydraLoRA adapter '{adapter_name}' to replace; known: {known}")
    return layers, prefix


def _configs(model: nn.Module) -> dict[str, Any]:
    """The configurations of a model's adapters by name, as far as they are of HydraLoRA."""
    configs = getattr(getattr(model, "_orig_mod", model), "peft_config", {})
    return {name: config for name, config in configs.items() if isinstance(config, HydraLoraConfig)}


def _check_kind(
    layers: Mapping[str, HydraLoraLayer], adapter_name: str, old: HydraLoraConfig | None, new: HydraLoraConfig
) -> None:
    """Refuse states of the model, and adapters that are more than A, B and routers."""
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise HotswapError(f"adapter '{adapter_name}' is merged; call unmerge_adapter() before it is replaced")
    split = [name for name, layer in layers.items() if any(is_split(weight) for _, weight in layer.added_parameters())]
    if split:
        raise HotswapError(f"weights of {len(split)} layers are split over processes {split[:2]}; swap before that")
    offloaded = [
        name for name, layer in layers.items() if any(weight.is_meta for _, weight in layer.added_parameters())
    ]
    if offloaded:
        raise HotswapError(f"weights of {len(offloaded)} layers are offloaded {offloaded[:2]}; load the model whole")
    for which, config in (("loaded", old), ("new", new)):
        more = {name: getattr(config, name, None) for name in ("modules_to_save", "trainable_token_indices")}
        more = {name: value for name, value in more.items() if value}
        if config is not None and config.bias != "none":
            more["bias"] = config.bias
        if more:
            raise HotswapError(
                f"the {which} adapter trained {more} too, and hot-swapping replaces A, B and routers alone; load the "
                "new one under a name of its own by load_adapter"
            )


def _by_layer(tensors: Mapping[str, Tensor], adapter_name: str, prefix: str) -> dict[str, dict[str, Tensor]]:
    """Tensors by layer and by the names of `stored.py`, those of earlier versions included."""
    ending = re.compile(rf"\.{re.escape(adapter_name)}(\.weight)?$")
    stored = {ending.sub(lambda match: match[1] or "", name): tensor for name, tensor in tensors.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in without_lone_routers(from_earlier(stored)).items():
        layer, part = split_name(name.removeprefix(prefix))
        found.setdefault(layer, {})[part] = tensor
    return found


def _check_layer(
    layer: HydraLoraLayer, name: str, adapter_name: str, parts: Mapping[str, Tensor], config: HydraLoraConfig
) -> None:
    """Refuse what does not fit a layer; `config` is the layer's."""
    experts = layer.experts[adapter_name]
    if config.lora_nums != experts:
        raise HotswapError(
            f"'{name}': the loaded adapter has {experts} experts and the new one {config.lora_nums}; load the new one "
            "under a name of its own by load_adapter"
        )
    rule = rule_of(config)
    if experts > 1 and rule != layer.rules[adapter_name]:
        before, after = dataclasses.asdict(layer.rules[adapter_name]), dataclasses.asdict(rule)
        changed = {key: f"{before[key]!r}, new: {after[key]!r}" for key in before if before[key] != after[key]}
        raise HotswapError(
            f"'{name}': the routing differs: {'; '.join(f'{key} is {text}' for key, text in changed.items())}. Load "
            "the new adapter under a name of its own by load_adapter"
        )
    expected = {A: (config.r, layer.in_features), B: (layer.out_features, experts * config.r)}
    if adapter_name in layer.lora_router:
        expected[ROUTER] = (experts, layer.in_features)
    if adapter_name in layer.lora_tasks:
        expected[TASKS] = (len(rule.tasks), experts)
    given = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    if given != expected:
        raise HotswapError(f"'{name}': the new adapter has {given}, expected {expected}; its file is damaged")


@torch.no_grad()
def _put(layer: HydraLoraLayer, adapter_name: str, parts: Mapping[str, Tensor] | None, config: HydraLoraConfig) -> None:
    """Write checked tensors into a layer; None: let it add nothing."""
    own = {A: layer.lora_A, B: layer.lora_B, ROUTER: layer.lora_router, TASKS: layer.lora_tasks}
    modules = {part: modules[adapter_name] for part, modules in own.items() if adapter_name in modules}
    if parts is not None and config.r > layer.r[adapter_name]:
        resize(layer, adapter_name, config.r)
    for part in modules:
        modules[part].weight.zero_()
    if parts is not None:
        modules[A].weight[: config.r].copy_(parts[A])
        matrices = (
            parts[B].unflatten(1, (layer.experts[adapter_name], config.r)).transpose(0, 1)
        )  # (E, out_features, r)
        layer.expert_matrices(adapter_name)[..., : config.r].copy_(matrices)
        for part in modules.keys() - {A, B}:
            modules[part].weight.copy_(parts[part])
    layer.trained_scaling[adapter_name] = config.scaling
    layer.put_scaling(adapter_name, config.scaling)


@torch.no_grad()
def resize(layer: HydraLoraLayer, adapter_name: str, rank: int) -> None:
    """Give an adapter a higher rank in a layer, by new parameters that are filled up with zeros."""
    shared_a, experts_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    before = layer.r[adapter_name]
    a = shared_a.weight.new_zeros(rank, layer.in_features)
    a[:before] = shared_a.weight
    b = experts_b.weight.new_zeros(layer.experts[adapter_name], layer.out_features, rank)
    b[..., :before] = experts_b.matrices
    shared_a.weight = nn.Parameter(a, requires_grad=shared_a.weight.requires_grad)
    experts_b.weight = nn.Parameter(side_by_side(b).contiguous(), requires_grad=experts_b.weight.requires_grad)
    shared_a.out_features, experts_b.in_features = rank, experts_b.experts * rank
    layer.r[adapter_name] = experts_b.rank = rank


def describe(
    layers: Mapping[str, HydraLoraLayer], adapter_name: str, config: HydraLoraConfig, new: HydraLoraConfig | None = None
) -> None:
    """Let a configuration say which ranks and factors the layers have, so that the adapter can be saved.

    Args:
        layers: of the adapter, by name.
        adapter_name: the adapter.
        config: of the model; its `SIZES` are changed.
        new: another one whose sizes are taken if they are right for all layers.
    """
    for candidate in filter(None, (new, config)):
        if all(_describes(candidate.for_layer(name), layer, adapter_name) for name, layer in layers.items()):
            values = {option: getattr(candidate, option) for option in SIZES}
            break
    else:
        ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
        alphas = {name: layer.trained_scaling[adapter_name] * ranks[name] for name, layer in layers.items()}
        rank, alpha = max(ranks.values()), next(iter(alphas.values()))
        values = {"r": rank, "lora_alpha": alpha, "use_rslora": False}
        values["rank_pattern"] = {re.escape(name): each for name, each in ranks.items() if each != rank}
        values["alpha_pattern"] = {re.escape(name): each for name, each in alphas.items() if each != alpha}
    for option, value in values.items():
        setattr(config, option, value)


def _describes(config: HydraLoraConfig, layer: HydraLoraLayer, adapter_name: str) -> bool:
    return config.r == layer.r[adapter_name] and math.isclose(config.scaling, layer.trained_scaling[adapter_name])


def scalings_as_tensors(model: nn.Module) -> bool:
    """Keep the factors of all adapters as tensors, so that a compiled model need not be compiled for a new one.

    Returns:
        Whether the model has a HydraLoRA layer.
    """
    layers = [module for module in model.modules() if isinstance(module, HydraLoraLayer)]
    for layer in layers:
        device = next(weight.device for _, weight in layer.added_parameters())
        layer.scaling = {name: torch.as_tensor(value, device=device) for name, value in layer.scaling.items()}
    return bool(layers)


def pad_ranks(model: nn.Module, target_rank: int) -> bool:
    """Give all adapters the rank `target_rank` in every layer, without a change of the outputs.

    Returns:
        Whether the model has a HydraLoRA layer.

    Raises:
        HotswapError: a rank is higher; nothing was changed.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HydraLoraLayer)}
    for name, layer in layers.items():
        higher = {adapter: rank for adapter, rank in layer.r.items() if rank > target_rank}
        if higher:
            raise HotswapError(f"'{name}': target_rank is {target_rank}, but the ranks are {higher}; pass the highest")
    for layer in layers.values():
        for adapter, rank in list(layer.r.items()):
            if rank < target_rank:
                resize(layer, adapter, target_rank)
    for adapter, config in _configs(model).items():
        describe(_layers(model, adapter)[0], adapter, config)
    return bool(layers)
