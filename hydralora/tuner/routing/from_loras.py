"""Experts made of existing LoRA adapters: with the weight 1 for one of them, the model is that LoRA's.

Each LoRA has an A of its own, so the matrices A come below one another, and each B stands in the columns of its own A
with zeros elsewhere: B_e A x is exactly LoRA e. Where all have the same A it is shared, at their own rank.

Shape letters: r rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights
from torch import Tensor, nn

from hydralora.tuner.config import HydraLoraConfig
from hydralora.tuner.linear import HydraLoraLayer

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
KNOWN = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias"}
KNOWN |= {"exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "runtime_config"}
KNOWN |= {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
KNOWN |= {"auto_mapping", "megatron_core", "qalora_group_size", "lora_ga_config", "loftq_config", "corda_config"}


def from_loras(
    base: nn.Module, sources: Sequence[str | Path | PeftModel], frozen: bool = True, **options: Any
) -> PeftModel:
    """A model whose experts are existing LoRA adapters, in their order.

    Args:
        base: the model that they were trained on, without adapters.
        sources: folders of PEFT adapters, or models with an active LoRA adapter.
        frozen: train only the routers, or the table of the tasks; False: the experts too.
        options: of `HydraLoraConfig`, such as `routing`, `tasks` or `top_k`.

    Returns:
        The model of PEFT; with `expert=e` it computes what LoRA e does.

    Raises:
        ValueError: there are fewer than two sources, one is no plain LoRA of linear layers, or its layers are not those
            of the base.
    """
    if len(sources) < 2:
        raise ValueError(f"{len(sources)} LoRA adapters were given; experts to choose from need at least 2")
    if isinstance(base, PeftModel):
        raise ValueError("the base has adapters already; give the model without them (unload())")
    read = [_read(source) for source in sources]
    layers = sorted({name.removesuffix(A) for _, tensors in read for name in tensors if name.endswith(A)})
    names = {name for name, _ in base.named_modules()}
    missing = [layer for layer in layers if layer not in names]
    if missing:
        raise ValueError(f"the base has no layers {missing[:3]}, which a LoRA adapts")
    parts = {layer: [_part(config, tensors, layer) for config, tensors in read] for layer in layers}
    stacked = {layer: _stacked(found) for layer, found in parts.items()}
    rank = max(len(a) for a, _ in stacked.values())
    chosen = {"r": rank, "lora_alpha": rank, "lora_nums": len(sources), "target_modules": layers}
    chosen |= {"frozen_experts": frozen, "task_type": read[0][0].task_type}
    model = get_peft_model(base, HydraLoraConfig(**chosen | options))
    modules = {name: module for name, module in model.base_model.model.named_modules()}
    with torch.no_grad():
        for layer, (a, b) in stacked.items():
            _fill(modules[layer], a, b)
    return model


def _fill(layer: HydraLoraLayer, a: Tensor, b: Tensor) -> None:
    """Copy A (r, in_features) and B (E, out_features, r) in; ranks behind theirs are zero and add nothing."""
    name = next(iter(layer.lora_A))
    shared_a: Any = layer.lora_A[name].weight
    matrices = layer.expert_matrices(name)
    if shared_a.shape[1:] != a.shape[1:] or matrices.shape[:2] != b.shape[:2]:
        raise ValueError(f"a LoRA of shape {tuple(b.shape[1:])} and {tuple(a.shape)} does not fit {layer.base_layer}")
    shared_a.zero_()
    matrices.zero_()
    shared_a[: len(a)] = a.to(shared_a)
    matrices[..., : len(a)] = b.to(matrices)


def _read(source: str | Path | PeftModel) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and tensors, by the name of the layer in the base.

    Raises:
        ValueError: it is no LoRA, or one that is more than B A.
    """
    if isinstance(source, PeftModel):
        config, tensors = source.active_peft_config, get_peft_model_state_dict(source, save_embedding_layers=False)
        name = f"adapter '{source.active_adapter}'"
    else:
        config, tensors, name = (
            PeftConfig.from_pretrained(str(source)),
            load_peft_weights(str(source), "cpu"),
            str(source),
        )
    if type(config) is not LoraConfig:
        raise ValueError(f"{name}: is a {type(config).__name__}, expected a LoRA")
    plain = LoraConfig()
    more = {
        key: value
        for key, value in vars(config).items()
        if key not in KNOWN and value not in (getattr(plain, key, None), None, False, [], {})
    }
    if more or config.bias != "none" or config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"{name}: has {more or {'bias': config.bias, 'init_lora_weights': config.init_lora_weights}}, more "
            "than a product B A on an unchanged base"
        )
    strange = sorted(key for key in tensors if not key.endswith((A, B)))
    if strange:
        raise ValueError(f"{name}: has {strange[:3]}, which are no A or B of a linear layer")
    return config, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def _part(config: LoraConfig, tensors: dict[str, Tensor], layer: str) -> tuple[Tensor, Tensor] | None:
    """A (r, in_features) and B (out_features, r), scaled, of a LoRA in one layer; None: it does not adapt it."""
    if layer + A not in tensors:
        return None
    a, b = tensors[layer + A].float(), tensors[layer + B].float()
    key = get_pattern_key(config.alpha_pattern.keys(), layer)
    alpha = config.alpha_pattern.get(key, config.lora_alpha)
    return a, b * (alpha / (math.sqrt(len(a)) if config.use_rslora else len(a)))


def _stacked(parts: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """The shared A (r, in_features) and all B (E, out_features, r) of one layer."""
    own = [part for part in parts if part is not None]
    same = all(torch.equal(a, own[0][0]) for a, _ in own)
    shared = own[0][0] if same else torch.cat([a for a, _ in own])
    matrices = shared.new_zeros(len(parts), len(own[0][1]), len(shared))
    column = 0
    for number, part in enumerate(parts):
        if part is not None:
            rank = len(part[0])
            matrices[number, :, column : column + rank] = part[1]
            column += 0 if same else rank
    return shared, matrices
