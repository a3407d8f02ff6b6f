"""Routed layers with constant weights of their experts: the tensors of a plain LoRA.

Shape letters: r rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydralora.choices import MEAN, UNIFORM, Weights


@dataclass(frozen=True)
class RoutedPart:
    """One linear layer with experts.

    Attributes:
        name: of the linear layer in the model without experts.
        router: name of what routes for it; several layers of a block share one.
        shared_a: (r, in_features).
        experts_b: (E, out_features, r); of a model in memory a view of its parameter.
        scaling: factor of the update.
    """

    name: str
    router: str
    shared_a: Tensor
    experts_b: Tensor
    scaling: float

    @property
    def experts(self) -> int:
        """E."""
        return len(self.experts_b)

    def mixed(self, weights: Tensor) -> Tensor:
        """`sum_e w_e B_e`, (out_features, r) in the dtype of B, of weights (E,)."""
        if self.experts == 1 and bool(weights == 1):
            return self.experts_b[0].clone()
        wide = self.experts_b.float()
        return torch.einsum("e,eor->or", weights.to(wide), wide).to(self.experts_b.dtype)


@dataclass(frozen=True)
class PlainLora:
    """A LoRA whose layers have one rank and one alpha: servers take both for all layers from the configuration.

    Attributes:
        tensors: `lora_A.weight` (r, in_features) and `lora_B.weight` (out_features, r) by the names of the layers.
        rank: r.
        alpha: every update is scaled by alpha / rank.
    """

    tensors: dict[str, Tensor]
    rank: int
    alpha: float

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        return sorted({name.rsplit(".", 2)[0] for name in self.tensors})


def plain_lora(parts: Sequence[RoutedPart], weights: Mapping[str, Tensor]) -> PlainLora:
    """The LoRA of routed layers with the weights (E,) of each router.

    Where ranks or factors differ between layers, all get the largest rank, filled up with zeros, and B takes in the
    factor.
    """
    rank = max(len(part.shared_a) for part in parts)
    scalings = {part.scaling for part in parts}
    as_trained = len(scalings) == 1 and all(len(part.shared_a) == rank for part in parts)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        a, b = part.shared_a.detach(), part.mixed(weights[part.router]).detach()
        if not as_trained:
            a = torch.cat([a, a.new_zeros(rank - len(a), a.shape[1])])
            b = (b.float() * part.scaling).to(b.dtype)
            b = torch.cat([b, b.new_zeros(len(b), rank - b.shape[1])], dim=1)
        tensors[f"{part.name}.lora_A.weight"] = a.cpu().clone().contiguous()
        tensors[f"{part.name}.lora_B.weight"] = b.cpu().contiguous()
    return PlainLora(tensors, rank, scalings.pop() * rank if as_trained else rank)


def vectors(choice: Weights, experts: Mapping[str, int]) -> dict[str, Tensor]:
    """The weights (E,) float32 of each router that a choice means.

    Args:
        choice: as of `Weights`; `mean-routing` is measured elsewhere.
        experts: E by router.

    Raises:
        ValueError: there are several experts and no choice, or it does not fit; the message says what would.
    """
    if choice is None:
        return _of_one_expert(experts)
    if isinstance(choice, str):
        if choice != UNIFORM:
            raise ValueError(f"weights is '{choice}', expected one of {[UNIFORM, MEAN]}, an expert or numbers")
        return {router: torch.full((count,), 1 / count) for router, count in experts.items()}
    if isinstance(choice, bool):
        raise ValueError(f"weights is {choice}, expected the number of an expert, or a weight for each")
    if isinstance(choice, int):
        if not 0 <= choice < min(experts.values()):
            raise ValueError(f"weights is expert {choice}, expected one of 0 to {min(experts.values()) - 1}")
        return {router: torch.eye(count)[choice] for router, count in experts.items()}
    if isinstance(choice, Mapping):
        missing, unknown = sorted(experts.keys() - choice.keys()), sorted(choice.keys() - experts.keys())
        if missing or unknown:
            raise ValueError(
                f"weights by layer: {len(missing)} layers are missing {missing[:3]}, {len(unknown)} are unknown "
                f"{unknown[:3]}; known: {sorted(experts)[:3]}"
            )
        return {router: _vector(choice[router], count, router) for router, count in experts.items()}
    return {router: _vector(choice, count, router) for router, count in experts.items()}


def _of_one_expert(experts: Mapping[str, int]) -> dict[str, Tensor]:
    several = {router: count for router, count in experts.items() if count > 1}
    if several:
        router, count = next(iter(several.items()))
        raise ValueError(
            f"'{router}' weights {count} experts for each input, so no single LoRA gives the same outputs; choose "
            f"weights: '{UNIFORM}', the number of an expert, {count} numbers, or '{MEAN}' with inputs, whose error is "
            "reported"
        )
    return {router: torch.ones(1) for router in experts}


def _vector(values: Sequence[float], count: int, router: str) -> Tensor:
    numbers = values.tolist() if isinstance(values, Tensor) else list(values)
    finite = all(
        isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number) for number in numbers
    )
    if not finite or len(numbers) != count:
        raise ValueError(f"weights of '{router}' are {numbers}, expected {count} finite numbers, one for each expert")
    return torch.tensor(numbers, dtype=torch.float32)
