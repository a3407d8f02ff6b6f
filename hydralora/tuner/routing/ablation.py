"""Whether experts specialize: the loss with each expert alone, with equal weights, and with the router."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hydralora.tuner.linear import HydraLoraLayer
from hydralora.tuner.routing.calls import forced_routing

IGNORED = -100


@dataclass(frozen=True)
class Ablation:
    """Losses by routing and by group of batches.

    Attributes:
        losses: `losses[routing][group]`, mean over the targets; the routings are `router`, `uniform` and `expert <e>`,
            the groups those that were given, and `all`.
    """

    losses: dict[str, dict[str, float]]

    def __str__(self) -> str:
        groups = list(next(iter(self.losses.values())))
        width = max(len(name) for name in self.losses)
        lines = [" ".join([" " * width, *(f"{group:>10}" for group in groups)])]
        for name, row in self.losses.items():
            lines.append(" ".join([f"{name:<{width}}", *(f"{row[group]:10.4f}" for group in groups)]))
        return "\n".join(lines)


@torch.no_grad()
def ablate_experts(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], groups: Sequence[str] | None = None
) -> Ablation:
    """The loss of a causal language model on some batches, for each way to weight its experts.

    Experts that specialize have a lower loss alone on texts of their own, and the router's is lower than with equal
    weights. The experts are those that every layer with several has.

    Args:
        model: with an adapter of several experts.
        batches: keyword arguments of the model, with `labels` (B, T), -100 where ignored.
        groups: a name for each batch, such as its task; None: all are one group.

    Raises:
        ValueError: a batch has no labels, there are no batches, names and batches are not equally many, or there are
            no experts to choose from.
    """
    given = list(batches)
    names = ["all"] * len(given) if groups is None else list(groups)
    if not given or len(names) != len(given):
        raise ValueError(f"{len(given)} batches and {len(names)} groups; give at least one batch, and a group for each")
    if any(batch.get("labels") is None for batch in given):
        raise ValueError("a batch has no labels, so that there is no loss")
    layers = [module for module in model.modules() if isinstance(module, HydraLoraLayer)]
    counts = {layer.experts[name] for layer in layers for name in layer.active_adapters if name in layer.experts} - {1}
    if not counts:
        raise ValueError("the active adapters have no experts to choose from")
    if len(counts) > 1:
        raise ValueError(f"layers have {sorted(counts)} experts, so that no vector of equal weights fits all of them")
    count = counts.pop()
    ways: dict[str, dict[str, Any]] = {"router": {}, "uniform": {"routing_weights": [1 / count] * count}}
    ways |= {f"expert {number}": {"expert": number} for number in range(count)}
    was_training = model.training
    model.eval()
    try:
        return Ablation({way: _losses(model, given, names, options) for way, options in ways.items()})
    finally:
        model.train(was_training)


def _losses(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], names: Sequence[str], options: dict[str, Any]
) -> dict[str, float]:
    """Mean loss over the targets of each group, and of all."""
    sums: dict[str, float] = {}
    targets: dict[str, int] = {}
    with forced_routing(model, **options) if options else nullcontext():
        for batch, name in zip(batches, names, strict=True):
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            loss = float(model(**batch).loss) * count if count else 0.0
            for group in {name, "all"}:
                sums[group] = sums.get(group, 0.0) + loss
                targets[group] = targets.get(group, 0) + count
    ordered = [*dict.fromkeys(name for name in names if name != "all"), "all"]
    return {group: sums[group] / max(targets[group], 1) for group in ordered}
