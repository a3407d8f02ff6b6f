"""One adapter that computes the weighted sum of several: `add_weighted_adapter` of LoRA, as far as it is exact.

The matrices A of the adapters come below one another, so the rank of the sum is the sum of the ranks. Of adapters whose
routers agree, every expert is the B of all adapters with its number, side by side. Otherwise the experts of the sum are
all pairs: for two adapters with the weights u and v the expert of the pair i, j has the weight u_i v_j, which a
softmax of the sum of both routers' logits gives, and B_i and B_j side by side. Summed over j the weights u_i v_j are
u_i, so each adapter is mixed as by its own router. Means over a prompt keep that, so routing by sequence is exact too.

Shape letters: r rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hydralora.tuner.config import HydraLoraConfig
from hydralora.tuner.linear import HydraLoraLayer
from hydralora.tuner.scaling import checked_factor

KIND = "cat"
"""LoRA's name for this combination; the others of LoRA are approximations of one matrix."""


@dataclass(frozen=True)
class Summand:
    """One adapter in one layer.

    Attributes:
        shared_a: (r, in_features).
        experts_b: (E, out_features, r), scaled by the adapter's factor and its weight in the sum.
        router: (E, in_features), zero for one expert.
    """

    shared_a: Tensor
    experts_b: Tensor
    router: Tensor


@dataclass(frozen=True)
class Combination:
    """What is to be added to a model.

    Attributes:
        config: of the sum.
        summands: of each layer, by its name.
        common: the routers of all adapters agree.
    """

    config: HydraLoraConfig
    summands: Mapping[str, list[Summand]]
    common: bool


def combination(
    layers: Mapping[str, HydraLoraLayer],
    configs: Mapping[str, HydraLoraConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    kind: str,
) -> Combination:
    """Check what is to be combined; arguments and errors as of `HydraLoraModel.add_weighted_adapter`."""
    _check(configs, adapters, weights, kind)
    factors = dict(zip(adapters, map(checked_factor, weights), strict=True))
    chosen = {name: layer for name, layer in layers.items() if set(adapters) & set(layer.lora_A)}
    merged = sorted({name for layer in chosen.values() for name in adapters if name in layer.merged_adapters})
    if merged:
        raise ValueError(f"adapters {merged} are merged; call unmerge_adapter() first")
    ranks, experts = _shapes(chosen, adapters)
    with torch.no_grad():
        summands = {
            name: [_summand(layer, adapter, ranks[adapter], experts[adapter], factors[adapter]) for adapter in adapters]
            for name, layer in chosen.items()
        }
    common = all(torch.equal(each.router, every[0].router) for every in summands.values() for each in every)
    rank = sum(ranks.values())
    first = configs[adapters[0]]
    options: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": sorted(chosen), "init_weights": True}
    # The layers are named one by one, padded to one rank, and scaled already.
    cleared: dict[str, Any] = {
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_rslora": False,
    }
    cleared |= {"rank_pattern": {}, "alpha_pattern": {}, "experts_pattern": {}}
    known = {item.name for item in fields(first)}
    options |= {name: value for name, value in cleared.items() if name in known}
    options["lora_nums"] = experts[adapters[0]] if common else math.prod(experts.values())
    return Combination(replace(first, **options), summands, common)


def _check(
    configs: Mapping[str, HydraLoraConfig], adapters: Sequence[str], weights: Sequence[float], kind: str
) -> None:
    if kind != KIND:
        raise ValueError(
            f"combination_type is '{kind}', expected '{KIND}': the other combinations of LoRA approximate one matrix, "
            "and an adapter with a router has none. For one expert, save the adapters by save_as_lora and combine those"
        )
    if isinstance(adapters, str) or not adapters:
        raise ValueError(f"adapters is {adapters!r}, expected a list of names")
    unknown = sorted(set(adapters) - configs.keys())
    if unknown:
        raise ValueError(f"there is no adapter {unknown}; known: {sorted(configs)}")
    if len(set(adapters)) != len(adapters):
        raise ValueError(f"adapters {list(adapters)} names one twice; add its weights up")
    if len(weights) != len(adapters):
        raise ValueError(f"{len(weights)} weights for {len(adapters)} adapters; give one for each")
    saving = [name for name in adapters if configs[name].modules_to_save]
    if saving:
        raise ValueError(f"adapters {saving} have modules_to_save, trained in full, which cannot be added up")
    saving = [name for name in adapters if configs[name].trainable_token_indices]
    if saving:
        raise ValueError(f"adapters {saving} have trainable_token_indices, trained in full, which cannot be added up")
    if any(configs[name].bias != "none" for name in adapters):
        raise ValueError("adapters that trained biases cannot be added up: a bias belongs to one adapter")
    choosing = [name for name in adapters if configs[name].top_k or configs[name].top_p or configs[name].tasks]
    if choosing:
        raise ValueError(
            f"adapters {choosing} have top_k, top_p or routing by task: no softmax of one router weights their experts "
            "as theirs do, so they cannot be added up exactly"
        )
    for option in ("routing", "lora_dropout", "router_temperature"):
        values = {name: getattr(configs[name], option) for name in adapters}
        if len(set(values.values())) > 1:
            raise ValueError(f"{option} differs: {values}; adapters of one kind can be added up")


def _shapes(layers: Mapping[str, HydraLoraLayer], adapters: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Rank and number of experts of each adapter; smaller ranks of some layers are filled up with zeros."""
    ranks, experts = {}, {}
    for adapter in adapters:
        own = [layer for layer in layers.values() if adapter in layer.lora_A]
        numbers = {layer.experts[adapter] for layer in own}
        if len(numbers) > 1:
            raise ValueError(f"adapter '{adapter}' has {sorted(numbers)} experts in its layers, expected one number")
        ranks[adapter], experts[adapter] = max(layer.r[adapter] for layer in own), numbers.pop()
    return ranks, experts


def _summand(layer: HydraLoraLayer, adapter: str, rank: int, experts: int, factor: float) -> Summand:
    """The adapter in this layer, with zeros where it has none and behind its rank."""
    inputs, outputs = layer.in_features, layer.out_features
    reference: Any = layer.lora_A[next(iter(layer.lora_A))].weight
    a, b, router = (
        reference.new_zeros(shape) for shape in ((rank, inputs), (experts, outputs, rank), (experts, inputs))
    )
    if adapter in layer.lora_A:
        own = layer.r[adapter]
        a[:own] = _weight(layer.lora_A[adapter])
        b[..., :own] = layer.expert_matrices(adapter) * (layer.scaling[adapter] * factor)
        if adapter in layer.lora_router:
            router.copy_(_weight(layer.lora_router[adapter]))
    return Summand(a, b, router)


def joined(summands: Sequence[Summand], common: bool) -> Summand:
    """The sum of adapters in one layer, with the ranks added up; `common`: their routers agree."""
    total = summands[0]
    for other in summands[1:]:
        total = _with_equal_router(total, other) if common else _pairs(total, other)
    return total


def _with_equal_router(one: Summand, other: Summand) -> Summand:
    return Summand(
        torch.cat([one.shared_a, other.shared_a]), torch.cat([one.experts_b, other.experts_b], dim=2), one.router
    )


def _pairs(one: Summand, other: Summand) -> Summand:
    """Expert i * E' + j is the pair of expert i of `one` and expert j of the E' experts of `other`."""
    first, second = len(one.router), len(other.router)
    b = torch.cat([one.experts_b.repeat_interleave(second, dim=0), other.experts_b.repeat(first, 1, 1)], dim=2)
    router = one.router.repeat_interleave(second, dim=0) + other.router.repeat(first, 1)
    return Summand(torch.cat([one.shared_a, other.shared_a]), b, router)


@torch.no_grad()
def fill(layer: HydraLoraLayer, adapter: str, total: Summand) -> None:
    """Copy the sum into an adapter of its shape."""
    _weight(layer.lora_A[adapter]).copy_(total.shared_a)
    layer.expert_matrices(adapter).copy_(total.experts_b)
    if adapter in layer.lora_router:
        _weight(layer.lora_router[adapter]).copy_(total.router)


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight
